"""`dblocks sample dit` into the arrays that programs for FID read."""

import json

import numpy as np
import pytest
import torch

from dblocks.__main__ import main
from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import save_model
from dblocks.models import DiT, DiTConfig
from dblocks.recipes.image_grid import to_bytes
from tools import randomized

SIZES = {"image_size": 4, "width": 8, "depth": 3, "heads": 2}
pytestmark = pytest.mark.usefixtures("one_thread")


def saved(folder, *, scale=1.0, **options):
    torch.manual_seed(0)
    model = DiffusionBlocks(randomized(DiT(DiTConfig(**{**SIZES, **options}))), BlocksConfig(3))
    save_model(folder, model, texts={"run.json": json.dumps({"run": {"scale": scale}})})
    return folder


def sample(folder, out, *flags):
    argv = ("sample", "dit", "--checkpoint", str(folder), "--steps", "3", "--out", str(out))
    return main([*argv, *flags])


@pytest.mark.parametrize("channels", [1, 3])
def test_all_classes_as_bytes_and_as_numbers(tmp_path, channels):
    folder = saved(tmp_path / "dit", channels=channels, num_classes=12)
    flags = ("--count", "2", "--batch-size", "7")
    assert sample(folder, tmp_path / "a.npz", *flags) == 0
    every = ("--classes", *map(str, range(12)))
    assert sample(folder, tmp_path / "a.npy", *flags, *every) == 0
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        pixels, labels = found["arr_0"], found["arr_1"]
    assert (pixels.dtype, pixels.shape) == (np.uint8, (24, 4, 4, 3))
    assert labels.tolist() == [c for c in range(12) for _ in range(2)]
    expected = to_bytes(torch.from_numpy(np.load(tmp_path / "a.npy"))).expand(24, 4, 4, 3)
    assert np.array_equal(pixels, expected.numpy())


def test_a_model_without_classes(tmp_path):
    folder = saved(tmp_path / "dit", channels=3, num_classes=0)
    assert sample(folder, tmp_path / "a.npz", "--count", "1", "--bf16") == 0
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        assert found["arr_0"].shape == (10, 4, 4, 3)
        assert found.files == ["arr_0"]


def test_latents_become_images_by_their_autoencoder(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    folder = saved(tmp_path / "dit", scale=0.25, channels=4, num_classes=2)
    assert sample(folder, tmp_path / "a.npz", "--vae", str(tmp_path / "vae")) == 0
    assert sample(folder, tmp_path / "a.npy") == 0
    latents = torch.from_numpy(np.load(tmp_path / "a.npy"))
    with torch.no_grad():
        expected = to_bytes(vae.decode(latents / 0.25).sample)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as found:
        assert found["arr_0"].shape == (10, 8, 8, 3)
        assert np.abs(found["arr_0"].astype(int) - expected.numpy()).max() <= 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "or decode latents with --vae"),
        (("--vae", "nowhere"), "--vae must be a folder of an AutoencoderKL, got nowhere"),
        (("--batch-size", "0"), "--batch-size must be positive, got 0"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, capsys, flags, words):
    folder = saved(tmp_path / "dit", channels=4, num_classes=2)
    assert sample(folder, tmp_path / "a.npz", *flags) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize("name", ["x.NPZ", "x.jpg", "x"])
def test_a_picture_has_no_name_of_another_kind_of_file(tmp_path, capsys, name):
    assert main(["sample", "dit", "--out", str(tmp_path / name)]) == 2
    assert "--out must end in .png, .npz, .npy, got" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
