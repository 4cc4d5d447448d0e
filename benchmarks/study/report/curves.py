"""Curves over the budget: their points in a table, and where lines of it cross."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.study.experiment import Records
from benchmarks.study.pages import table
from benchmarks.study.quality import Quality
from benchmarks.study.report.finished import Finished
from dblocks.recipes.tables import Record

PRODUCT = "product_bits"


class Line(NamedTuple):
    """A line of a curve."""

    row: str
    """Whose points it has."""
    title: str
    points: Mapping[float, tuple[int, float]]
    """Layer evaluations and quality, by the share of the budget."""
    of_product: bool = False


def lines_of(found: Finished) -> list[Line]:
    """The lines that have points; where a product of blocks was measured beside, its own too."""
    made = []
    for row, records in found.curve.items():
        title = found.titles[row]
        made.append(Line(row, title, _points(records, found.quality.value)))
        products = {share: r for share, r in records.items() if PRODUCT in r[0]}
        if products:
            line = _points(products, lambda record: record[PRODUCT])
            made[-1] = made[-1]._replace(title=f"{title}, the first alone")
            made.append(Line(row, f"{title}, their product", line, of_product=True))
    return made


def _points(
    records: Mapping[float, Records], value: Callable[[Record], float]
) -> dict[float, tuple[int, float]]:
    return {share: (r[0]["layer_evaluations"], value(r[0])) for share, r in records.items()}


def curve_block(found: Finished) -> str:
    """The points of all lines, a budget a row, and what they show; a dash for what was not run."""
    lines = lines_of(found)
    if not lines:
        return ""
    quality = found.quality
    cells = []
    for share in sorted({share for line in lines for share in line.points}):
        evaluations = max(line.points[share][0] for line in lines if share in line.points)
        values = (
            f"{line.points[share][1]:{quality.form}}" if share in line.points else "-"
            for line in lines
        )  # fmt: skip
        cells.append((f"{evaluations:,}", *values))
    head = ("layer evaluations", *(line.title for line in lines))
    said = " ".join([f"Of {quality.axis}, one seed a point.", *crossings(lines, quality)])
    picture = f"![Quality against compute](images/{picture_name(found)})"
    return f"By budget:\n\n{table(head, cells)}\n\n{said}\n\n{picture}"


def picture_name(found: Finished) -> str:
    """Of the file with the curve."""
    return f"{found.name.replace('-', '_')}_curve.png"


def crossings(lines: Sequence[Line], quality: Quality) -> list[str]:
    """Sentences: from which budget all layers beat fewer, and how blocks stand beside them."""
    whole = next((line for line in lines if line.row == "end_to_end"), None)
    if whole is None:
        return []
    return [
        sentence
        for line in lines
        if line is not whole and (sentence := _beside(line, whole, quality))
    ]


def _beside(line: Line, whole: Line, quality: Quality) -> str | None:
    """How a line stands beside end to end at the budgets that both have."""
    both = [share for share in sorted(line.points) if share in whole.points]
    if len(both) < 2:
        return None
    sign = 1 if quality.higher_is_better else -1
    gains = [sign * (line.points[s][1] - whole.points[s][1]) for s in both]
    title = f"{line.title[:1].upper()}{line.title[1:]}"
    ends = f"{_evaluations(whole, both[0])} to {_evaluations(whole, both[-1])} layer evaluations"
    least, most = (f"{abs(gain):{quality.form}}{quality.unit}" for gain in (gains[0], gains[-1]))
    if all(gain > 0 for gain in gains):
        return f"{title}: better than end to end from {ends} (by {least} first, {most} last)."
    if all(gain <= 0 for gain in gains):
        return f"{title}: not better than end to end from {ends} (by {least} first, {most} last)."
    ahead = [_evaluations(whole, s) for s, gain in zip(both, gains, strict=True) if gain > 0]
    return f"{title}: better than end to end at {', '.join(ahead)} of {ends}, not at the others."


def _evaluations(line: Line, share: float) -> str:
    return f"{line.points[share][0]:,}"
