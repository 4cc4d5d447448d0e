"""Figures of a comparison: a measure against layer evaluations, and the range of each block.

matplotlib is imported when a figure is made, and its global state (pyplot) is left alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dblocks.blocks import BlocksConfig
from dblocks.recipes.image_grid import INK, TEXT_SIZE, import_matplotlib
from dblocks.schedules import EDMSchedule, MaskSchedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
LONGEST_OF_TWO = 50  # characters of an entry, where a legend has two columns
LINE = 0.25  # inches of a line of a legend
MOST_INSIDE = 4  # curves whose legend fits inside the panel
LINE_STYLES = ("-", "--", ":")  # the next one where the colours start again
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
BLOCK_COLORS = ("#D55E00", "#E69F00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What the left panel shows."""

    label: str
    """Of the vertical axis."""
    title: str
    """Of the panel."""
    form: str
    """How the legend writes where a curve ends, such as "{:.1f} %"."""
    best: float
    """The end of the axis that curves run towards."""
    step: float
    """The axis begins at a multiple of it, such that the second half of every curve shows."""


ACCURACY = Measure(
    label="held-out accuracy (%)",
    title="Accuracy against the layers run in training",
    form="{:.1f} %",
    best=100.5,
    step=10,
)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of the left panel: runs that differ in their seed only."""

    label: str
    """Its entry in the legend."""
    layer_evaluations: Sequence[float]
    """Where the values were measured, [points]."""
    values: Sequence[Sequence[float]]
    """One row of points per seed; the line is their mean, the band their range."""


def measure_panel(ax: Axes, curves: Sequence[Curve], measure: Measure) -> None:
    """A measure against layer evaluations, one line per curve, a dot where each run ends.

    The legend of many curves is left to the figure.
    """
    for (style, color), curve in zip(_line_looks(), curves, strict=False):
        x = [n / 1000 for n in curve.layer_evaluations]
        y = torch.tensor([list(row) for row in curve.values], dtype=torch.float64)
        mean = y.mean(0).tolist()
        label = f"{curve.label}: {measure.form.format(mean[-1])}"
        ax.plot(x, mean, color=color, linestyle=style, linewidth=2, label=label)
        ax.plot(x[-1:], mean[-1:], "o", color=color, markersize=6)
        if len(y) > 1:
            low, high = y.amin(0).tolist(), y.amax(0).tolist()
            ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    _zoom_on_the_end(ax, curves, measure)
    ax.set_xlabel("layer evaluations (thousand, one batch through one layer each)")
    ax.set_ylabel(measure.label)
    ax.set_title(measure.title)
    ax.set_xlim(left=0)
    ax.grid(alpha=0.25)
    if len(curves) > MOST_INSIDE:
        return
    rising = measure.best > _first(curves)
    corner = "lower right" if rising else "upper right"
    # A light ground: the beginning of a falling curve passes behind it.
    ax.legend(loc=corner, framealpha=0.8, edgecolor="none", fontsize=TEXT_SIZE)


def _first(curves: Sequence[Curve]) -> float:
    return next((row[0] for curve in curves for row in curve.values), 0.0)


def _line_looks() -> Iterator[tuple[str, str]]:
    return itertools.cycle(itertools.product(LINE_STYLES, LINE_COLORS))


def _zoom_on_the_end(ax: Axes, curves: Sequence[Curve], measure: Measure) -> None:
    """Leave out the first half of the curves where it is far off: the first points tell little."""
    late = [v for c in curves for row in c.values for v in row[len(row) // 2 :]] or [measure.best]
    if min(late) < measure.best:
        low = measure.step * math.floor(min(late) / measure.step - 1)
        ax.set_ylim(max(0.0, low), measure.best)
    else:  # two steps of room for the legend
        high = measure.step * math.ceil(max(late) / measure.step + 2)
        ax.set_ylim(measure.best, high)


def noise_panel(
    ax: Axes, schedule: EDMSchedule, num_blocks: int, layers: Sequence[tuple[int, int]]
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


def _density(schedule: EDMSchedule, log_sigma: torch.Tensor) -> torch.Tensor:
    """The density of ln sigma at these points, truncated to their range."""
    half = 1e-5  # a derivative by differences
    low, high = log_sigma.min(), log_sigma.max()
    below, above = (log_sigma - half).clamp(min=low), (log_sigma + half).clamp(max=high)
    ends = zip(below.exp().tolist(), above.exp().tolist(), strict=True)
    mass = torch.tensor([schedule.mass(lo, hi) for lo, hi in ends], dtype=torch.float64)
    density = mass / (above - below)
    return density / torch.trapezoid(density, log_sigma)


def _short(log_sigma: float) -> str:
    return f"{math.exp(log_sigma):.2g}"


def _dress_noise_axes(ax: Axes, schedule: EDMSchedule, top: float) -> None:
    ax.set_xscale("log")
    ax.set_xlim(schedule.sigma_min, schedule.sigma_max)
    ax.set_ylim(0, 1.65 * top)  # room for the legend above the bell
    ax.set_xlabel(r"noise level $\sigma$ (log scale)")
    ax.set_ylabel(r"density of ln $\sigma$ in training, without overlap")
    ax.set_title("The noise range that each block learns to remove")
    ax.legend(loc="upper right", frameon=False, fontsize=TEXT_SIZE)


def mask_panel(
    ax: Axes, schedule: MaskSchedule, num_blocks: int, layers: Sequence[tuple[int, int]]
) -> None:
    """The mask ratio against t, block by block, each named with its layers.

    Args:
        ax: the axes to draw on.
        schedule: of the masks.
        num_blocks: B.
        layers: the first layer of each block and the one after its last.
    """
    edges = schedule.boundaries(num_blocks).tolist()
    for b, (high, low) in enumerate(itertools.pairwise(edges)):
        color = BLOCK_COLORS[b % len(BLOCK_COLORS)]
        t = torch.linspace(low, high, 100, dtype=torch.float64)
        ratio, (first, end) = schedule.masked(t), layers[b]
        label = f"block {b}: layers {first + 1}-{end}, t {low:.2g}-{high:.2g}"
        ax.fill_between(t.tolist(), ratio.tolist(), color=color, alpha=0.75, lw=0, label=label)
        ax.plot(t.tolist(), ratio.tolist(), color=INK, linewidth=1.5)
        ax.hlines(ratio[-1].item(), 0, high, color=INK, lw=1, ls=":")
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1.45)  # room for the legend above the curve
    ax.set_xlabel("time t")
    ax.set_ylabel("mask ratio")
    ax.set_title(f"The mask ratios that each block learns to fill ({schedule.kind})")
    ax.legend(loc="upper left", frameon=False, fontsize=TEXT_SIZE)


Panel = Callable[[Any, Any, int, Sequence[tuple[int, int]]], None]


def comparison_figure(
    curves: Sequence[Curve],
    config: BlocksConfig | None,
    depth: int,
    title: str,
    measure: Measure = ACCURACY,
    panel: Panel = noise_panel,
) -> Figure:
    """Both panels side by side, for a network of `depth` layers; `save_png` writes it.

    The right one is `noise_panel`, or `mask_panel` for a masked model; without blocks, and where
    all draws are at sigma_max, there is none.
    """
    if config is not None and config.top_share == 1:
        config = None
    count = 1 if config is None else 2
    narrow = all(len(curve.label) <= LONGEST_OF_TWO for curve in curves)
    columns = 2 if narrow and count == 2 else 1
    below = math.ceil(len(curves) / columns) if len(curves) > MOST_INSIDE else 0
    figure = import_matplotlib("matplotlib.figure").Figure(
        figsize=(6.25 * count, 5.2 + LINE * below), layout="constrained"
    )
    figure.suptitle(title, fontsize=TEXT_SIZE + 2, color=INK)
    panels = figure.subplots(1, count, squeeze=False)[0]
    measure_panel(panels[0], curves, measure)
    if below:
        # Under both panels: under one, a long entry would leave it no room.
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns,
            frameon=False, fontsize=TEXT_SIZE,
        )  # fmt: skip
    if config is not None:
        right = panels[1]
        panel(right, config.schedule, config.num_blocks, config.layer_ranges(depth))
        if config.top_share != "auto" and config.top_share > 0:
            beside = f"beside {config.top_share:.0%} of its draws, at $\\sigma$ max"
            right.set_title(f"{right.get_title()}\n{beside}")
    for ax in panels:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=TEXT_SIZE)
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set_fontsize(TEXT_SIZE)
    return figure
