"""IDX files, MNIST's format of images and labels."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

IDX_IMAGES = re.compile(r"(.+)-images[-.]idx3-ubyte(\.gz)?")
IDX_PARTS = ("train", "t10k")  # names of the two parts of MNIST and its successors
UNSIGNED_BYTE = 8  # third byte of an IDX file: the type of its elements


class ByteImages(NamedTuple):
    """Images and labels as stored in a file."""

    pixels: Tensor
    """uint8 [N, H, W] or [N, H, W, C]."""
    labels: Tensor
    """uint8 [N]."""


def is_idx(path: Path) -> bool:
    """Whether a file has the name of an IDX file of images, NAME-images-idx3-ubyte[.gz]."""
    return IDX_IMAGES.fullmatch(path.name) is not None


def read_idx(path: Path) -> ByteImages:
    """The images of an IDX file, and their labels from the file next to it.

    Raises:
        ValueError: a file is missing or not an IDX file, or there is not one label per image.
    """
    name = IDX_IMAGES.fullmatch(path.name)
    if name is None:
        raise ValueError(f"{path} must be named NAME-images-idx3-ubyte, with or without .gz")
    labels = _find(path.parent, name[1], "labels")
    if labels is None:
        raise ValueError(f"{path} needs {name[1]}-labels-idx1-ubyte[.gz] in the same folder")
    return _read_pair(path, labels)


def read_parts(folder: Path) -> tuple[ByteImages, ByteImages] | None:
    """The training and test images of a folder of IDX files; None for other folders.

    The files are train-images-idx3-ubyte, train-labels-idx1-ubyte and the same with t10k, plain or
    compressed as .gz (a plain file is preferred).

    Raises:
        ValueError: some of the files are missing, or one cannot be read.
    """
    found = [_find(folder, part, kind) for part in IDX_PARTS for kind in ("images", "labels")]
    if any(found):
        training, test = (_read_part(folder, part) for part in IDX_PARTS)
        return training, test
    return None


def _find(folder: Path, part: str, kind: str) -> Path | None:
    """The IDX file of "images" or "labels", by one of its usual names."""
    rank = {"images": 3, "labels": 1}[kind]
    names = (f"{part}-{kind}{dot}idx{rank}-ubyte{gz}" for gz in ("", ".gz") for dot in "-.")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_part(folder: Path, part: str) -> ByteImages:
    images, labels = _find(folder, part, "images"), _find(folder, part, "labels")
    if images is None or labels is None:
        missing = "images-idx3" if images is None else "labels-idx1"
        raise ValueError(
            f"{folder} must hold {part}-{missing}-ubyte[.gz] in addition to its other IDX "
            "files; add it, or give the path of one file of images, which is then split"
        )
    return _read_pair(images, labels)


def _read_pair(images: Path, labels: Path) -> ByteImages:
    found = ByteImages(_idx(images, 3), _idx(labels, 1))
    if len(found.pixels) != len(found.labels):
        raise ValueError(
            f"{labels} must hold a label for each image of {images.name}, "
            f"got {len(found.labels)} for {len(found.pixels)}"
        )
    return found


def _idx(path: Path, rank: int) -> Tensor:
    """The array of an IDX file: 0, 0, the type, the rank, the sizes as big-endian int32, values."""
    content = content_of(path)
    magic, values = bytes((0, 0, UNSIGNED_BYTE, rank)), 4 * (1 + rank)
    if content[:4] != magic or len(content) < values:
        raise ValueError(
            f"{path} must be an IDX file of bytes in {rank} dimensions, which begins with "
            f"{magic.hex(' ')}, got {content[:4].hex(' ') or 'no bytes'}"
        )
    shape = struct.unpack(f">{rank}I", content[4:values])
    expected, got = math.prod(shape), len(content) - values
    if got != expected or not expected:
        raise ValueError(
            f"{path} must hold as many bytes as its shape {list(shape)} says, {expected}, and at "
            f"least one, got {got}; it may be cut off or damaged"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=values).view(shape)


def content_of(path: Path) -> bytes:
    """The bytes of a file, decompressed if it ends in .gz; ValueError if it cannot be read."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
