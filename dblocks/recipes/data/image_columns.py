"""Images of Hugging Face data sets on disk: a column of encoded images, and one of classes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dblocks.recipes.data import columnar
from dblocks.recipes.data.gather import gather
from dblocks.recipes.data.pictures import Size, read_picture
from dblocks.recipes.data.splits import Images

IMAGE = ("image", "img")
LABEL = ("label", "fine_label", "labels")
UNLABELLED = -1  # the class of test images whose labels are not published


def read_image_columns(
    folder: Path, size: Size | None, channels: int
) -> tuple[Images, Images | None] | None:
    """Training images, and those of the data set's own test part; None if there are no such files.

    Parts are those of `columnar.in_parts`; a part without labels (-1) is not used as the test part.

    Args:
        folder: folder of *.parquet or *.arrow files with a column "image" or "img" (Hugging Face's
            struct of bytes and path, or bytes) and a column "label", "fine_label" or "labels".
        size: see `image_files.image_folder`.
        channels: 3 or 1.

    Raises:
        ValueError: a column is missing or has another type, or a file is damaged.
        ImportError: pyarrow or Pillow is not installed.
    """
    if not (files := columnar.column_files(folder)):
        return None
    training, others = columnar.in_parts(files, folder)
    found = _read(training, size, channels)
    if found is None:
        raise ValueError(f"{training[0]} must hold a class for each image, got only {UNLABELLED}")
    held_out = (_read(part, size, channels) for part in others)
    return found, next((part for part in held_out if part is not None), None)


def _read(files: Sequence[Path], size: Size | None, channels: int) -> Images | None:
    columns = columnar.columns_of(files[0])
    image, label = (_one_of(names, columns, files[0]) for names in (IMAGE, LABEL))
    labels = list(columnar.read_column(files, label))
    if not labels:
        raise ValueError(f"{files[0]} must hold rows, got none")
    columnar.check_rows(files, len(labels))
    if not all(type(number) is int for number in labels):
        raise ValueError(f"the column {label!r} of {files[0]} must be integers, without gaps")
    if set(labels) == {UNLABELLED}:
        return None
    if min(labels) < 0:
        raise ValueError(f"labels of {files[0]} must not be negative, got {min(labels)}")

    def pictures() -> Iterator[Tensor]:
        first = None
        for row, value in enumerate(columnar.read_column(files, image)):
            name = f"row {row} of {image!r} in {files[0].parent}"
            picture = read_picture(name, channels, size, file=io.BytesIO(_content(value, name)))
            first = picture.shape if first is None else first
            if picture.shape != first:
                raise ValueError(
                    f"images of {files[0].parent} must have one size, got {list(first[:2])} and "
                    f"for {name} {list(picture.shape[:2])}; give a size to resize and crop them to"
                )
            yield picture

    images = gather(pictures, len(labels), files, image=image, size=size, channels=channels)
    return Images(images, torch.tensor(labels))


def _one_of(names: Sequence[str], columns: dict[str, Any], path: Path) -> str:
    found = [name for name in names if name in columns]
    if not found:
        raise ValueError(f"{path} must have a column {' or '.join(names)}, got {sorted(columns)}")
    return found[0]


def _content(value: Any, name: str) -> bytes:
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise ValueError(
            f"{name} must hold the bytes of a picture, got "
            f"{'a path only' if isinstance(value, dict) else type(value).__name__}; "
            "embed the pictures in the data set"
        )
    return content
