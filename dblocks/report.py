"""Tables made from the records of finished runs: for a terminal, and for a README.

A record is what `dblocks.records.train` makes: a dictionary of JSON values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dblocks.metrics import mean_std

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: runs that differ in their seed only."""

    name: str
    lr: float
    adaln: bool
    """Whether the trained network carries AdaLN."""
    accuracy: float
    """Mean over the seeds, in [0, 1]."""
    accuracy_std: float
    """Sample standard deviation over the seeds; nan for one seed."""
    first_block: float | None
    """Mean accuracy with 1 denoising step, which runs the first block alone; None end to end."""
    first_block_std: float
    """Sample standard deviation of it; nan for one seed, and end to end."""
    num_seeds: int
    layers_per_step: int
    layer_evaluations: int
    samples: int
    activations_mib: float
    state_mib: float
    """Parameters, gradients and optimizer state of what a step trains."""
    process_mib: float
    """The same of all that the process holds, every block's parameters and state included."""
    seconds: float


def summarize(name: str, records: Sequence[Record]) -> Row:
    """Mean and spread of runs that may differ in their seed only.

    Raises:
        ValueError: there is no run, or two runs differ in more than the seed.
    """
    if not records:
        raise ValueError(f"the row {name!r} has no finished run")
    configs = [{k: v for k, v in r["run"].items() if k != "seed"} for r in records]
    if any(config != configs[0] for config in configs):
        raise ValueError(f"the runs of the row {name!r} differ in more than their seed")
    first, accuracies = records[0], [r["accuracy"] for r in records]
    mean, std = mean_std(accuracies)
    by_steps = [r["accuracy_by_denoising_steps"] for r in records]
    alone = (None, math.nan) if by_steps[0] is None else mean_std([b["1"] for b in by_steps])
    return Row(
        name=name,
        lr=first["run"]["lr"],
        adaln=first["adaln"],
        accuracy=mean,
        accuracy_std=std,
        first_block=alone[0],
        first_block_std=alone[1],
        num_seeds=len(records),
        layers_per_step=first["layers_per_step"],
        layer_evaluations=first["layer_evaluations"],
        samples=first["samples"],
        activations_mib=first["activations_mib"],
        state_mib=first["state_mib"],
        process_mib=first["process_mib"],
        seconds=mean_std([r["seconds"] for r in records])[0],
    )


def percent(mean: float | None, std: float) -> str:
    """A mean and its spread in percent; a dash for none."""
    if mean is None:
        return "-"
    spread = "" if math.isnan(std) else f" ± {100 * std:.1f}"
    return f"{100 * mean:.1f}{spread} %"


def text_table(rows: Sequence[Row]) -> str:
    """What each run cost and reached, one run a column, for a terminal."""
    lines = [
        ("", [r.name for r in rows]),
        ("held-out accuracy", [percent(r.accuracy, r.accuracy_std) for r in rows]),
        (
            "  first block alone (1 denoising step)",
            [percent(r.first_block, r.first_block_std) for r in rows],
        ),
        ("layers run and kept per step", [f"{r.layers_per_step}" for r in rows]),
        ("layer evaluations", [f"{r.layer_evaluations:,}" for r in rows]),
        ("samples seen", [f"{r.samples:,}" for r in rows]),
        ("peak saved activations (MiB)", [f"{r.activations_mib:.1f}" for r in rows]),
        ("params + grads + optimizer (MiB):", ["" for _ in rows]),
        ("  of what a step trains", [f"{r.state_mib:.1f}" for r in rows]),
        ("  of all that one process holds", [f"{r.process_mib:.1f}" for r in rows]),
        ("seconds", [f"{r.seconds:.0f}" for r in rows]),
    ]
    head = max(len(label) for label, _ in lines)
    widths = [max(len(cells[i]) for _, cells in lines) for i in range(len(rows))]
    text = [
        "  ".join([label.ljust(head), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))])
        for label, cells in lines
    ]
    text.insert(1, "-" * len(text[0]))
    return "\n".join(text)


def markdown_table(rows: Sequence[Row]) -> str:
    """The same for a README, one run a line."""
    heads = (
        "Training",
        "AdaLN",
        "Learning rate",
        "Held-out accuracy",
        "Layer evaluations",
        "Samples seen",
        "Saved activations, MiB",
        "Parameters + gradients + optimizer of a step (of the process), MiB",
        "Seconds",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for r in rows:
        cells = (r.name, "yes" if r.adaln else "no", f"{r.lr:g}")
        cells += (percent(r.accuracy, r.accuracy_std),)
        cells += (f"{r.layer_evaluations:,} ({r.layers_per_step} a step)", f"{r.samples:,}")
        cells += (f"{r.activations_mib:.1f}", f"{r.state_mib:.1f} ({r.process_mib:.1f})")
        cells += (f"{r.seconds:.0f}",)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_between_markers(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a file by `text`.

    Raises:
        ValueError: the file does not hold both markers, once each and in this order.
    """
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    start, end = old.find(opening), old.find(closing)
    if start < 0 or end < start or old.count(opening) != 1 or old.count(closing) != 1:
        raise ValueError(
            f"{path} must hold the lines {opening} and {closing}, once each, and does not; "
            "add them where the table belongs"
        )
    new = f"{old[: start + len(opening)]}\n{text.strip()}\n{old[end:]}"
    path.write_text(new, encoding="utf-8")
