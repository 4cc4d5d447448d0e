"""A plan as a table, as JSON and as a chart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from dblocks.config import json_text
from dblocks.info import aligned
from dblocks.scale.planner.plan import Planner, Prefetch, Way, smallest_fitting
from dblocks.scale.planner.units import format_bytes, format_seconds

DAY = 86400
HEAD = (
    "way", "layers", "parameters", "gradients", "optimizer", "activations", "peak", "fits",
    "moved a step", "step", "overhead", "{unit} a second", "peak is at",
)  # fmt: skip
NOTES = """\
All figures are modelled. Bytes are those of the largest block and the shared parameters, without
temporaries of single operations and rounding by the allocator. Times are a roofline of arithmetic
and the link; the overhead is the time that transfers add to a step's arithmetic. {unit_} a second
count once all blocks have trained on them. Numbers of blocks that are left out have as many layers
in their largest block as the row above."""
CHART = ("parameters", "gradients", "optimizer", "activations", "prefetched")


def table(
    planner: Planner,
    ways: Sequence[Way],
    blocks: int | None = None,
    train_tokens: float | None = None,
) -> str:
    """The plan for a terminal, with the fewest blocks that fit and their balanced splits.

    Args:
        planner: the planner that made the rows.
        ways: the rows.
        blocks: number of blocks to report in detail; by default the fewest that fit.
        train_tokens: number of tokens to train on; reports the time needed.
    """
    unit = planner.costs.subject.unit
    rows = [tuple(head.format(unit=unit) for head in HEAD)]
    rows += [_row(way) for way in _different(ways)]
    notes = NOTES.format(unit_=unit.capitalize())
    lines = [_title(planner), *aligned(rows), "", notes, "", _fewest(planner, ways)]
    fitting = smallest_fitting(ways)
    chosen = ways[1 + blocks] if blocks is not None else fitting
    if chosen is not None:
        lines += [*_balanced(planner, chosen.blocks), *_overhead(planner, chosen)]
    if train_tokens is not None:
        chosen = chosen or ways[-1]
        days = train_tokens / chosen.tokens_per_second / DAY
        time = f"{days:,.1f} days" if days >= 1 else f"{24 * days:,.2g} hours"
        lines.append(f"{train_tokens:,.0f} {unit} in {chosen.name}: {time} (modelled)")
    return "\n".join(lines)


def as_json(planner: Planner, ways: Sequence[Way]) -> str:
    """The plan as JSON; bytes and seconds are numbers."""
    costs, chosen = planner.costs, smallest_fitting(ways)
    values: dict[str, Any] = {
        "modelled": True,
        "network": costs.subject.name,
        "layers": costs.num_layers,
        "samples": costs.samples,
        "unit": costs.subject.unit,
        "units_per_sample": costs.subject.tokens,
        "sample": costs.subject.size,
        "optimizer": costs.optimizer,
        "average": costs.average,
        "bf16": costs.bf16,
        "split": planner.split,
        "machine": dataclasses.asdict(planner.machine),
        "smallest_fitting": chosen.blocks if chosen else None,
        "ways": [dataclasses.asdict(way) for way in ways],
    }
    if chosen:
        values["balanced"] = {
            "memory": planner.layers_per_block(chosen.blocks, "memory"),
            "time": planner.layers_per_block(chosen.blocks, "time"),
        }
    return json_text(values) + "\n"


def chart(path: Path, planner: Planner, ways: Sequence[Way]) -> None:
    """Writes a chart: a stacked bar for each way, and the device's memory as a line.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: matplotlib does not support the file's ending.
    """
    pyplot = _pyplot()
    shown, gib = _different(ways), 2**30
    figure, axes = pyplot.subplots(figsize=(max(6, 0.5 * len(shown) + 2), 4.5))
    bottom = [0.0] * len(shown)
    names = [way.name for way in shown]
    for part in CHART:
        heights = [getattr(way, part) / gib for way in shown]
        axes.bar(names, heights, bottom=bottom, label=part)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    peaks = [way.peak / gib for way in shown]
    axes.plot(names, peaks, "k_", markersize=14, label="peak of a step")
    axes.axhline(planner.machine.memory / gib, color="k", linestyle="--", label="memory")
    axes.set_ylabel("GiB on a device (modelled)")
    axes.set_title(planner.costs.subject.name)
    axes.tick_params(axis="x", rotation=90)
    axes.legend(fontsize=8)
    figure.tight_layout()
    try:
        figure.savefig(path)
    finally:
        pyplot.close(figure)


def chart_endings() -> list[str]:
    """The supported endings of chart files, such as png."""
    pyplot = _pyplot()
    figure = pyplot.figure()
    try:
        return sorted(figure.canvas.get_supported_filetypes())
    finally:
        pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "--chart needs the package matplotlib, which is not installed; "
            "`pip install 'dblocks[bench]'`"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _title(planner: Planner) -> str:
    costs, machine = planner.costs, planner.machine
    devices = f"{machine.devices} devices" if machine.devices > 1 else "one device"
    return (
        f"{costs.subject.name}, {costs.num_layers} layers, batches of {costs.samples} of "
        f"{costs.subject.size}; {devices} of {format_bytes(machine.memory)}, "
        f"{machine.flops / 1e12:g} TFLOP/s, link {machine.link / 1e9:g} GB/s (modelled)"
    )


def _row(way: Way) -> tuple[str, ...]:
    layers = sorted({*way.layers_per_block}, reverse=True)
    return (
        way.name,
        f"{layers[-1]}-{layers[0]}" if len(layers) > 1 else str(layers[0]),
        *(format_bytes(n) for n in (way.parameters, way.gradients, way.optimizer)),
        format_bytes(way.activations),
        format_bytes(way.peak),
        "yes" if way.fits else "no",
        format_bytes(way.transfer) if way.transfer else "-",
        format_seconds(way.step_seconds),
        _percent(way.overhead) if way.transfer else "-",
        f"{way.tokens_per_second:,.4g}",
        way.moment,
    )


def _different(ways: Sequence[Way]) -> list[Way]:
    """Leaves out numbers of blocks whose largest block is as large as with one block less."""
    shown = list(ways[:2])
    for way in ways[2:]:
        before = shown[-1]
        if before.name in ("end to end", "checkpointing") or (
            max(before.layers_per_block) != max(way.layers_per_block)
        ):
            shown.append(way)
    return shown


def _fewest(planner: Planner, ways: Sequence[Way]) -> str:
    memory, chosen = format_bytes(planner.machine.memory), smallest_fitting(ways)
    if chosen is not None:
        return f"The fewest blocks that fit into {memory}: {chosen.blocks}"
    least = min(ways, key=lambda way: way.peak)
    return (
        f"Nothing fits into {memory}; the least is {format_bytes(least.peak)}, {least.name}. "
        "Use smaller batches, or a smaller network"
    )


def _balanced(planner: Planner, blocks: int) -> list[str]:
    lines = []
    for split in ("memory", "time"):
        way = planner.blocks(blocks, split)
        counts = ",".join(map(str, way.layers_per_block))
        lines.append(
            f"{way.name} balanced by {split}: layers_per_block=({counts}), peak "
            f"{format_bytes(way.peak)}, step {format_seconds(way.step_seconds)}"
        )
    return lines


def _overhead(planner: Planner, way: Way) -> list[str]:
    """The overhead of residency for each `prefetch`; empty if no block moves."""
    if not way.transfer:
        return []
    added = []
    for prefetch in get_args(Prefetch):
        machine = dataclasses.replace(planner.machine, prefetch=prefetch)
        found = Planner(planner.costs, machine, planner.split).blocks(way.blocks)
        added.append(f"{_percent(found.overhead)} with --prefetch {prefetch}")
    steps = planner.machine.steps_per_visit
    return [
        f"{way.name} at {steps} step{'s' if steps > 1 else ''} a visit: transfers add to a step "
        f"{', '.join(added)} (modelled)"
    ]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:,.1f} %"
