"""Generated images in records and figures.

matplotlib is imported when a figure is made.
"""

from __future__ import annotations

import base64
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#333333"
TEXT_SIZE = 12  # points; a README shows figures at about half their size
SHOWN_CHANNELS = (1, 3)  # grey or RGB; latents cannot be shown
PANEL_INCHES = 2.2
DPI_LIMIT = 400


def to_bytes(images: Tensor) -> Tensor:
    """Images [N, C, H, W] in [-1, 1], clamped, as uint8 [N, H, W, C]."""
    if images.ndim != 4 or images.shape[1] not in SHOWN_CHANNELS:
        raise ValueError(
            f"images must have shape [N, C, H, W] with C in {SHOWN_CHANNELS}, "
            f"got {list(images.shape)}; latents must be decoded first"
        )
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round()
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def encode(images: Tensor) -> dict[str, Any]:
    """Images [N, C, H, W] in [-1, 1] as JSON values: 8 bits per value, in base64."""
    pixels = to_bytes(images)
    data = base64.b64encode(bytes(pixels.flatten().tolist())).decode()
    return {"shape": list(pixels.shape), "uint8": data}


def decode(written: Mapping[str, Any]) -> Tensor:
    """The uint8 [N, H, W, C] that `encode` wrote."""
    data = bytearray(base64.b64decode(written["uint8"]))
    return torch.frombuffer(data, dtype=torch.uint8).view(written["shape"])


def tiled(pixels: Tensor, columns: int) -> Tensor:
    """A grid of images uint8 [N, H, W, C], row by row, separated by light lines.

    Args:
        pixels: the images; the last row may be shorter.
        columns: images per row.

    Returns:
        uint8 [rows*(H + 1) - 1, columns*(W + 1) - 1, C].
    """
    N, H, W, C = pixels.shape
    if columns < 1 or N < 1:
        raise ValueError(f"a grid needs images and columns, got {N} and {columns}")
    rows = -(-N // columns)
    grid = torch.full((rows * columns, H + 1, W + 1, C), 255, dtype=torch.uint8)
    grid[:N, :H, :W] = pixels
    grid = grid.view(rows, columns, H + 1, W + 1, C).transpose(1, 2)
    return grid.reshape(rows * (H + 1), columns * (W + 1), C)[:-1, :-1]


def grid_figure(panels: Mapping[str, Tensor], columns: int, title: str = "") -> Figure:
    """A figure with a panel of images for each title; `save_png` writes it.

    Args:
        panels: images uint8 [N, H, W, C] by the title of their panel.
        columns: images per row of a panel.
        title: title of the figure.
    """
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    grids = {name: tiled(pixels, columns) for name, pixels in panels.items()}
    height, width = max((g.shape[0] / g.shape[1], g.shape[1]) for g in grids.values())
    side = max(PANEL_INCHES, width / DPI_LIMIT)
    size = (side * across + 0.4, (side * height + 0.5) * down + 0.4)
    figure = import_matplotlib("matplotlib.figure").Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=TEXT_SIZE, color=INK)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    for ax, (name, grid) in zip(axes, grids.items(), strict=False):
        shown = grid[..., 0] if grid.shape[-1] == 1 else grid
        ax.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        ax.set_title(name, fontsize=TEXT_SIZE - 3, color=INK)
    return figure


def save_png(figure: Figure, path: Path) -> Path:
    """Writes a figure, creating the folder if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")
    return path


def import_matplotlib(module: str) -> Any:
    """Imports a module of matplotlib; an ImportError says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "figures need the package matplotlib, which is not installed; "
            "`pip install 'dblocks[bench]'`"
        ) from error
