import gzip
import struct

import pytest
import torch

from dblocks.recipes.data import images as image_data
from dblocks.recipes.data.image_files import from_bytes
from dblocks.recipes.data.images import load_images
from tools import seeded

FILES = ("train-images", "train-labels", "t10k-images", "t10k-labels")


def some_bytes(*shape, below=256, seed=0):
    return torch.randint(below, shape, generator=seeded(seed), dtype=torch.uint8)


def packed(array, *, kind=8):
    """The contents of an IDX file."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes((0, 0, kind, array.ndim)) + sizes + array.numpy().tobytes()


def write_idx(folder, prefix, pixels, labels, *, dot="-", gz=""):
    folder.mkdir(exist_ok=True)
    pack = gzip.compress if gz else bytes
    (folder / f"{prefix}-images{dot}idx3-ubyte{gz}").write_bytes(pack(packed(pixels)))
    (folder / f"{prefix}-labels{dot}idx1-ubyte{gz}").write_bytes(pack(packed(labels)))


def mnist(folder, *, shape=(5, 4), **names):
    """A folder of 40 training and 20 test images, and both as (pixels, labels)."""
    parts = []
    for prefix, n in (("train", 40), ("t10k", 20)):
        parts.append((some_bytes(n, *shape, seed=n), (torch.arange(n) % 10).byte()))
        write_idx(folder, prefix, *parts[-1], **names)
    return parts


def same(images, part):
    pixels, labels = part
    assert images.images.dtype == torch.float32
    assert torch.equal(images.images, from_bytes(pixels))
    assert torch.equal(images.labels, labels.long())


# IDX


@pytest.mark.parametrize("names", [{}, {"gz": ".gz"}, {"dot": "."}])
def test_a_folder_of_idx_files_holds_out_its_test_images(tmp_path, names):
    parts = mnist(tmp_path, **names)
    training, held_out = load_images(str(tmp_path))
    same(training, parts[0])
    same(held_out, parts[1])
    assert training.images.shape == (40, 1, 5, 4)
    fit, validation = load_images(str(tmp_path), "selection")
    assert (len(fit), len(validation)) == (32, 8)
    both = torch.cat([fit.images, validation.images])
    assert {x.sum().item() for x in both} == {x.sum().item() for x in training.images}


def test_fashion_mnist_is_read_where_debian_puts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(image_data, "FASHION_MNIST", tmp_path / "debian")
    with pytest.raises(
        ValueError, match=r"debian, and is not there; install .* dataset-fashion-mnist,"
    ):
        load_images("fashion-mnist")
    parts = mnist(tmp_path / "debian", shape=(28, 28), gz=".gz")
    for images, part in zip(load_images("fashion-mnist"), parts, strict=True):
        same(images, part)


def test_a_single_idx_file_is_split(tmp_path):
    part = some_bytes(30, 3, 3), (torch.arange(30) % 3).byte()
    write_idx(tmp_path, "letters-train", *part, gz=".gz")
    training, held_out = load_images(str(tmp_path / "letters-train-images-idx3-ubyte.gz"))
    assert (len(training), len(held_out)) == (21, 9)
    assert sorted(torch.cat([training.labels, held_out.labels]).tolist()) == sorted(part[1])
    with pytest.raises(ValueError, match=r"none-images-idx3-ubyte needs none-labels-idx1-ubyt"):
        load_images(str(tmp_path / "none-images-idx3-ubyte"))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_idx_file_is_named(tmp_path, name):
    mnist(tmp_path)
    next(tmp_path.glob(f"{name}-*")).unlink()
    with pytest.raises(ValueError, match=rf"must hold {name}-idx\d-ubyte\[.gz\] in addition"):
        load_images(str(tmp_path))


GOOD = packed(some_bytes(4, 2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with 00 00 08 03, got no bytes"),
        (b"\0\0", "got 00 00$"),
        (GOOD[:10], "begins with 00 00 08 03"),
        (packed(some_bytes(4)), "in 3 dimensions, which begins with 00 00 08 03, got 00 00 08 01"),
        (packed(some_bytes(4, 2, 3), kind=13), "got 00 00 0d 03"),
        (gzip.compress(GOOD), "got 1f 8b"),
        (GOOD[:-1], r"as its shape \[4, 2, 3\] says, 24, and at least one, got 23"),
        (GOOD + b"x", r"says, 24, and at least one, got 25; it may be cut off or damaged"),
        (GOOD[:4] + b"\xff" * 12 + GOOD[16:], r"4294967295\] says, .* got 24"),
        (packed(some_bytes(0, 2, 3)), r"\[0, 2, 3\] says, 0, and at least one, got 0"),
    ],
    ids=[
        "empty",
        "two bytes",
        "no sizes",
        "labels",
        "floats",
        "gzip",
        "cut off",
        "longer",
        "sizes",
        "no images",
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, content, message):
    mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte must .*{message}"):
        load_images(str(tmp_path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"no gzip",
        lambda content: content[:-9],
        lambda content: content[:12] + b"\xff" * 20 + content[32:],
        lambda content: content[:-8] + bytes(8),
    ],
    ids=["other", "cut off", "middle", "checksum"],
)
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    mnist(tmp_path, gz=".gz")
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz cannot be read: "):
        load_images(str(tmp_path))


def test_there_is_a_label_for_each_image(tmp_path):
    mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(packed(some_bytes(39)))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte must .* got 39 for 40"):
        load_images(str(tmp_path))


def test_size_and_scale_are_not_for_files_of_bytes(tmp_path):
    mnist(tmp_path)
    with pytest.raises(ValueError, match=r"size is for image files, got 4 with .* leave it"):
        load_images(str(tmp_path), size=4)
    with pytest.raises(ValueError, match=r"scale is for arrays and latents, got 2\.0"):
        load_images(str(tmp_path), scale=2.0)
