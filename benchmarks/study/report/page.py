"""The page: every comparison with its table, pictures and sentences; it needs no other file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.costing import COLUMNS as COST_COLUMNS
from benchmarks.study.experiment import provenance
from benchmarks.study.pages import text_tables
from benchmarks.study.report.figures import budget_picture, comparison_picture, memory_picture
from benchmarks.study.report.findings import Finding, findings, sentences
from benchmarks.study.report.finished import Finished, by_command
from benchmarks.study.report.markdown import not_run_cells
from dblocks.checkpoint import replacing
from dblocks.recipes.paper import EXPERIMENTS
from dblocks.recipes.tables import absent

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem; font-size: 13px; }
.better { color: #00704f; } .worse { color: #a03c00; } .quiet { color: #666; }
img, svg { max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) { body { background: #1b1b1b; color: #ddd; }
  pre { background: #262626; } th, td { border-color: #444; } img, svg { background: #fff; }
  .better { color: #5fd3a8; } .worse { color: #ff9d66; } .quiet { color: #aaa; } }
"""
INTRODUCTION = (
    "Networks trained in blocks, end to end, and by other methods, on the same data with the same "
    "optimizer and evaluation. All sentences and intervals are computed from the records; figures "
    "that others published stand in a table of their own. A difference is a row's quality minus "
    "that of end-to-end training (of ablations, that of the blocks they change), paired by seed, "
    "with the 95 % interval of Student's t."
)


def write_page(found: Sequence[Finished], path: Path) -> None:
    """Writes the page of all comparisons that have records.

    Args:
        found: the comparisons.
        path: the page to write.

    Raises:
        ValueError: no comparison has records, or records of different versions would be mixed.
    """
    ran = [f for f in found if f.records]
    if not ran:
        raise ValueError("a report needs records, got none; run `make study`")
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>dblocks: the study</title><style>{STYLE}</style>",
        f"<h1>The study</h1><p>{html.escape(INTRODUCTION)}</p>",
        _contents(ran),
        _summary(ran),
        *map(_section, ran),
        _published(),
        _not_run(found),
        "</html>\n",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text("\n".join(parts), encoding="utf-8")


def _contents(found: Sequence[Finished]) -> str:
    links = (f"<a href='#{f.name}'>{f.name}</a>" for f in found)
    more = "<a href='#published'>published</a> · <a href='#not-run'>not run</a>"
    return f"<p>{' · '.join(links)} · {more}</p>"


def _summary(found: Sequence[Finished]) -> str:
    head = (
        "comparison", "row", "quality", "difference", "95 % interval", "verdict",
        "activations", "state",
    )  # fmt: skip
    rows = [_summary_row(f, finding) for f in found for finding in findings(f)]
    cells = "".join(f"<th>{h}</th>" for h in head)
    return f"<h2>Summary</h2><table><tr>{cells}</tr>{''.join(rows)}</table>"


def _summary_row(found: Finished, finding: Finding) -> str:
    quality, d = found.quality, finding.difference
    verdict = finding.verdict(quality)
    interval = "-"
    if d.low is not None and d.high is not None:
        interval = f"{d.low:+{quality.form}} to {d.high:+{quality.form}}"
    mark = verdict if verdict in ("better", "worse") else "quiet"
    numbers = (
        f"{d.mean:+{quality.form}}{quality.unit}", interval,
        f"<span class='{mark}'>{verdict}</span>",
        f"{finding.activations:.2f}x", f"{finding.state:.2f}x",
    )  # fmt: skip
    names = (found.name, finding.title, quality.name)
    text = "".join(f"<td>{html.escape(name)}</td>" for name in names)
    return f"<tr>{text}{''.join(f'<td class=number>{n}</td>' for n in numbers)}</tr>"


def _section(found: Finished) -> str:
    records = [record for many in found.records.values() for record in many]
    lines = "".join(f"<li>{html.escape(s)}</li>" for s in sentences(found, findings(found)))
    return "\n".join(
        [
            f"<h2 id='{found.name}'>{found.name}</h2>",
            *(f"<pre>{html.escape(part)}</pre>" for part in text_tables(found.rows, found.columns)),
            f"<p>{html.escape(_notes(found))}</p>",
            _picture(found),
            memory_picture(found),
            budget_picture(found) if found.curve else "",
            _costs(found),
            f"<h3>What this shows, and what it does not</h3><ul>{lines}</ul>",
            f"<p class='quiet'>{html.escape(provenance(records))}</p>",
        ]
    )


def _notes(found: Finished) -> str:
    return " ".join([found.caption(found.rows), *absent(found.rows, found.columns)])


def _picture(found: Finished) -> str:
    data = comparison_picture(found)
    return f"<img alt='the rows of {found.name}' src='{data}'>" if data else ""


def _costs(found: Finished) -> str:
    if not found.costs:
        return ""
    tables = text_tables(found.costs, COST_COLUMNS)
    parts = "".join(f"<pre>{html.escape(table)}</pre>" for table in tables)
    return f"<h3>Memory with checkpointing, offload and residency</h3>{parts}"


def _published() -> str:
    """What the paper reports, of other data and larger networks: not to compare with rows here."""
    head = ("network", "data", "measure", "method", "published", "source")
    rows = [
        (network, experiment.data, experiment.metric, row.method, row.value, row.table)
        for network, experiments in EXPERIMENTS.items()
        for experiment in experiments
        for row in experiment.rows
    ]
    cells = "".join(f"<th>{h}</th>" for h in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        "<h2 id='published'>Published by others</h2><p>Of the paper of DiffusionBlocks (arXiv "
        "2506.14202): other data, larger networks and longer training than above, so that no row "
        f"here compares with them.</p><table><tr>{cells}</tr>{body}</table>"
    )


def _not_run(found: Sequence[Finished]) -> str:
    rows = []
    for f in found:
        for command, group in by_command(f.missing):
            cells = (f.name, *not_run_cells(group), command)
            rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    head = ("comparison", "rows", "runs", "predicted core-hours", "command")
    cells = "".join(f"<th>{h}</th>" for h in head)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"<h2 id='not-run'>Not run yet</h2><table><tr>{cells}</tr>{body}</table>"
