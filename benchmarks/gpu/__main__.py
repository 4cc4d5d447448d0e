"""One run on a GPU, most valuable parts first: correctness, speed, and comparison with baselines.

    python -m benchmarks.gpu --budget 420 --out build/gpu       at most seven minutes
    python -m benchmarks.gpu --dry --out build/gpu              every call, small, on a CPU

Ceilings; adaln and residual_adaln at six widths; attention at seven shapes; noise and loss; host
time and a CUDA graph; Inductor; FlexAttention; then tests. Each row is printed as it comes and
added to gpu.jsonl, whose first row names the commit, the versions and the device. A part that fails
has a row that says so, and the others go on; what the budget does not allow is named. Kernels are
compiled beforehand by all cores. A dry run uses Triton's interpreter; its rows are marked, and no
figure of them means anything.
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
    os.environ["TRITON_INTERPRET"] = "1"  # read when the first kernel is imported

import torch

ROUNDS = 7


class Run:
    """The device, the clock and the rows of one run."""

    def __init__(self, out: Path, budget: float, dry: bool) -> None:
        self.out, self.budget, self.dry = out, budget, dry
        self.device = torch.device("cpu" if dry else "cuda")
        # The interpreter multiplies no bfloat16 matrices.
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.began = time.monotonic()
        self.copy = float("nan")  # bytes/s, once measured
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / "gpu.jsonl"
        self.file.unlink(missing_ok=True)

    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - (time.monotonic() - self.began)

    def row(self, **fields: Any) -> None:
        """Prints a row and writes it."""
        if self.dry:
            fields = {"dry": True, **fields}
        text = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items())
        print("  ".join(text), flush=True)
        known = {k: None if v != v else v for k, v in fields.items()}  # JSON has no NaN
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(known) + "\n")

    def allows(self, **about: Any) -> bool:
        """Whether there is time for one more; says so where there is not."""
        if self.left() > 0:
            return True
        self.row(**about, skipped=f"the budget of {self.budget:.0f} s is spent")
        return False

    def times(self, calls: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict:
        """Median milliseconds of each call, in turns; NaN in a dry run, which calls each once.

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
    """What every figure depends on."""
    from benchmarks.ops import timing

    run.row(part="environment", **timing.environment(run.device))


def run_parts(run: Run, chosen: list[str]) -> int:
    """Runs every part that there is time for; the number of those that failed."""
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
    parser.add_argument("--part", action="append", default=[], help="only this one; repeatable")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("no GPU is there for torch; --dry tries every call on a CPU")
    return 1 if run_parts(Run(args.out, args.budget, args.dry), args.part) else 0


if __name__ == "__main__":
    sys.exit(main())
