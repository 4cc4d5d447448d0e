"""Tables of the pages in Markdown: a way of training a line, eight columns at most."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.study.costing import COLUMNS as COST_COLUMNS
from benchmarks.study.pages import WIDEST
from benchmarks.study.report.findings import Finding, findings, sentences
from benchmarks.study.report.finished import Finished, Missing
from benchmarks.study.report.planned import Compared
from dblocks.recipes.tables import COSTS, Column, Rows, absent, mean, spread

LEFT_OUT = ("seconds per step",)  # of the memory techniques: the ratio tells more
PUBLISHED = "Figures that others published are on [another page](paper.md), never in these tables."


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


def study_block(found: Finished) -> str:
    """A study: rows beside the reference, other measures, memory, what is missing, and words."""
    parts = [
        _methods(found) if found.records else "",
        _others(found),
        _techniques(found),
        not_run(found.missing),
    ]
    said = sentences(found, findings(found)) if found.records else []
    if said:
        parts.append(
            "What this shows and what it does not:\n\n" + "\n".join(f"- {s}" for s in said)
        )
    return "\n\n".join(part for part in [*parts, PUBLISHED] if part)


def _methods(found: Finished) -> str:
    quality = found.quality
    reference = found.titles.get(found.reference, "end to end")
    head = (
        "", quality.axis, f"minus {reference} [95 %]", "layer evaluations",
        "saved activations, MiB", "state of a step, MiB", "seconds", "seeds",
    )  # fmt: skip
    beside = {finding.row: finding for finding in findings(found)}
    lines = []
    for row, records in found.records.items():
        seeds, wanted = len(records), found.seeds.get(row, len(records))
        first = records[0]
        lines.append(
            (
                found.titles[row],
                spread(records, quality.value, quality.form),
                _difference(beside.get(row), quality.form),
                f"{first['layer_evaluations']:,}",
                f"{first['activations_mib']:.1f}",
                f"{first['state_mib']:.1f}",
                f"{mean(records, 'seconds'):.0f}",
                str(seeds) if seeds == wanted else f"{seeds} of {wanted}",
            )
        )
    return f"{table(head, lines)}\n\n{found.caption(found.rows)}"


def _difference(finding: Finding | None, form: str) -> str:
    if finding is None:
        return "-"
    d = finding.difference
    interval = "" if d.low is None or d.high is None else f" [{d.low:+{form}}, {d.high:+{form}}]"
    return f"{d.mean:+{form}}{interval}"


def _others(found: Finished) -> str:
    """What else the study measures; of rows that have any of it."""
    costs = {column.head for column in COSTS}
    left_out = absent(found.rows, found.columns) if found.records else []
    columns = [
        c
        for c in found.columns
        if c.head not in costs and c.head != found.quality.name and c.absent not in left_out
    ]
    lines = _lines(found.rows, columns)
    head = ("", *(c.head for c in columns))
    parts = [table(head, lines)] if lines else []
    return "\n\n".join([*parts, *left_out])


def _lines(rows: Rows, columns: Sequence[Column]) -> list[tuple[str, ...]]:
    found = [(title, *(c.text(records) for c in columns)) for title, records in rows.items()]
    return [line for line in found if any(cell != "-" for cell in line[1:])]


def _techniques(found: Finished) -> str:
    if not found.costs:
        return ""
    columns = [c for c in COST_COLUMNS if c.head.strip() not in LEFT_OUT]
    heads = [c.head.strip().replace("over those without", "seconds over those without")
             for c in columns]  # fmt: skip
    return (
        "Memory of the same training with checkpointing, offload and residency; gradients are bit "
        "for bit the same. On a CPU offload and residency move nothing, so that seconds say "
        f"nothing about a GPU.\n\n{table(('', *heads), _lines(found.costs, columns))}"
    )


def not_run(missing: Sequence[Missing]) -> str:
    """Rows without records, with what runs them."""
    if not missing:
        return ""
    lines = [
        (m.title, str(m.runs), "-" if m.hours is None else f"{m.hours:.2f}", f"`{m.command}`")
        for m in missing
    ]
    head = ("defined, not run", "runs", "predicted core-hours", "command")
    return table(head, lines)


def memory_block(rows: Sequence[tuple[str, Compared]]) -> str:
    """Counted and planned memory of the rows of comparisons, whose names stand first."""
    head = (
        "comparison", "row", "saved activations, MiB", "planned", "planned over counted",
        "state of a step, MiB", "planned", "planned over counted",
    )  # fmt: skip
    lines = []
    for name, row in rows:
        pairs = zip(row.counted, row.planned, row.ratios, strict=True)
        numbers = [f for c, p, r in pairs for f in (f"{c:.1f}", f"{p:.1f}", f"{r:.3f}")]
        lines.append((name, row.title, *numbers))
    return table(head, lines, words=2)
