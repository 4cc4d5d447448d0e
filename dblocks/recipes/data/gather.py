"""Gathers images into one tensor: in memory or, for large sets, in a memory-mapped file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dblocks.recipes.data.cache import cached, key_of, mapped
from dblocks.recipes.data.splits import from_bytes

IN_MEMORY = 2**28  # total number of pixel values kept in memory, 1 GiB in float32
FORMAT = 1  # version of the cache files


def gather(
    pictures: Callable[[], Iterator[Tensor]], count: int, files: Sequence[Path], **settings: Any
) -> Tensor:
    """All images: float32 [N, C, H, W] in [-1, 1], or uint8 [N, C, H, W] mapped from a file.

    Large sets are decoded once and cached, see `cache.cached`; `splits.values` converts both to
    float32 in [-1, 1].

    Args:
        pictures: returns a new iterator over the images, uint8 [H, W, C] of one size.
        count: number of images.
        files: the files they are read from, a part of the cache key.
        settings: JSON values, the other part of the cache key.

    Raises:
        ValueError: the number of images is not `count`.
    """
    first = next(pictures())
    if count * first.numel() <= IN_MEMORY:
        return from_bytes(torch.stack(list(_counted(pictures(), count))))

    def make(file: Any) -> dict[str, Any]:
        for picture in _counted(pictures(), count):
            file.write(cast(Any, picture.permute(2, 0, 1).contiguous().numpy()))
        return {}

    path, _ = cached(key_of(files, format=FORMAT, **settings), make)
    H, W, C = first.shape
    return mapped(path, torch.uint8).view(count, C, H, W)


def _counted(pictures: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    found = 0
    for found, picture in enumerate(islice(pictures, count + 1), 1):  # noqa: B007
        yield picture
    if found != count:
        raise ValueError(f"there must be an image for each of {count} labels, got {found}")
