"""Times every op beside its peers, each checked against float64 before it is timed.

    python -m benchmarks.run                          the CPU shapes, on this machine
    python -m benchmarks.run --device cuda            64M elements in bfloat16 (128 MiB a tensor)
    python -m benchmarks.run --op adaln --rounds 20

Peers take turns inside every round, so that a drift of the clock meets all of them; a figure is
the median over the rounds. `% of copy` is the op's bytes over its time against a copy of a tensor
of the same size, timed in the same run. An output that is wrong gets no figure.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.registry import OPS, Op, Peer
from dblocks.testing import error_budget

CPU_SHAPES = ((4, 64, 192), (2, 512, 768), (4, 1024, 1024))
GPU_SHAPES = ((8, 4096, 2048),)


def clock(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Milliseconds for one call, as the mean of `repeats` calls."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) * 1e3 / repeats


def interleaved(
    runs: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """The times of every run, `rounds` of each, taken in turns after a warm-up."""
    repeats = {}
    for name, run in runs.items():
        clock(run, device, 2)
        repeats[name] = max(1, min(100, int(20 / max(clock(run, device, 1), 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(clock(run, device, repeats[name]))
    return times


def compiled(function: Peer) -> Peer:
    """`function` through torch.compile; fullgraph makes a silent fall back to eager an error."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def peers_of(op: Op) -> dict[str, Peer]:
    """Who takes part: ours, the best plain form, and that form compiled."""
    return {"dblocks": op.ours, "eager": op.eager, "torch.compile": compiled(op.eager)}


def gradients(op: Op, outputs: Sequence[Tensor], leaves: dict[str, Tensor]) -> list[Tensor]:
    wanted = [leaves[name] for name in op.needs_grad]
    upstream = [torch.ones_like(o) if o.ndim == 1 else _upstream(o) for o in outputs]
    return list(torch.autograd.grad(outputs, wanted, upstream, retain_graph=True))


_cached: dict[tuple, Tensor] = {}


def _upstream(output: Tensor) -> Tensor:
    """A normal upstream gradient, drawn once: zeros and ones would let the clock run faster."""
    key = (output.shape, output.dtype, output.device)
    if key not in _cached:
        g = torch.Generator(output.device).manual_seed(1)
        _cached[key] = torch.randn(
            output.shape, generator=g, dtype=output.dtype, device=output.device
        )
    return _cached[key]


def wrong(op: Op, peer: Peer, inputs: dict[str, Tensor]) -> str:
    """Why the peer's result cannot be trusted; empty where it can."""
    outputs = _tensors(peer(**inputs))
    if not all(torch.isfinite(o).all() for o in outputs):
        return "not finite"
    eager = _tensors(op.eager(**inputs))
    if op.random:
        pairs = [(o.double().std(), e.double().std()) for o, e in zip(outputs, eager, strict=True)]
        bad = [f"standard deviation {o:.4f} != {e:.4f}" for o, e in pairs if abs(o / e - 1) > 0.05]
        return "; ".join(bad)
    ref64 = _tensors(op.eager(**{k: v.double() for k, v in inputs.items()}))
    for got, reference, own in zip(outputs, ref64, eager, strict=True):
        error = (got.double() - reference).abs().max().item()
        limit = error_budget(reference, own, got.dtype)
        if error > limit:
            return f"error {error:.2e} over the budget {limit:.2e}"
    return ""


def _tensors(outputs: Sequence[Tensor | None]) -> list[Tensor]:
    return [o for o in outputs if o is not None]


def measure(
    op: Op, shape: Sequence[int], dtype: torch.dtype, device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """One row for each peer, forward and backward."""
    inputs = op.make(shape, dtype, device)
    peers = peers_of(op)
    notes = {}
    with torch.no_grad():
        for name, peer in peers.items():
            notes[name] = wrong(op, peer, inputs)
    source = torch.randn(shape, device=device).to(dtype)
    target = torch.empty_like(source)
    good = {name: peer for name, peer in peers.items() if not notes[name]}
    elements, size = source.numel(), source.element_size()
    rows = []
    for direction in ("forward", "backward") if op.needs_grad else ("forward",):
        runs: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
        for name, peer in good.items():
            runs[name] = _run(op, peer, inputs, direction)
        times = interleaved(runs, device, rounds)
        copy_rate = 2 * size * elements / statistics.median(times.pop("copy"))
        moved = (op.bytes_forward if direction == "forward" else op.bytes_backward)(size) * elements
        for name in peers:
            row = {"op": op.name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
            row |= {"direction": direction, "peer": name, "wrong": notes[name]}
            if name in times:
                low, median, high = (
                    statistics.quantiles(times[name], n=5, method="inclusive")[0],
                    statistics.median(times[name]),
                    statistics.quantiles(times[name], n=5, method="inclusive")[3],
                )
                row |= {"ms": median, "ms_p20": low, "ms_p80": high}
                row |= {"gb_per_s": moved / median / 1e6, "of_copy": moved / median / copy_rate}
            rows.append(row)
    return rows


def _run(op: Op, peer: Peer, inputs: dict[str, Tensor], direction: str) -> Callable[[], object]:
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return peer(**inputs)

        return forward
    leaves = {k: v.detach().requires_grad_(k in op.needs_grad) for k, v in inputs.items()}
    outputs = [o for o in _tensors(peer(**leaves)) if o.requires_grad]
    return lambda: gradients(op, outputs, leaves)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a markdown table; `speed-up` is the peer's time over that of dblocks."""
    lines = [
        "| op | shape | dtype | direction | peer | ms (p20-p80) | GB/s | % of copy | dblocks is |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ours = {_key(r): r["ms"] for r in rows if r["peer"] == "dblocks" and "ms" in r}
    for r in rows:
        shape = "x".join(map(str, r["shape"]))
        head = f"| {r['op']} | {shape} | {r['dtype']} | {r['direction']} | {r['peer']} |"
        if "ms" not in r:
            lines.append(f"{head} wrong: {r['wrong']} | | | |")
            continue
        times = f"{r['ms']:.3f} ({r['ms_p20']:.3f}-{r['ms_p80']:.3f})"
        ratio = f"{r['ms'] / ours[_key(r)]:.2f}x" if _key(r) in ours else ""
        lines.append(
            f"{head} {times} | {r['gb_per_s']:.0f} | {100 * r['of_copy']:.0f} % | {ratio} |"
        )
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple:
    return row["op"], tuple(row["shape"]), row["dtype"], row["direction"]


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on: device, versions and the commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": name or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit.stdout.strip() or None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--op", default=None, choices=[op.name for op in OPS])
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "T", "D"), default=None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table")
    args = parser.parse_args()
    device = torch.device(args.device)
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    if args.shape:
        shapes = (tuple(args.shape),)
    names = [args.dtype] if args.dtype else ["bfloat16"] if device.type == "cuda" else ["float32"]
    torch._functorch.config.donated_buffer = False  # the backward is timed again and again
    rows: list[dict[str, Any]] = []
    for op in OPS:
        for shape in shapes if args.op in (None, op.name) else ():
            for name in names:
                print(f"{op.name} {shape} {name}", file=sys.stderr, flush=True)
                rows += measure(op, shape, getattr(torch, name), device, args.rounds)
    print(table(rows))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        record = {"environment": environment(device), "rows": rows}
        (args.out / f"ops-{device.type}.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / f"ops-{device.type}.md").write_text(table(rows) + "\n")
    return 1 if any(r["wrong"] for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
