"""Patches of images: their fixed position embeddings, and images from patches."""

from __future__ import annotations

import torch
from torch import Tensor

from dblocks.nn.conditioning import MAX_PERIOD


def sincos_positions(
    grid: tuple[int, int],
    dim: int,
    *,
    native: tuple[int, int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Position embeddings of the patches of an image, row by row: sines and cosines of x and y.

        [sin(x w) | cos(x w) | sin(y w) | cos(y w)],   w_k = 10000^(-4k/dim),  k = 0 .. dim/4 - 1

    x counts columns and y rows of the native grid. A patch of another grid has the coordinate of
    its centre when the image is stretched over the native one: `(i + 1/2)*native/grid - 1/2`.

    Args:
        grid: rows and columns of patches.
        dim: width D, a multiple of 4.
        native: rows and columns at which coordinates are 0, 1, 2 and so on.
        device: of the result.

    Returns:
        float32 [rows*columns, D]; arithmetic is float64.

    Source: Peebles and Xie 2023 (DiT), after He et al. 2022 (MAE).
    """
    y, x = (
        (torch.arange(n, dtype=torch.float64, device=device) + 0.5) * (whole / n) - 0.5
        for n, whole in zip(grid, native, strict=True)
    )
    k = torch.arange(dim // 4, dtype=torch.float64, device=device)
    frequencies = MAX_PERIOD ** (-4 * k / dim)

    def waves(coordinate: Tensor) -> Tensor:
        angle = coordinate[:, None] * frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    columns = waves(x)[None].expand(grid[0], -1, -1)
    rows = waves(y)[:, None].expand(-1, grid[1], -1)
    return torch.cat([columns, rows], dim=-1).flatten(0, 1).float()


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The image from tokens that each hold the pixels of a patch, ordered by row, column, channel.

    Args:
        tokens: [N, rows*columns, patch_size^2*C], row by row of the image.
        grid: rows and columns of patches.
        patch_size: side of a patch.

    Returns:
        [N, C, rows*patch_size, columns*patch_size].
    """
    N, _, size = tokens.shape
    rows, columns = grid
    channels = size // patch_size**2
    pixels = tokens.view(N, rows, columns, patch_size, patch_size, channels)
    pixels = torch.einsum("nhwpqc->nchpwq", pixels)
    return pixels.reshape(N, channels, rows * patch_size, columns * patch_size)
