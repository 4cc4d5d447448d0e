"""The rows of `benchmarks.models.diffusers_sites` as a table of docs/fuse.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.ops.report import markdown

PAGE = Path(__file__).parents[2] / "docs" / "fuse.md"
BEGIN, END = "<!-- table of classes: begin -->", "<!-- table of classes: end -->"


def write_table(record: dict[str, Any], output_limit: float, gradient_limit: float) -> int:
    """Writes the table between its two marks; returns 1 if a row is wrong."""
    ran = {k: r for k, r in sorted(record["rows"].items()) if "failed" not in r}
    failed = {k: r["failed"] for k, r in sorted(record["rows"].items()) if "failed" in r}
    lines, done, all_of, total, wrong = [], 0, 0, 0, 0
    for name, row in ran.items():
        counts = [(row["replaced"][k], row["counted"][k]) for k in ("modulation", "gate")]
        done += sum(min(pair) for pair in counts)
        total += sum(counted for _, counted in counts)
        all_of += all(got >= want for got, want in counts) and any(want for _, want in counts)
        bad = row["output_error"] > output_limit or row["gradient_error"] > max(
            gradient_limit, 2 * row.get("own_gradient_error", 0.0)
        )
        wrong += bad
        lines.append((
            f"`{name}`",
            *(f"{got} of {want}" for got, want in counts),
            f"{row['output_error']:.0e}",
            f"{row['gradient_error']:.0e}" if row["gradients"] else "not run",
            "**wrong**" if bad else _left(row) + _own(row),
        ))  # fmt: skip
    share = f"{100 * done / total:.1f} %" if total else "none"
    text = (
        f"diffusers {record.get('diffusers')}, torch {record.get('torch')}, small instances on the "
        f"CPU in float32: {len(ran)} classes ran, {done} of {total} sites ({share}) run as fused "
        f"ops, {all_of} classes have all of theirs, {wrong} are wrong. Written by "
        f"`python -m benchmarks.models.diffusers_sites --table`.\n\n"
        + markdown(("class", "modulated norms", "gated sums", "output", "gradients", "left"), lines)
    )
    if failed:
        text += "\n\nNot run:\n\n" + "\n".join(f"- `{k}`: {why}" for k, why in failed.items())
    print(text)
    page = PAGE.read_text()
    if BEGIN in page:
        head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
        PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")
    return 1 if wrong else 0


def _own(row: dict[str, Any]) -> str:
    own = row.get("own_gradient_error")
    return f"a rounding unit of the inputs moves the plain gradients by {own:.0e}" if own else ""


def _left(row: dict[str, Any]) -> str:
    short = tuple(k for k in row["counted"] if row["replaced"][k] < row["counted"][k])
    places = [f"{w} ({n})" for w, n in row["left"].items() if short and w.startswith(short)]
    return "; ".join([*places, *row["reasons"]] if places else [])
