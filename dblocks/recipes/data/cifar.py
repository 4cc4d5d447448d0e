"""CIFAR-10 and CIFAR-100 in their authors' formats: the binary version and the Python version.

The Python version, which torchvision stores, consists of pickles. They are read without executing
their content; see `pickles.read_pickle`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dblocks.recipes.data.byte_images import ByteImages, content_of
from dblocks.recipes.data.pickles import bytes_of, integers_of, read_pickle

SHAPE = (3, 32, 32)
PIXELS = math.prod(SHAPE)


class _Version(NamedTuple):
    """The files of one version of CIFAR-10 or CIFAR-100."""

    name: str
    num_classes: int
    training: tuple[str, ...]
    test: str
    meta: str
    """A further file that identifies such a folder; if empty, any of the others does."""
    label_bytes: int = 0
    """In the binary version, label bytes before each image; the last one is the class. 0 for
    Python."""
    labels: str = ""
    """In the Python version, the key of the labels."""


VERSIONS = (
    _Version(
        "CIFAR-10", 10, tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", "", 1
    ),
    _Version("CIFAR-100", 100, ("train.bin",), "test.bin", "", 2),
    _Version(
        "CIFAR-10", 10, tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "",
        labels="labels",
    ),
    # The names of these files alone do not identify CIFAR-100.
    _Version("CIFAR-100", 100, ("train",), "test", "meta", labels="fine_labels"),
)  # fmt: skip


def read_cifar(folder: Path) -> tuple[ByteImages, ByteImages] | None:
    """The training and test images of a folder of CIFAR files; None for other folders.

    CIFAR-100 uses the fine classes.

    Raises:
        ValueError: some of the files are missing, or one is damaged.
    """
    for version in VERSIONS:
        known = (version.meta,) if version.meta else (*version.training, version.test)
        if any((folder / name).is_file() for name in known):
            read = _read_binary if version.label_bytes else _read_python
            parts = (version.training, (version.test,))
            training, test = (
                _joined([_checked(read(folder / name, version), folder / name, version)
                         for name in names])
                for names in parts
            )  # fmt: skip
            return training, test
    return None


def _read_binary(path: Path, version: _Version) -> ByteImages:
    content, size = content_of(path), version.label_bytes + PIXELS
    if not content or len(content) % size:
        raise ValueError(
            f"{path} must hold images of {size} bytes each, as in the binary version of "
            f"{version.name}, got {len(content)} bytes; it may be cut off"
        )
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, size)
    return ByteImages(_pixels(rows[:, version.label_bytes :]), rows[:, version.label_bytes - 1])


def _read_python(path: Path, version: _Version) -> ByteImages:
    found = read_pickle(path)
    for name in ("data", version.labels):
        if name not in found:
            raise ValueError(f"{path} must hold {name!r}, got {sorted(map(str, found))}")
    pixels = bytes_of(found["data"], f"'data' of {path}")
    labels = integers_of(found[version.labels], f"{version.labels!r} of {path}")
    if pixels.shape != (len(labels), PIXELS):
        raise ValueError(
            f"{path} must hold an image of {PIXELS} bytes for each of {len(labels)} labels, "
            f"got {list(pixels.shape)}"
        )
    if max(map(abs, labels)) >= 2**31:  # more than an int64 holds
        raise ValueError(f"{path} must hold labels below {version.num_classes}, got more")
    return ByteImages(_pixels(pixels), torch.tensor(labels))


def _checked(found: ByteImages, path: Path, version: _Version) -> ByteImages:
    low, high = (int(value) for value in found.labels.aminmax())
    if low < 0 or high >= version.num_classes:
        raise ValueError(
            f"{path} must hold labels below {version.num_classes}, got "
            f"{high if low >= 0 else low}; it may be damaged"
        )
    return ByteImages(found.pixels, found.labels.byte())


def _joined(parts: list[ByteImages]) -> ByteImages:
    pixels, labels = zip(*parts, strict=True)
    return ByteImages(torch.cat(pixels), torch.cat(labels))


def _pixels(rows: Tensor) -> Tensor:
    return rows.reshape(-1, *SHAPE).permute(0, 2, 3, 1)
