"""Pictures inside the page, as data."""

from __future__ import annotations

import base64
import io
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.study.report.curves import lines_of
from benchmarks.study.report.finished import Finished
from dblocks.recipes.image_grid import INK, TEXT_SIZE, import_matplotlib
from dblocks.recipes.tables import mean

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
MARKERS = "os^Dv*P"


def comparison_picture(found: Finished) -> str | None:
    """The comparison's own figure: quality against compute and noise ranges, or samples."""
    if found.draw is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        found.draw(found.rows, path)
        data = path.read_bytes()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def memory_picture(found: Finished) -> str:
    """Quality against saved activations, a dot a run, as SVG."""
    quality = found.quality
    figure = import_matplotlib("matplotlib.figure").Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    for number, (title, records) in enumerate(found.rows.items()):
        ax.plot(
            [record["activations_mib"] for record in records],
            [quality.value(record) for record in records],
            MARKERS[number % len(MARKERS)], color=COLORS[number % len(COLORS)], label=title,
            linestyle="none", alpha=0.8,
        )  # fmt: skip
    ax.set_xlim(0, 1.1 * max(mean(r, "activations_mib") for r in found.records.values()))
    ax.set_xlabel("saved activations of a step (MiB)", fontsize=TEXT_SIZE)
    ax.set_ylabel(quality.axis, fontsize=TEXT_SIZE)
    ax.set_title("Quality against memory", fontsize=TEXT_SIZE, color=INK)
    _dress(ax)
    return _svg(figure)


def budget_picture(found: Finished) -> str:
    """`budget_figure` as SVG."""
    return _svg(budget_figure(found))


def budget_figure(found: Finished) -> Any:
    """Quality against the budget of layer evaluations, a line a row, dashed that of products."""
    quality = found.quality
    figure = import_matplotlib("matplotlib.figure").Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    rows = list(found.curve)
    for line in lines_of(found):
        number = rows.index(line.row)
        evaluations, values = zip(*line.points.values(), strict=True)
        ax.plot(
            evaluations, values, f"{MARKERS[number]}{'--' if line.of_product else '-'}",
            color=COLORS[number], label=line.title,
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xlabel("layer evaluations in training (one seed)", fontsize=TEXT_SIZE)
    ax.set_ylabel(quality.axis, fontsize=TEXT_SIZE)
    ax.set_title("Quality against compute", fontsize=TEXT_SIZE, color=INK)
    _dress(ax)
    return figure


def _dress(ax: Any) -> None:
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=TEXT_SIZE - 4, framealpha=0.8, edgecolor="none")


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
