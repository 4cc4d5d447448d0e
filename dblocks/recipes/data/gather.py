"""Gathers images into one tensor: in memory, or for large sets in a memory-mapped file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dblocks.recipes.data.kept import kept, key_of, mapped
from dblocks.recipes.data.splits import from_bytes

IN_MEMORY = 2**28  # pixels of all pictures together, a GiB in float32
FORMAT = 1  # of the files


def gather(
    pictures: Callable[[], Iterator[Tensor]], count: int, files: Sequence[Path], **settings: Any
) -> Tensor:
    """All pictures: float32 [N, C, H, W] in [-1, 1], or uint8 [N, C, H, W] mapped from a file.

    Pictures that are many and large are decoded once, see `kept.kept`; `splits.values` makes
    numbers in [-1, 1] of either.

    Args:
        pictures: begins anew to read the pictures, uint8 [H, W, C] of one size.
        count: number of images.
        files: what they are read from, and with `settings` what makes them what they are.
        settings: JSON values.

    Raises:
        ValueError: there are more or fewer than `count`.
    """
    first = next(pictures())
    if count * first.numel() <= IN_MEMORY:
        return from_bytes(torch.stack(list(_counted(pictures(), count))))

    def make(file: Any) -> dict[str, Any]:
        for picture in _counted(pictures(), count):
            file.write(cast(Any, picture.permute(2, 0, 1).contiguous().numpy()))
        return {}

    path, _ = kept(key_of(files, format=FORMAT, **settings), make)
    H, W, C = first.shape
    return mapped(path, torch.uint8).view(count, C, H, W)


def _counted(pictures: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    found = 0
    for found, picture in enumerate(islice(pictures, count + 1), 1):  # noqa: B007
        yield picture
    if found != count:
        raise ValueError(f"there must be a picture for each of {count} labels, got {found}")
