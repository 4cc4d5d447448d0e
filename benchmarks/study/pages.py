"""Tables in pages: between their markers, eight columns wide at most."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dblocks.recipes.tables import Column, Rows, absent, text_table

WIDEST = 8  # columns


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


def seeds_of(rows: Rows) -> str:
    """The seeds of the rows' runs, and which rows have fewer."""
    seeds = {title: sorted(r["run"]["seed"] for r in records) for title, records in rows.items()}
    most = max(seeds.values(), key=len)
    fewer = [f"{title}: {_listed(some)}" for title, some in seeds.items() if some != most]
    return _listed(most) + (f" ({'; '.join(fewer)})" if fewer else "")


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))


def table(head: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table in Markdown, numbers to the right of the columns of words.

    Raises:
        ValueError: it is too wide.
    """
    if len(head) > WIDEST:
        raise ValueError(f"a table must have at most {WIDEST} columns, got {len(head)}: {head}")
    rule = "|".join(["---"] * words + ["---:"] * (len(head) - words))
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(_line(cells) for cells in lines)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def text_tables(rows: Rows, columns: Sequence[Column]) -> list[str]:
    """`text_table` of rows, in as many tables as keep each narrow."""
    items, left_out = list(rows.items()), absent(rows, columns)
    shown = [column for column in columns if column.absent not in left_out]
    count = max(1, -(-len(items) // (WIDEST - 1)))
    size = max(1, -(-len(items) // count))
    parts = (dict(items[start : start + size]) for start in range(0, len(items), size))
    return [text_table(part, shown) for part in parts]


def measures_block(rows: Rows, columns: Sequence[Column], caption: str, archive: Path) -> str:
    """Every measure of a comparison, a way of training a column, and how they were made."""
    whole = "\n\n".join(text_tables(rows, columns))
    lines = "\n".join(line.rstrip() for line in whole.splitlines())
    how = [
        caption, *absent(rows, columns),
        "Seconds are for one thread of a shared CPU, two runs at a time.",
        f"Every run's record is in `{archive}`; `make study-report` makes tables and picture from "
        "them, and `make results` runs those that are missing.",
    ]  # fmt: skip
    return f"```text\n{lines}\n```\n\n{' '.join(how)}"
