"""Fine-tunes a pretrained model in blocks, with and without its own loss, and end to end.

    python -m benchmarks.models.finetune --out benchmarks/results/finetune

A small Llama is pretrained once on the documentation that ships with Python; every arm then takes
the same number of steps on the source of the standard library. Bits per character on held-out code
and documentation are measured for the plain model after training and for the blocks, as are memory
and time. Each arm's learning rate is the best of four on validation modules: by the plain model's
bits if its loss is trained, otherwise by the bits of the blocks.

It runs on one thread: for such a small model, more threads gain little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.models.finetune import report
from benchmarks.models.finetune.arms import ARMS, Settings
from benchmarks.models.finetune.runs import measure
from benchmarks.ops import timing
from dblocks.recipes.records import use_one_thread, write_record


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models.finetune", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--kept", type=Path, default=Path("runs/finetune"),
        help="the pretrained model and finished runs; delete it when code changes",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of every arm")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the table")
    args = parser.parse_args(argv)
    use_one_thread()
    record = measure(Settings(), ARMS, args.kept, args.rounds)
    print(report.table(record))
    if args.out:
        write_record(args.out / "finetune-cpu.json", record)
        (args.out / "finetune-cpu.md").write_text(report.page(record))
    return 0


if __name__ == "__main__":
    timing.restart_with_malloc_settings()
    sys.exit(main())
