import gzip
import json
import struct

import numpy as np
import pytest
from PIL import Image

from dblocks.__main__ import main
from dblocks.recipes.data import images

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--steps", "2", "--batch-size", "8")
SMALL += ("--width", "12", "--depth", "3", "--heads", "2", "--points", "1")


def stdout(capsys, *argv):
    assert main(argv) == 0
    return capsys.readouterr().out


def mistake(capsys, *argv):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def write_mnist(folder, side=28):
    generator = np.random.default_rng(0)
    for part, n in (("train", 40), ("t10k", 20)):
        pixels = generator.integers(0, 256, (n, side, side), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        for name, array in ((f"{part}-images", pixels), (f"{part}-labels", labels)):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            path = folder / f"{name}-idx{array.ndim}-ubyte.gz"
            path.write_bytes(gzip.compress(head + array.tobytes()))


def write_cifar(folder):
    rows = np.random.default_rng(0).integers(0, 256, (60, 3073), dtype=np.uint8)
    rows[:, 0] = np.arange(60) % 10
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, chunk in zip(names, np.split(rows, 6), strict=True):
        (folder / name).write_bytes(chunk.tobytes())


def write_pictures(folder):
    generator = np.random.default_rng(0)
    for i in range(40):
        size = (20 + i % 3, 24, 3)
        path = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(path)


def checked(capsys, out, data, *flags, held_out):
    """Trains, evaluates, and returns the sizes of the network."""
    table = stdout(capsys, "train", "vit", *data, *SMALL, *flags, "--out", str(out))
    assert "held-out accuracy" in table
    record = json.loads((out / "run.json").read_text())
    text = stdout(capsys, "eval", "vit", *data, "--checkpoint", str(out))
    assert f"held-out accuracy {100 * record['accuracy']:.1f} % on {held_out} images" in text
    sizes = ("image_size", "channels", "patch_size", "num_classes")
    return [record["model"][name] for name in sizes]


@pytest.mark.parametrize("flags", [("--blocks", "3"), ("--end-to-end",)])
def test_fashion_mnist_by_name(tmp_path, capsys, monkeypatch, flags):
    monkeypatch.setattr(images, "FASHION_MNIST", tmp_path)
    missing = mistake(capsys, "train", "vit", "--data", "fashion-mnist", "--out", f"{tmp_path}/v")
    assert "install Debian's package dataset-fashion-mnist" in missing
    write_mnist(tmp_path)
    data = ("--data", "fashion-mnist")
    sizes = checked(capsys, tmp_path / "vit", data, *flags, held_out=20)
    assert sizes == [28, 1, 7, 10]


def test_a_folder_of_cifar_files(tmp_path, capsys):
    write_cifar(tmp_path)
    sizes = checked(capsys, tmp_path / "vit", ("--data", str(tmp_path)), held_out=10)
    assert sizes == [32, 3, 4, 10]


def test_a_folder_of_ones_own(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_pictures(folder)
    data, out = ("--data", str(folder)), tmp_path / "vit"
    assert "give a size" in mistake(capsys, "train", "vit", *data, *SMALL, "--out", str(out))
    data = (*data, "--image-size", "16")
    assert checked(capsys, out, data, "--patch-size", "8", held_out=12) == [16, 3, 8, 2]
    there = ("eval", "vit", "--checkpoint", str(out))
    other = mistake(capsys, *there, "--data", str(folder), "--image-size", "8")
    assert "images must have shape [N, C, H, W] = [N, 3, 16, 16]" in other
    (folder / "eel").mkdir()
    for i in range(10):
        Image.new("RGB", (16, 16)).save(folder / "eel" / f"{i}.png")
    assert "among the network's 2 classes, got 2" in mistake(capsys, *there, *data)
