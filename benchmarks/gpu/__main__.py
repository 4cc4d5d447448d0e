"""One run on a GPU, most important parts first: correctness, speed, and comparison with baselines.

    python -m benchmarks.gpu --budget 420 --out build/gpu       at most seven minutes
    python -m benchmarks.gpu --dry --out build/gpu              every call, small, on a CPU

Parts: ceilings; adaln and residual_adaln at six widths; attention at seven shapes; noise and loss;
    host time and a CUDA graph; Inductor; FlexAttention; then tests. Each row is printed at once and
    added to gpu.jsonl, whose first row has the commit, the versions and the device. If a part
    fails, its row says so and the others continue; parts beyond the budget are listed. Kernels are
    compiled first, on all cores. A dry run uses Triton's interpreter; its rows are marked, and
    their figures are meaningless.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read at the import of the first kernel

import torch

ROUNDS = 7


class Run:
    """The device, the clock and the rows of one run."""

    def __init__(self, out: Path, budget: float, dry: bool) -> None:
        self.out, self.budget, self.dry = out, budget, dry
        self.device = torch.device("cpu" if dry else "cuda")
        # The interpreter does not support bfloat16 matrix products.
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.began = time.monotonic()
        self.copy = float("nan")  # bytes/s, once measured
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / "gpu.jsonl"
        self.file.unlink(missing_ok=True)

    def left(self) -> float:
        """Seconds left in the budget."""
        return self.budget - (time.monotonic() - self.began)

    def row(self, **fields: Any) -> None:
        """Prints and writes a row."""
        if self.dry:
            fields = {"dry": True, **fields}
        text = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items())
        print("  ".join(text), flush=True)
        known = {k: None if v != v else v for k, v in fields.items()}  # JSON has no NaN
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(known) + "\n")

    def allows(self, **about: Any) -> bool:
        """Whether there is time for another measurement; writes a row if there is not."""
        if self.left() > 0:
            return True
        self.row(**about, skipped=f"the budget of {self.budget:.0f} s is spent")
        return False

    def times(self, calls: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict:
        """Median milliseconds of each call, interleaved; NaN in a dry run with one call each.

        The callers' tensors are larger than the L2 cache.
        """
        from statistics import median

        from benchmarks.ops import timing

        if self.dry:
            for call in calls.values():
                call()
            return dict.fromkeys(calls, float("nan"))
        found = timing.interleaved(calls, self.device, rounds, round_ms=15.0)
        return {name: median(each) for name, each in found.items()}

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers in the run's dtype."""
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)


def environment(run: Run) -> None:
    """Writes a row with commit, versions and device."""
    from benchmarks.ops import timing

    run.row(part="environment", **timing.environment(run.device))


def run_parts(run: Run, chosen: list[str]) -> int:
    """Runs the parts within the budget; returns the number of failed parts."""
    from benchmarks.gpu.parts import PARTS

    parts = {"environment": environment, **PARTS}
    failed = 0
    for name, part in parts.items():
        if (chosen and name not in chosen and name != "environment") or not run.allows(part=name):
            continue
        began = time.monotonic()
        try:
            part(run)
            run.row(part=name, done=True, seconds=time.monotonic() - began)
        except Exception as error:
            failed += 1
            traceback.print_exc(limit=4)
            run.row(part=name, failed=f"{type(error).__name__}: {str(error)[:300]}")
        if not run.dry:
            torch.cuda.empty_cache()
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--budget", type=float, default=420, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of gpu.jsonl")
    parser.add_argument("--dry", action="store_true", help="every call, small, on a CPU")
    parser.add_argument("--part", action="append", default=[], help="only this part; repeatable")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --dry tries every call on a CPU")
    return 1 if run_parts(Run(args.out, args.budget, args.dry), args.part) else 0


if __name__ == "__main__":
    sys.exit(main())
