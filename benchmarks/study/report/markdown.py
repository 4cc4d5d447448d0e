"""Tables of the pages in Markdown: a way of training a line, eight columns at most."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.study.costing import COLUMNS as COST_COLUMNS
from benchmarks.study.pages import table
from benchmarks.study.report.curves import curve_block
from benchmarks.study.report.findings import Finding, findings, sentences
from benchmarks.study.report.finished import Finished, Missing, by_command
from benchmarks.study.report.planned import Compared
from dblocks.recipes.tables import COSTS, Column, Rows, absent, mean, spread

LEFT_OUT = ("seconds per step",)  # of the memory techniques: the ratio tells more
EDGE = " (edge)"
PUBLISHED = "Figures that others published are on [another page](paper.md), never in these tables."


def study_block(found: Finished) -> str:
    """A study: rows beside the reference, other measures, memory, what is missing, and words."""
    said = sentences(found, findings(found)) if found.records else []
    listed = "\n".join(f"- {sentence}" for sentence in said)
    parts = [
        _methods(found) if found.records else "",
        _others(found),
        curve_block(found),
        _techniques(found),
        f"What this shows and what it does not:\n\n{listed}" if said else "",
        not_run(found.missing),
    ]
    return "\n\n".join(part for part in [*parts, PUBLISHED] if part)


def _methods(found: Finished) -> str:
    quality = found.quality
    reference = found.titles.get(found.reference, "end to end")
    head = (
        "", quality.axis, f"minus {reference} [95 %]", "learning rate", "layer evaluations",
        "activations + state of a step, MiB", "seconds", "seeds",
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
                f"{first['run']['lr']:g}{EDGE if row in found.edges else ''}",
                f"{first['layer_evaluations']:,}",
                f"{first['activations_mib']:.1f} + {first['state_mib']:.1f}",
                f"{mean(records, 'seconds'):.0f}",
                str(seeds) if seeds == wanted else f"{seeds} of {wanted}",
            )
        )
    said = [found.caption(found.rows)]
    if found.elsewhere:
        said = ["Settings are those of the table of every measure.", *filter(None, [found.note])]
    if found.edges & found.records.keys():
        said.append(f"{EDGE.strip().capitalize()}: the smallest or the largest rate of its grid.")
    return f"{table(head, lines)}\n\n{' '.join(said)}"


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
        if c.head not in costs | found.elsewhere | {found.quality.name} and c.absent not in left_out
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
    """What rows lack, a line for each command that runs some of them."""
    head = ("not run yet", "runs", "predicted core-hours", "command")
    lines = [(*not_run_cells(group), f"`{command}`") for command, group in by_command(missing)]
    return table(head, lines) if lines else ""


def not_run_cells(group: Sequence[Missing]) -> tuple[str, str, str]:
    """What the rows of one command are, their runs and their hours."""
    begun = sum(one.begun for one in group)
    more = f"more seeds of {begun} {'row' if begun == 1 else 'rows'}"
    what = "; ".join([one.title for one in group if not one.begun] + [more] * (begun > 0))
    part, known = group[0].part, [one.hours for one in group if one.hours is not None]
    hours = f"{sum(known):.1f}" if len(known) == len(group) else "-"
    return f"{part}: {what}" if part else what, str(sum(one.runs for one in group)), hours


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
