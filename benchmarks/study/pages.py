"""Tables for the README and the report, from the records of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dblocks.recipes.tables import Column, Rows, check_rows, mean

README_COSTS = (
    Column(
        "Layer evaluations",
        lambda r: f"{r[0]['layer_evaluations']:,} ({r[0]['layers_per_step']:g} a step)",
    ),
    Column("Samples seen", lambda r: f"{r[0]['samples']:,}"),
    Column("Saved activations, MiB", lambda r: f"{r[0]['activations_mib']:.1f}"),
    Column("State of a step, MiB", lambda r: f"{r[0]['state_mib']:.1f}"),
    Column("Seconds", lambda r: f"{mean(r, 'seconds'):.0f}"),
)


def markdown_table(rows: Rows, columns: Sequence[Column], *, first: str = "Training") -> str:
    """For a README: a line a row, the first column their names under the head `first`."""
    check_rows(rows)
    heads = [first, *(column.head for column in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * len(columns)]
    for name, records in rows.items():
        cells = [name, *(column.text(records) for column in columns)]
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
