"""`dblocks train NETWORK --recipe paper`: its flags, what it refuses, and three steps of each."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from benchmarks.models.paper import run
from dblocks.__main__ import main
from dblocks.recipes import dit
from dblocks.recipes.command import Recipe
from dblocks.recipes.metrics.judge import train_judge
from dblocks.recipes.paper import EXPERIMENTS
from dblocks.recipes.paper.report import changed

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = ("--steps", "3", "--points", "1", "--device", "cpu", "--no-bf16")
NARROW = ("--width", "24", "--heads", "2", "--depth", "4")
TEXT = ("--batch-size", "2", "--context", "20", "--windows", "2", *NARROW)
WORDS = " ".join(f"word{i}" for i in range(4000))


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path_factory):
    """A judge of two steps, and a cache of tokens that is not kept."""
    monkeypatch.setattr(dit, "judge_of", functools.partial(train_judge, steps=2))
    monkeypatch.setenv("DBLOCKS_CACHE", str(tmp_path_factory.mktemp("cache")))


def mistake(capsys, *argv):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def trained(capsys, out, network, data, *flags):
    argv = ("train", network, "--recipe", "paper", "--data", data, *STEPS, *flags)
    assert main([*argv, "--out", str(out)]) == 0
    return json.loads((out / "run.json").read_text()), " ".join(capsys.readouterr().out.split())


def write_cifar100(folder):
    rows = np.random.default_rng(0).integers(0, 256, (104, 3074), dtype=np.uint8)
    rows[:, 0], rows[:, 1] = 0, np.arange(104) % 100
    (folder / "train.bin").write_bytes(rows[:100].tobytes())
    (folder / "test.bin").write_bytes(rows[100:].tobytes())


def write_cifar10(folder):
    rows = np.random.default_rng(0).integers(0, 256, (60, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(60) % 10
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, chunk in zip(names, np.split(rows, 6), strict=True):
        (folder / name).write_bytes(chunk.tobytes())


def write_latents(folder):
    generator = np.random.default_rng(0)
    for i in range(2):
        latents = generator.normal(size=(20, 4, 8, 8)).astype(np.float32)
        np.savez(folder / f"shard-{i}.npz", latents=latents, labels=np.arange(20) % 4)


def write_tiny_imagenet(folder):
    Image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    lines = []
    for c in range(3):
        name = f"n0000000{c}"
        images = folder / "train" / name / "images"
        images.mkdir(parents=True)
        (folder / "val" / "images").mkdir(parents=True, exist_ok=True)
        for i in range(6):
            pixels = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{name}_{i}.JPEG")
        Image.fromarray(pixels).save(folder / "val" / "images" / f"val_{c}.JPEG")
        lines.append(f"val_{c}.JPEG\t{name}\t0\t0\t62\t62\n")
    (folder / "wnids.txt").write_text("".join(f"n0000000{c}\n" for c in range(3)))
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))


def write_lm1b(folder):
    training = folder / "training-monolingual.tokenized.shuffled"
    held_out = folder / "heldout-monolingual.tokenized.shuffled"
    for place, name in ((training, "news.en-00001-of-00100"), (held_out, "news.en.heldout-00000")):
        place.mkdir()
        (place / name).write_text(WORDS)
    (folder / "tokenizer.json").write_text(json.dumps({"characters": "word 0123456789"}))


@pytest.mark.parametrize(("network", "data"), [(e.network, e.data) for found in
    EXPERIMENTS.values() for e in found])  # fmt: skip
def test_the_defaults_are_the_experiment_and_flags_count_before_them(monkeypatch, network, data):
    given = []
    monkeypatch.setattr(Recipe, "train", lambda _, run, out, **more: given.append((run, more)))
    argv = ("train", network, "--recipe", "paper", "--data", data, "--steps", "3")
    assert main(argv) == 0
    (made, more) = given[0]
    assert (made.data, made.steps, more["kind"]) == (data, 3, "paper")
    experiment = next(e for e in EXPERIMENTS[network] if e.data == data)
    expected = experiment.settings() | {"steps": 3}
    assert {name: getattr(made, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("vit",),
            "trains on cifar-100, whose files must be given with --data-path: the folder of",
        ),
        (("dit", "--data", "imagenet-latents"), "--data-path: a folder of .npz or .safetensors"),
        (("masked-lm",), "--data-path: the file text8 of 100,000,000 characters"),
        (("causal-lm", "--data-path", "."), "Llama-2's, of 32,000 tokens; give its tokenizer.json"),
        (("recurrent",), "trains on lm1b, whose files must be given with --data-path"),
        (("vit", "--data", "digits"), "--data must be cifar-100 or tiny-imagenet with --recipe"),
        (("vit", "--published"), "--recipe paper already is as published"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_without_data_the_error_names_them_and_their_format(capsys, flags, message):
    assert message in mistake(capsys, "train", *flags, "--recipe", "paper")


def test_vit_on_cifar_100_at_full_width(tmp_path, capsys):
    write_cifar100(tmp_path)
    record, said = trained(
        capsys, tmp_path / "run", "vit", "cifar-100", "--data-path", str(tmp_path),
        "--batch-size", "4",
    )  # fmt: skip
    sizes = record["model"]
    assert (sizes["width"], sizes["depth"], sizes["num_classes"]) == (128, 12, 100)
    here = 100 * record["accuracy_from_noise"]["4"]
    assert f"here 3 blocks {here:.2f}" in said
    assert "published DiffusionBlocks 59.30" in said
    assert "published end to end 60.25" in said
    assert "Settings that differ from the paper's: " in said
    assert "batch_size 4 (128)" in said
    assert "steps 3 (585000)" in said


def test_vit_on_tiny_imagenet(tmp_path, capsys):
    write_tiny_imagenet(tmp_path)
    record, said = trained(
        capsys, tmp_path / "run", "vit", "tiny-imagenet", "--data-path", str(tmp_path),
        "--batch-size", "4", *NARROW,
    )  # fmt: skip
    assert (record["model"]["image_size"], record["model"]["patch_size"]) == (64, 4)
    assert "36.16" in said
    given = {name: record["run"][name] for name in ("crop", "flip", "rand_augment", "dropout")}
    assert given == {"crop": "resize", "flip": True, "rand_augment": True, "dropout": 0.1}


def test_dit_on_cifar_10(tmp_path, capsys):
    write_cifar10(tmp_path)
    record, said = trained(
        capsys, tmp_path / "run", "dit", "cifar-10", "--data-path", str(tmp_path),
        "--batch-size", "2", "--samples", "2", "--sampling-steps", "3",
    )  # fmt: skip
    assert (record["model"]["width"], record["sigma_data"]) == (384, 0.5)
    assert (record["run"]["ema"], record["run"]["flip"]) == (0.9999, True)
    assert "published DiffusionBlocks 30.59 / 37.20" in said
    assert "not measured here" in said
    assert "clean-fid" in said


def test_dit_on_latents(tmp_path, capsys):
    write_latents(tmp_path)
    record, said = trained(
        capsys, tmp_path / "run", "dit", "imagenet-latents", "--data-path", str(tmp_path),
        "--ema", "None",
        "--batch-size", "2", "--samples", "2", "--sampling-steps", "3", *NARROW,
    )  # fmt: skip
    assert (record["model"]["channels"], record["model"]["num_classes"]) == (4, 4)
    assert record["run"]["scale"] == pytest.approx(0.091075)
    assert "ema" not in record["run"]
    assert "9.00 / 10.63" in said
    assert "ema None (0.9999)" in said
    assert "--out samples.npz --count 50 --vae FOLDER" in said


def test_masked_lm_on_text8(tmp_path, capsys):
    (tmp_path / "text8").write_text("the quick brown fox jumps over a lazy dog " * 200)
    path = ("--data-path", str(tmp_path / "text8"))
    record, said = trained(capsys, tmp_path / "run", "masked-lm", "text8", *path, *TEXT)
    assert f"{record['bits']:.2f}" in said
    assert "published DiffusionBlocks 1.45" in said


@pytest.mark.parametrize(
    ("network", "data", "row"),
    [
        ("causal-lm", "lm1b", "0.71 / 12.32 / 30.99"),
        ("causal-lm", "openwebtext", "0.82 / 14.99 / 26.33"),
        ("recurrent", "lm1b", "0.70 / 16.08 / 42.43"),
    ],
)
def test_language_models(tmp_path, capsys, network, data, row):
    write_lm1b(tmp_path)
    flags = ("--tokenizer", str(tmp_path / "tokenizer.json"), *TEXT)
    if network == "recurrent":
        flags += ("--prelude", "1", "--coda", "1")
    folder = tmp_path
    if data == "openwebtext":
        folder = tmp_path / "owt"
        folder.mkdir()
        (folder / "a.txt").write_text(WORDS)
    record, said = trained(
        capsys, tmp_path / "run", network, data, "--data-path", str(folder), *flags
    )
    assert record["run"]["blocks"] == (1 if network == "recurrent" else 4)
    assert record["blocks"]["overlap"] == 0.1
    assert row in said
    assert "MAUVE" in said


def test_what_is_changed_is_named():
    made = run(EXPERIMENTS["vit"][0])
    other = dataclasses.replace(made, lr=1e-3, device="cpu", seed=4)
    assert changed(other, made) == ["lr 0.001 (0.0005)"]


def test_a_plan_of_an_experiment(capsys):
    argv = ("plan", "vit", "--recipe", "paper", "--data", "tiny-imagenet", "--depth", "2")
    assert main([*argv, "--width", "48", "--batch-size", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "vit, 2 layers, batches of 2 of images of 3 x 64 x 64; one device of 131.32 GiB" in said
    assert "10,000,000 images in 2 blocks: " in said
    assert "hours (modelled)" in said
    error = mistake(capsys, "plan", "vit", "--recipe", "paper", "--data", "digits")
    assert "--data must be cifar-100 or tiny-imagenet" in error


def test_a_constant_rate_after_the_warm_up_and_records_without_new_fields():
    made = dataclasses.replace(run(EXPERIMENTS["vit"][1]), steps=100, warmup=0.1)
    assert [made.lr_at(step) for step in (0, 9, 10, 99)] == pytest.approx([1e-5, *[1e-4] * 3])
    assert made.to_dict()["decay"] == "constant"
    cosine = dataclasses.replace(made, decay="cosine")
    assert "decay" not in cosine.to_dict()
    assert "block" not in cosine.to_dict()
    assert type(made).from_dict(made.to_dict()) == made
