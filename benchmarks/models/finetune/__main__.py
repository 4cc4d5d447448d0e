"""Fine-tunes a pretrained model in blocks, with and without its own loss, and end to end.

    python -m benchmarks.models.finetune --out benchmarks/results/finetune

A small Llama learns the documentation that ships with Python, once; every arm then takes the same
number of steps on the source of its standard library. The bits per character on held-out code and
documentation are those of the plain model after training and those of the blocks; memory and time
are measured. Each arm's learning rate is the best of four on other modules than those held out: by
the plain model's bits where its loss is trained, otherwise by the blocks' bits.

It runs on one thread: more threads gain little for such a small model.
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
    parser.add_argument("--rounds", type=int, default=5, help="turns of every arm that are timed")
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
