"""Times every op and its baselines, each checked against float64 before it is timed.

    python -m benchmarks.ops.run                      all shapes of this machine's CPU python -m
    benchmarks.ops.run --device cuda        64M elements in bfloat16 (128 MiB a tensor) python -m
    benchmarks.ops.run --device cuda --budget 180  the first shape of every op first python -m
    benchmarks.ops.run --op adaln --rounds 20 python -m benchmarks.ops.run --compare old.json   also
    print changes

Implementations are interleaved in every round, so that a drift of the clock affects all of them;
the reference of dblocks is timed afterwards. A figure is the median over the rounds, with the 20th
and 80th percentiles. Implementations with a wrong output or gradient get no figure. The ceilings, a
copy of a tensor of the same size and a matrix product, are timed in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops import report, timing
from benchmarks.ops.baselines import implementations_of
from benchmarks.ops.checks import gradients, leaves_of, tensors, wrong
from benchmarks.ops.op import DTYPES, Absent, Baseline, Implementation, Op, Work
from benchmarks.ops.registry import OPS

DIRECTIONS = ("forward", "backward", "both")
REFERENCE = "reference"  # name of the dblocks reference as a baseline
OVERHEAD_WIDTH = 8  # one row, for which a CPU call is all overhead
NO_MEMORY = "out of memory"


def measure(
    op: Op,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    *,
    memory: bool = False,
) -> list[dict[str, Any]]:
    """One row for each implementation and direction."""
    inputs = op.make(shape, dtype, device)
    found = implementations_of(op, device)
    head = {"op": op.name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
    once: dict[str, dict[str, Any]] = {}
    good: dict[str, Baseline] = {}
    for name, given in found.items():
        once[name] = _examine(op, given, inputs, device)
        if once[name].get("absent") or once[name]["wrong"]:
            continue
        assert not isinstance(given, str)
        good[name] = as_baseline(given)
        if device.type == "cuda":
            forward = call_of(op, good[name].call, inputs, "forward")
            once[name]["host_us"] = timing.host_us(forward, device)
        elif memory:
            arguments = ["benchmarks.ops.memory", op.name, name, head["dtype"], *map(str, shape)]
            once[name]["peak_bytes"] = timing.fresh_process(arguments)
    source = torch.randn_like(next(iter(inputs.values())), dtype=dtype)
    target = torch.empty_like(source)
    work = op.work(shape, source.element_size())
    rows = []
    for direction in DIRECTIONS if op.needs_grad else DIRECTIONS[:1]:
        runs: dict[str, timing.Run] = {"copy": lambda: target.copy_(source)}
        taking_part = {
            name: baseline
            for name, baseline in good.items()
            if direction == "forward" or not baseline.forward_only
        }
        runs |= {n: call_of(op, p.call, inputs, direction) for n, p in taking_part.items()}
        full = _without_memory(runs)
        runs = {n: run for n, run in runs.items() if n not in full}
        # The reference may fill gigabytes, after which the machine is slower for more than a call:
        # it is timed after the others.
        last = {n: runs.pop(n) for n in [REFERENCE] if n in runs}
        times = timing.interleaved(runs, device, rounds) | timing.interleaved(last, device, rounds)
        copy = 2 * source.nbytes / statistics.median(times.pop("copy"))
        moved, operations = _of_direction(work, direction)
        for name in found:
            row = head | {"direction": direction, "implementation": name} | once[name]
            if name in good and name not in taking_part:
                row["absent"] = good[name].forward_only
            if name in full:
                row["absent"] = NO_MEMORY
            if name in times:
                row |= _figures(times[name], moved, operations, copy)
                if device.type == "cuda":
                    row["peak_bytes"] = timing.cuda_peak_bytes((runs | last)[name])
            rows.append(row)
    return rows


def _figures(times: list[float], moved: float, operations: float, copy: float) -> dict[str, Any]:
    """Times of a call and its rates; `copy` is the rate of a copy, in bytes per ms."""
    figures = timing.summary(times)
    ms = figures["ms"]
    rates = {
        "gb_per_s": moved / ms / 1e6,
        "of_copy": moved / ms / copy,
        "gflops": operations / ms / 1e6,
    }
    return figures | rates


def _without_memory(runs: dict[str, timing.Run]) -> list[str]:
    """The implementations that run out of memory; their rows say so, and the others are timed."""
    full = []
    for name, run in runs.items():
        try:
            run()
        except torch.OutOfMemoryError:
            full.append(name)
            torch.cuda.empty_cache()
    return full


def as_baseline(call: Implementation | Baseline) -> Baseline:
    """An implementation as a `Baseline`."""
    return call if isinstance(call, Baseline) else Baseline(call)


def part_of(op: Op, baseline: Baseline) -> Op:
    """`op`, without gradients for a baseline that has none."""
    return op._replace(needs_grad=()) if baseline.forward_only else op


def _examine(
    op: Op,
    given: Implementation | Absent | Baseline,
    inputs: dict[str, Tensor],
    device: torch.device,
) -> dict[str, Any]:
    """The results before timing: absent, wrong, and the time of the first call."""
    if isinstance(given, str):
        return {"absent": given, "wrong": ""}
    baseline = as_baseline(given)
    op = part_of(op, baseline)
    try:
        first = timing.first_call_ms(call_of(op, baseline.call, inputs, "both"), device)
        return {"first_ms": first, "wrong": wrong(op, baseline.call, inputs, baseline.definition)}
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return {"absent": f"{NO_MEMORY} ({str(error)[:60]})", "wrong": ""}


def overhead(op: Op, device: torch.device) -> list[dict[str, Any]]:
    """Microseconds of a CPU call on one row of eight elements, with negligible arithmetic."""
    dims = len(op.shapes[device.type][0])
    inputs = op.make((*(1,) * (dims - 1), OVERHEAD_WIDTH), torch.float32, device)
    rows = []
    for direction in ("forward", "both") if op.needs_grad else ("forward",):
        for name in ("dblocks", "eager"):
            call = op.ours if name == "dblocks" else op.eager
            us = timing.host_us(call_of(op, call, inputs, direction), device)
            head = {"op": op.name, "implementation": name, "direction": direction}
            rows.append(head | {"host_us": us})
    return rows


def _of_direction(work: Work, direction: str) -> tuple[int, int]:
    """Bytes and operations."""
    forward = work.bytes_forward, work.operations_forward
    backward = work.bytes_backward, work.operations_backward
    both = forward[0] + backward[0], forward[1] + backward[1]
    return {"forward": forward, "backward": backward, "both": both}[direction]


def call_of(
    op: Op, call: Implementation, inputs: dict[str, Tensor], direction: str
) -> Callable[[], object]:
    """The function to call repeatedly to time a direction of an implementation."""
    leaves = leaves_of(op, inputs)
    if direction == "forward" or not op.needs_grad:

        def forward() -> object:
            with torch.no_grad():
                return call(**inputs)

        return forward
    if direction == "backward":
        outputs = tensors(call(**leaves))
        return lambda: gradients(op, outputs, leaves)
    return lambda: gradients(op, tensors(call(**leaves)), leaves, keep_graph=False)


def run(
    device: torch.device,
    *,
    ops: Sequence[Op] = OPS,
    shapes: Sequence[Sequence[int]] | None = None,
    dtypes: Sequence[str] | None = None,
    rounds: int = 10,
    memory: bool = False,
    budget: float | None = None,
    emit: Callable[[dict[str, Any]], object] = lambda row: None,
) -> dict[str, Any]:
    """Runs the benchmark; returns the JSON values of a result file. Progress goes to stderr.

    `emit` is called with each row. With a `budget` in seconds, the first shapes of all ops are
    timed before second ones, and cases beyond the budget have a row that says so.
    """
    kind, began = device.type, time.monotonic()
    rows: list[dict[str, Any]] = []
    small: list[dict[str, Any]] = []
    todo = [
        (op, shape, dtype)
        for op in ops
        for shape in shapes or op.shapes[kind]
        for dtype in dtypes or op.dtypes[kind]
    ]
    if budget is not None:
        todo.sort(key=lambda case: list(shapes or case[0].shapes[kind]).index(case[1]))
    for number, (op, shape, dtype) in enumerate(todo, 1):
        if budget is not None and time.monotonic() - began > budget:
            head = {"op": op.name, "shape": list(shape), "dtype": dtype}
            why = {"absent": f"the budget of {budget:.0f} s is spent", "wrong": ""}
            rows.append(head | {"direction": "both", "implementation": "dblocks"} | why)
            emit(rows[-1])
            continue
        print(f"[{number}/{len(todo)}] {op.name} {tuple(shape)} {dtype}", file=sys.stderr)
        largest = max(shapes or op.shapes[kind], key=math.prod)
        for row in measure(
            op, shape, getattr(torch, dtype), device, rounds,
            memory=memory and shape == largest and dtype == (dtypes or op.dtypes[kind])[0],
        ):  # fmt: skip
            rows.append(row)
            emit(row)
    if kind == "cpu":
        small = [row for op in ops for row in overhead(op, device)]
    matmul = {
        name: timing.matmul_tflops(device, getattr(torch, name), rounds)
        for name in dtypes or DTYPES[kind]
    }
    return {
        "format": report.FORMAT,
        "environment": timing.environment(device),
        "rounds": rounds,
        "matmul_tflops": matmul,
        "rows": rows,
        "overhead": small,
    }


def _append(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to the temporary file, which remains if the run is interrupted."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 if an implementation is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ops.run",
        description=(__doc__ or "").partition("\n")[0],
        epilog="A folder given by --out gets ops-<device>.json, .md and a chart for each op.",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--op", action="append", choices=[op.name for op in OPS], help="repeatable")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--shape", type=int, nargs="+", metavar="SIZE", action="append",
        help="N T D; N H Hkv T Dh of doubled_attention, R V D of linear_cross_entropy; repeatable",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=10, help="rounds of every implementation")
    parser.add_argument("--budget", type=float, help="seconds; leaves out the last cases")
    parser.add_argument("--memory", action="store_true", help="peak memory, in fresh processes")
    parser.add_argument("--out", type=Path, help="folder of the result files")
    parser.add_argument("--compare", type=Path, help="a result file to compare with")
    args = parser.parse_args(argv)
    old = None if args.compare is None else report.read(args.compare)
    device = torch.device(args.device)
    ops = [op for op in OPS if not args.op or op.name in args.op]
    for op, shape in itertools.product(ops, args.shape or ()):
        expected = len(op.shapes[args.device][0])
        if len(shape) != expected:
            parser.error(f"--shape of {op.name} must have {expected} sizes, got {shape}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        lines = args.out / f"ops-{device.type}.jsonl"
        lines.unlink(missing_ok=True)
    result = run(
        device,
        ops=ops,
        shapes=args.shape,
        dtypes=args.dtype,
        rounds=args.rounds,
        memory=args.memory,
        budget=args.budget,
        emit=lambda row: _append(lines, row) if args.out else None,
    )
    print(report.document(result, old))
    if args.out:
        lines.unlink()  # replaced by the whole record
        path = args.out / f"ops-{device.type}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        report.write(result, path.with_suffix(""), old)
    return 1 if any(row["wrong"] for row in result["rows"]) else 0


if __name__ == "__main__":
    timing.restart_with_malloc_settings()
    sys.exit(main())
