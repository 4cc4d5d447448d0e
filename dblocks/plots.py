"""Figures of a comparison: accuracy against layer evaluations, and the noise range of each block.

matplotlib is imported when a figure is made, and its global state (pyplot) is left alone.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dblocks.schedule import NoiseSchedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
LINE_STYLES = ("-", "--", ":")  # the next one where the colours start again
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
BLOCK_COLORS = ("#D55E00", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7")
INK = "#333333"
TEXT_SIZE = 12  # points: a README shows the figure at about half its pixels


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of the left panel: runs that differ in their seed only."""

    label: str
    """Its entry in the legend."""
    layer_evaluations: Sequence[float]
    """Where the accuracy was measured, [points]."""
    accuracies: Sequence[Sequence[float]]
    """In [0, 1], one row of points per seed; the line is their mean, the band their range."""


def accuracy_panel(ax: Axes, curves: Sequence[Curve]) -> None:
    """Accuracy in % against layer evaluations, one line per curve, a dot where each run ends."""
    for (style, color), curve in zip(_line_looks(), curves, strict=False):
        x = [n / 1000 for n in curve.layer_evaluations]
        y = 100 * torch.tensor([list(row) for row in curve.accuracies], dtype=torch.float64)
        mean = y.mean(0).tolist()
        label = f"{curve.label}: {mean[-1]:.1f} %"
        ax.plot(x, mean, color=color, linestyle=style, linewidth=2, label=label)
        ax.plot(x[-1:], mean[-1:], "o", color=color, markersize=6)
        if len(y) > 1:
            low, high = y.amin(0).tolist(), y.amax(0).tolist()
            ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    _zoom_on_the_top(ax, curves)
    ax.set_xlabel("layer evaluations (thousand, one batch through one layer each)")
    ax.set_ylabel("held-out accuracy (%)")
    ax.set_title("Accuracy against the layers run in training")
    ax.set_xlim(left=0)
    ax.grid(alpha=0.25)
    ax.legend(loc="lower right", frameon=False, fontsize=TEXT_SIZE)


def _line_looks() -> Iterator[tuple[str, str]]:
    return itertools.cycle(itertools.product(LINE_STYLES, LINE_COLORS))


def _zoom_on_the_top(ax: Axes, curves: Sequence[Curve]) -> None:
    """Start the axis below the second half of the curves: the first points are close to chance."""
    late = [a for c in curves for row in c.accuracies for a in row[len(row) // 2 :]]
    floor = 10 * math.floor(10 * min(late, default=0.0)) - 10
    ax.set_ylim(max(0, floor), 100.5)


def noise_panel(
    ax: Axes, schedule: NoiseSchedule, num_blocks: int, layers: Sequence[tuple[int, int]]
) -> None:
    """The density of ln sigma in training, block by block, each named with its layers.

    Every block is drawn equally often, so each area is 1/B, whatever the partition; the overlap
    of the ranges is left out.

    Args:
        ax: the axes to draw on.
        schedule: of the noise levels.
        num_blocks: B.
        layers: the first layer of each block and the one after its last.
    """
    top = 0.0
    edges = schedule.boundaries(num_blocks).log().tolist()
    for b, (high, low) in enumerate(itertools.pairwise(edges)):
        color = BLOCK_COLORS[b % len(BLOCK_COLORS)]
        t = torch.linspace(low, high, 400, dtype=torch.float64)
        first, end = layers[b]
        label = f"block {b}: layers {first + 1}-{end}, $\\sigma$ {_short(low)}-{_short(high)}"
        sigma, density = t.exp().tolist(), (_density(schedule, t) / num_blocks).tolist()
        ax.fill_between(sigma, density, color=color, alpha=0.75, lw=0, label=label)
        ax.plot(sigma, density, color=INK, linewidth=1.5)
        ax.vlines([sigma[0], sigma[-1]], 0, [density[0], density[-1]], color=INK, lw=1, ls=":")
        top = max(top, *density)
    _dress_noise_axes(ax, schedule, top)


def _density(schedule: NoiseSchedule, log_sigma: torch.Tensor) -> torch.Tensor:
    """The normal density of ln sigma, truncated to the range of these points."""
    log_density = -0.5 * ((log_sigma - schedule.p_mean) / schedule.p_std).square()
    density = (log_density - log_density.max()).exp()
    return density / torch.trapezoid(density, log_sigma)


def _short(log_sigma: float) -> str:
    return f"{math.exp(log_sigma):.2g}"


def _dress_noise_axes(ax: Axes, schedule: NoiseSchedule, top: float) -> None:
    ax.set_xscale("log")
    ax.set_xlim(schedule.sigma_min, schedule.sigma_max)
    ax.set_ylim(0, 1.65 * top)  # room for the legend above the bell
    ax.set_xlabel(r"noise level $\sigma$ (log scale)")
    ax.set_ylabel(r"density of ln $\sigma$ in training, without overlap")
    ax.set_title("The noise range that each block learns to remove")
    ax.legend(loc="upper right", frameon=False, fontsize=TEXT_SIZE)


def comparison_figure(
    curves: Sequence[Curve],
    schedule: NoiseSchedule,
    num_blocks: int,
    layers: Sequence[tuple[int, int]],
    *,
    title: str,
) -> Figure:
    """Both panels side by side; the caller saves it with `save_png`."""
    figure = _matplotlib("matplotlib.figure").Figure(figsize=(12.5, 5.2), layout="constrained")
    figure.suptitle(title, fontsize=TEXT_SIZE + 2, color=INK)
    left, right = figure.subplots(1, 2)
    accuracy_panel(left, curves)
    noise_panel(right, schedule, num_blocks, layers)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=TEXT_SIZE)
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set_fontsize(TEXT_SIZE)
    return figure


def save_png(figure: Figure, path: Path) -> Path:
    """Write the figure, making the folder if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")
    return path


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            "figures need the package matplotlib, which is not installed; "
            "`pip install 'dblocks[bench]'`"
        ) from error
