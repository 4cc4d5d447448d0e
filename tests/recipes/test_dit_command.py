import functools
import json

import numpy as np
import pytest
import torch

from dblocks.__main__ import main
from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import save_model
from dblocks.models import DiT, DiTConfig
from dblocks.recipes import dit as recipe
from dblocks.recipes.metrics.judge import train_judge
from tools import randomized

SMALL = ("--steps", "3", "--width", "8", "--heads", "2", "--sampling-steps", "6", "--points", "1")
SIZES = {"image_size": 4, "channels": 1, "width": 8, "depth": 3, "heads": 2, "num_classes": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


def stdout(capsys, *argv):
    assert main(argv) == 0
    return capsys.readouterr().out


def mistake(capsys, *argv):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def saved(folder, **options):
    torch.manual_seed(0)
    model = DiffusionBlocks(randomized(DiT(DiTConfig(**{**SIZES, **options}))), BlocksConfig(3))
    save_model(folder, model)
    return folder


@pytest.mark.parametrize("flags", [("--blocks", "2"), ("--end-to-end",)])
def test_a_dit_is_trained_evaluated_and_sampled(tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr(recipe, "judge_of", functools.partial(train_judge, steps=2))
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (120, 4, 4, 1), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(120) % 4)
    out, data = tmp_path / "dit", ("--data", str(tmp_path / "a.npz"))
    sizes = (*SMALL, "--batch-size", "8", "--samples", "40")
    text = stdout(capsys, "train", "dit", *data, *sizes, *flags, "--out", str(out))
    assert "Fréchet distance, guided samples" in text
    files = {p.name for p in out.iterdir()}
    assert files == {"model.safetensors", "config.json", "run.json"}
    record = json.loads((out / "run.json").read_text())
    there = ("--checkpoint", str(out))
    text = stdout(capsys, "eval", "dit", *data, *there)
    assert text == f"held-out L2 loss {record['loss']:.4f} on 36 images\n"
    png = tmp_path / "new" / "samples.png"
    text = stdout(capsys, "sample", "dit", *there, "--steps", "6", "--out", str(png))
    calls = "block 0: 12" if flags == ("--end-to-end",) else "block 0: 6, block 1: 6"
    assert f"calls of each block's layers: {calls}\n" in text
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "must hold a ViT, got a DiT" in mistake(capsys, "eval", "vit", *there)


def test_images_without_classes_are_not_judged(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((30, 1, 4, 4), dtype=np.float32))
    sizes = (*SMALL, "--batch-size", "8", "--samples", "4")
    train = ("train", "dit", "--data", str(tmp_path / "a.npy"), "--out", str(tmp_path / "out"))
    lines = stdout(capsys, *train, *sizes).splitlines()
    assert next(x for x in lines if x.startswith("Fréchet")).split()[-1] == "-"
    assert next(x for x in lines if x.startswith("layer evaluations ")).split()[-1] == "12"
    assert next(x for x in lines if x.startswith("Calls of each")).split()[-1] == "2/2/2"


def test_sample_draws_what_was_asked_for(tmp_path, capsys):
    folder, png = saved(tmp_path / "saved"), tmp_path / "a.png"
    sample = ("sample", "dit", "--checkpoint", str(folder), "--out", str(png), "--count", "2")
    sample = (*sample, "--overwrite")
    text = stdout(capsys, *sample, "--steps", "9", "--guidance-scale", "1", "--classes", "3", "1")
    assert "block 0: 3, block 1: 3, block 2: 3\n9 layer evaluations per image; wrote" in text
    first = png.read_bytes()
    stdout(capsys, *sample, "--steps", "9", "--guidance-scale", "1", "--classes", "3", "1")
    assert png.read_bytes() == first
    text = stdout(capsys, *sample, "--steps", "50", "--spacing", "karras", "--image-size", "8", "4")
    assert "block 0: 66, block 1: 8, block 2: 26\n" in text
    assert png.read_bytes() != first
    array = tmp_path / "a.npy"
    stdout(capsys, *sample, "--out", str(array), "--steps", "3", "--image-size", "8")
    assert np.load(array).shape[2:] == (8, 8)


def test_latents_are_written_as_numbers(tmp_path, capsys):
    folder = saved(tmp_path / "saved", channels=4)
    sample = ("sample", "dit", "--checkpoint", str(folder), "--count", "1", "--steps", "3")
    assert "use a .npy file" in mistake(capsys, *sample, "--out", str(tmp_path / "a.png"))
    stdout(capsys, *sample, "--classes", "1", "2", "--out", str(tmp_path / "a.npy"))
    array = np.load(tmp_path / "a.npy")
    assert array.shape[:2] == (2, 4)
    assert np.isfinite(array).all()


def test_a_model_without_classes(tmp_path, capsys):
    folder = saved(tmp_path / "saved", num_classes=0)
    sample = ("sample", "dit", "--checkpoint", str(folder), "--out", str(tmp_path / "a.png"))
    assert "\n3 layer evaluations" in stdout(capsys, *sample, "--steps", "3", "--count", "1")
    assert "a.png; use another name" in mistake(capsys, *sample)
    sample = (*sample, "--overwrite")
    assert "--classes needs a model with classes, got [3]" in mistake(
        capsys, *sample, "--classes", "3"
    )
    assert "guidance needs a model" in mistake(capsys, *sample, "--guidance-scale", "2")


def test_mistakes_are_one_line(tmp_path, capsys):
    folder = saved(tmp_path / "saved")
    sample = ("sample", "dit", "--checkpoint", str(folder), "--out", str(tmp_path / "a.png"))
    assert "--steps must be positive, got 0" in mistake(capsys, *sample, "--steps", "0")
    assert "--count must be positive, got 0" in mistake(capsys, *sample, "--count", "0")
    assert "labels must be in 0..3, got 7..7" in mistake(capsys, *sample, "--classes", "7")
    assert "multiples of patch_size=2" in mistake(capsys, *sample, "--image-size", "5", "4")
    assert "seed must be at least 0" in mistake(capsys, *sample, "--seed", "-1")
    jpg = ("--out", str(tmp_path / "a.jpg"))
    assert "--out must end in .png, .npz, .npy, got" in mistake(capsys, *sample, *jpg)
    assert not (tmp_path / "a.jpg").exists()
    assert "data must be digits, fashion-mnist" in mistake(
        capsys, "train", "dit", "--data", "mnist", "--out", str(tmp_path / "c")
    )


@pytest.mark.parametrize("verb", ["train", "eval", "sample"])
def test_help(capsys, verb):
    with pytest.raises(SystemExit) as exit_info:
        main((verb, "dit", "--help"))
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    words = {
        "train": ("learns to denoise", "--data", "--blocks", "held-out", "latents"),
        "eval": ("--checkpoint", "held-out images"),
        "sample": ("--classes", "--guidance-scale", "--steps", "PNG"),
    }
    assert all(word in text for word in words[verb])
