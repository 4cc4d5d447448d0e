"""Tables of finished runs, from their records.

A record, written by `records.train`, is a dictionary of JSON values. A row of a table stands for
runs that differ only in their seed; a column formats their records.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dblocks.recipes.metrics.classes import mean_std
from dblocks.recipes.metrics.differences import paired_difference

Record = Mapping[str, Any]
Rows = Mapping[str, Sequence[Record]]


class Column(NamedTuple):
    """One column of a table."""

    head: str
    text: Callable[[Sequence[Record]], str]
    """Formats the records of a row."""
    absent: str | None = None
    """A sentence that says why no record may have the value; the column is then left out."""


def check_rows(rows: Rows) -> None:
    """Raises ValueError if a row has no run, or runs that differ in more than their seed."""
    for name, records in rows.items():
        if not records:
            raise ValueError(f"the row {name!r} has no finished run")
        configs = [{k: v for k, v in r["run"].items() if k != "seed"} for r in records]
        if any(config != configs[0] for config in configs):
            raise ValueError(f"the runs of the row {name!r} differ in more than their seed")


def spread(
    records: Sequence[Record], key: Callable[[Record], float | None], form: str, *, unit: str = ""
) -> str:
    """Mean and sample standard deviation of a value over the records; a dash if it is None.

    Args:
        records: records of a row.
        key: reads the value from a record.
        form: format of a number, such as ".1f".
        unit: written after both, such as " %".
    """
    values = [key(record) for record in records]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    mean, std = mean_std(known)
    return f"{mean:{form}}{'' if math.isnan(std) else f' ± {std:{form}}'}{unit}"


def percent(records: Sequence[Record], key: Callable[[Record], float | None]) -> str:
    """`spread` of a fraction in [0, 1], in percent."""

    def hundredfold(record: Record) -> float | None:
        value = key(record)
        return None if value is None else 100 * value

    return spread(records, hundredfold, ".1f", unit=" %")


def difference(
    records: Sequence[Record],
    others: Sequence[Record],
    key: Callable[[Record], float | None],
    form: str,
    *,
    unit: str = "",
) -> str:
    """The difference of a value between two rows, paired by seed, with its 95 % interval.

    Such as "-0.4 [-0.8, -0.1] %"; without an interval for one common seed, and a dash if there is
    no common seed or a value is None.

    Args:
        records: records of a row.
        others: records of the row to subtract.
        key: reads the value from a record.
        form: format of a number, such as ".1f".
        unit: written at the end, such as " %".
    """
    ours, theirs = ({r["run"]["seed"]: key(r) for r in row} for row in (records, others))
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = [(a, b) for s in seeds if (a := ours[s]) is not None and (b := theirs[s]) is not None]
    if not seeds or len(pairs) < len(seeds):
        return "-"
    found = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
    interval = "" if found.low is None else f" [{found.low:+{form}}, {found.high:+{form}}]"
    return f"{found.mean:+{form}}{interval}{unit}"


def mean(records: Sequence[Record], key: str) -> float:
    """The mean of a value over the records."""
    return mean_std([record[key] for record in records])[0]


# The cost of a run, from fields that every record has.
COSTS = (
    Column("learning rate", lambda r: f"{r[0]['run']['lr']:g}"),
    Column("layers run per step", lambda r: f"{r[0]['layers_per_step']:g}"),
    Column("layer evaluations", lambda r: f"{r[0]['layer_evaluations']:,}"),
    Column("samples seen", lambda r: f"{r[0]['samples']:,}"),
    Column("peak saved activations (MiB)", lambda r: f"{r[0]['activations_mib']:.1f}"),
    Column("params + grads + optimizer (MiB):", lambda r: ""),
    Column("  used by a step", lambda r: f"{r[0]['state_mib']:.1f}"),
    Column("  held by the process", lambda r: f"{r[0]['process_mib']:.1f}"),
    Column("seconds", lambda r: f"{mean(r, 'seconds'):.0f}"),
)
# Not in jobs of one block, which do not count layers.
OF_LAYERS = COSTS[1:3]


def absent(rows: Rows, columns: Sequence[Column]) -> list[str]:
    """Sentences about the columns that are left out because no record has the value."""
    reasons = {column.absent for column in columns if column.absent}
    for column in columns:
        if column.absent and any(column.text(records) != "-" for records in rows.values()):
            reasons.discard(column.absent)
    return sorted(reasons)


def text_table(rows: Rows, columns: Sequence[Column]) -> str:
    """A table for a terminal, transposed: each row is a column of text under its name."""
    check_rows(rows)
    lines = [("", list(rows))]
    left_out = absent(rows, columns)
    for column in columns:
        if column.absent not in left_out:
            lines.append((column.head, [column.text(records) for records in rows.values()]))
    head = max(len(label) for label, _ in lines)
    widths = [max(len(cells[i]) for _, cells in lines) for i in range(len(rows))]
    text = [
        "  ".join([label.ljust(head), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))])
        for label, cells in lines
    ]
    text.insert(1, "-" * len(text[0]))
    return "\n".join(text)
