"""Tables and charts of a result file of `benchmarks.ops.run`, and changes since an earlier one.

python -m benchmarks.ops.report benchmarks/results/ops-cpu.json
python -m benchmarks.ops.report new.json --compare old.json --out folder
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ops.targets import TARGETS, Target
from dblocks.recipes.image_grid import save_png

Row = dict[str, Any]
Key = tuple[str, tuple[int, ...], str, str]  # op, shape, dtype, direction

FORMAT = 3
OURS = "dblocks"
CHANGE = 1.1  # smaller changes may be noise of the machine


def read(path: Path) -> dict[str, Any]:
    """Reads a result file; files of format 2, which call an implementation "peer", are converted.

    Raises:
        ValueError: it is not a result file, or has another format.
    """
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a result file: {error}") from error
    if isinstance(result, dict) and result.get("format") == 2:
        for row in (*result["rows"], *result["overhead"]):
            row["implementation"] = row.pop("peer")
        result["format"] = FORMAT
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(
            f"{path} must be a result file of format {FORMAT}; run the benchmark again"
        )
    return result


def key(row: Row) -> Key:
    """The case of a row: everything that identifies it except the implementation."""
    return row["op"], tuple(row["shape"]), row["dtype"], row["direction"]


def ratios(rows: Iterable[Row]) -> dict[Key, dict[str, float]]:
    """The time of each implementation relative to dblocks, for each case that has both."""
    rows = list(rows)
    ours = {key(r): r["ms"] for r in rows if r["implementation"] == OURS and "ms" in r}
    found: dict[Key, dict[str, float]] = {}
    for row in rows:
        if key(row) in ours and "ms" in row:
            found.setdefault(key(row), {})[row["implementation"]] = row["ms"] / ours[key(row)]
    return found


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    out = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    out += [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join(out)


def _case(k: Key) -> tuple[str, str, str, str]:
    op, shape, dtype, direction = k
    return op, "x".join(map(str, shape)), dtype, direction


def table(rows: Sequence[Row]) -> str:
    """All rows: time, rate, percent of the copy, and the ratio to dblocks."""
    header = (
        "op", "shape", "dtype", "direction", "implementation", "ms (p20-p80)", "GB/s", "% of copy",
        "GFLOP/s", "dblocks is", "first call, ms", "peak, MiB",
    )  # fmt: skip
    times = ratios(rows)
    lines = []
    for row in rows:
        case = (*_case(key(row)), row["implementation"])
        if "ms" not in row:
            reason = f"wrong: {row['wrong']}" if row["wrong"] else f"absent: {row['absent']}"
            lines.append((*case, reason, *[""] * (len(header) - len(case) - 1)))
            continue
        ratio = times.get(key(row), {}).get(row["implementation"])
        lines.append((
            *case,
            f"{row['ms']:.3f} ({row['ms_p20']:.3f}-{row['ms_p80']:.3f})",
            f"{row['gb_per_s']:.0f}",
            f"{100 * row['of_copy']:.0f} %",
            f"{row['gflops']:.1f}",
            "" if ratio is None else f"{ratio:.2f}x",
            f"{row['first_ms']:.1f}",
            "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:.1f}",
        ))  # fmt: skip
    return markdown(header, lines)


def targets(result: dict[str, Any]) -> str:
    """Each target with its worst case; empty if it covers none of the rows."""
    times, lines = ratios(result["rows"]), []
    for target in TARGETS:
        cases = {
            k: t for k, t in times.items() if target.covers(*k) and target.baseline in _names(t)
        }
        if not cases:
            continue
        worst = min(cases, key=lambda k: _against(cases[k], target))
        value = _against(cases[worst], target)
        verdict = "reached" if value >= target.at_least else "**missed**"
        met = sum(_against(t, target) >= target.at_least for t in cases.values())
        lines.append((
            target.op, target.direction, target.baseline,
            f"{target.at_least:.2f}x", f"{value:.2f}x",
            " ".join(_case(worst)[1:3]), f"{met} of {len(cases)}", verdict,
        ))  # fmt: skip
    if not lines:
        return ""
    header = ("op", "direction", "baseline", "target", "worst", "where", "cases that reach it", "")
    return markdown(header, lines)


def _names(times: dict[str, float]) -> set[str]:
    return {name.partition(" ")[0] for name in times}


def _against(times: dict[str, float], target: Target) -> float:
    """The ratio to the fastest form of a baseline: for noise, torch.compile has two forms."""
    return min(v for name, v in times.items() if name.partition(" ")[0] == target.baseline)


def overheads(rows: Sequence[Row]) -> str:
    """The time of a call on one row of eight elements."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        found.setdefault((row["op"], row["direction"]), {})[row["implementation"]] = row["host_us"]
    lines = [
        (*case, f"{us[OURS]:.1f}", f"{us['eager']:.1f}", f"{us['eager'] / us[OURS]:.2f}x")
        for case, us in found.items()
    ]
    return markdown(("op", "direction", "dblocks, us", "eager, us", "dblocks is"), lines)


def comparison(new: dict[str, Any], old: dict[str, Any]) -> str:
    """The cases that changed, by their ratio to eager, which cancels a drift of the clock."""
    before = ratios(old["rows"])
    lines = []
    for k, times in ratios(new["rows"]).items():
        if k not in before or "eager" not in times or "eager" not in before[k]:
            continue
        change = times["eager"] / before[k]["eager"]
        if not 1 / CHANGE < change < CHANGE:
            was, now = f"{before[k]['eager']:.2f}x", f"{times['eager']:.2f}x"
            lines.append((*_case(k), was, now, f"{change:.2f}x"))
    if not lines:
        return f"No case changed by a factor of {CHANGE} or more."
    header = ("op", "shape", "dtype", "direction", "over eager before", "now", "change")
    return markdown(header, lines)


def document(result: dict[str, Any], old: dict[str, Any] | None = None) -> str:
    """The whole report as markdown."""
    e = result["environment"]
    ceiling = ", ".join(
        f"{1e3 * v:,.0f} GFLOP/s in {k}" for k, v in result["matmul_tflops"].items()
    )
    parts = [
        "# Fused ops beside their baselines",
        f"{e['device']}, {e['threads']} threads, C++ kernels: {e['cpp']}; torch {e['torch']}, "
        f"triton {e['triton']}, Python {e['python']}; commit {e['commit']}. Medians of "
        f"{result['rounds']} rounds in which the implementations take turns; a matrix product "
        f"reaches {ceiling}. Outputs and gradients were checked against float64 before the timing; "
        "'dblocks is' tells how much less time dblocks takes than the baseline.",
    ]
    met = targets(result)
    if met:
        parts += ["## Targets, set for 2 cores with AVX-512", met]
    if old is not None:
        parts += ["## Since the earlier result", comparison(result, old)]
    if result["overhead"]:
        parts += ["## A call on one row of eight elements", overheads(result["overhead"])]
    parts += ["## Every case", table(result["rows"])]
    return "\n\n".join(parts)


def chart(rows: Sequence[Row], op: str, path: Path) -> None:
    """A bar chart of one op as PNG: the speed of dblocks relative to each baseline in each case."""
    from matplotlib.figure import Figure

    times = {k: t for k, t in ratios(rows).items() if k[0] == op}
    names = sorted({name for t in times.values() for name in t} - {OURS})
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(times)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        places = [y + (i - (len(names) - 1) / 2) * height for y in range(len(times))]
        values = [t.get(name, 0.0) for t in times.values()]
        bars = axes.barh(places, values, height, label=f"over {name}")
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(times)), [" ".join(_case(k)[1:]) for k in times], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time of the baseline / time of dblocks (longer is better, 1 is equal)")
    axes.set_title(f"{op}: speed of dblocks over its baselines")
    axes.legend(fontsize=8)
    save_png(figure, path)


def write(result: dict[str, Any], stem: Path, old: dict[str, Any] | None = None) -> None:
    """Writes `<stem>.md` and a chart `<stem>-<op>.png` for each op."""
    stem.with_suffix(".md").write_text(document(result, old) + "\n")
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        chart(result["rows"], op, stem.with_name(f"{stem.name}-{op}.png"))


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops.report", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("result", type=Path, help="a JSON file of benchmarks.ops.run")
    parser.add_argument("--compare", type=Path, help="an older one")
    parser.add_argument("--out", type=Path, help="folder for the markdown and the charts")
    args = parser.parse_args(argv)
    try:
        result = read(args.result)
        old = None if args.compare is None else read(args.compare)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(document(result, old))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write(result, args.out / args.result.stem, old)
    return 0


if __name__ == "__main__":
    sys.exit(main())
