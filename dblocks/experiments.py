"""The comparison on handwritten digits: `python -m dblocks.experiments demo|results`.

`demo` trains end to end and in 3 blocks once, in minutes. `results` runs the full recipe: a grid
of learning rates on a validation split, then three seeds on the held-out part; it leaves a record
of each run, skips those that are there, and makes the README's table and figure of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from dblocks.blocks import BlocksConfig
from dblocks.checkpoint import make_folder
from dblocks.plots import Curve, comparison_figure, save_png
from dblocks.recipe import Run
from dblocks.records import (
    read_record,
    train,
    train_to_record,
    use_one_thread,
    write_record,
)
from dblocks.report import (
    Row,
    markdown_table,
    percent,
    summarize,
    text_table,
    write_between_markers,
)

RECORDS = Path("benchmarks/results/vit_digits")
FIGURE = Path("docs/images/vit_digits.png")
README = Path("README.md")
DEMO = Path("runs/demo")
MARKER = "results:vit-digits"

BLOCKS = Run(blocks=3, steps=4500)
# 1,500 steps of 12 layers run as many layers as 4,500 steps of 4.
END_TO_END = Run(end_to_end=True, steps=1500)
END_TO_END_3X = Run(end_to_end=True, steps=4500)
ROWS: Mapping[str, tuple[str, Run]] = {
    "blocks": ("3 blocks, equal layer evaluations", BLOCKS),
    "end_to_end": ("end to end", END_TO_END),
    "end_to_end_3x": ("end to end, 3 times the steps (equal samples)", END_TO_END_3X),
}
LRS = (2.5e-4, 5e-4, 1e-3, 2e-3)
SEEDS = (0, 1, 2)
SELECTION_SEED = 100
# Rates are chosen with runs as long as the final ones, since the best rate falls with the length;
# the longest row's, with a fifth of its steps.
SELECTION_SHORTER = {"blocks": 1, "end_to_end": 1, "end_to_end_3x": 5}
DEMO_SHORTER = 3

Records = list[dict[str, Any]]


def selection_runs(row: str) -> list[Run]:
    """The runs that choose the learning rate of a row; they never see the held-out digits."""
    _, run = ROWS[row]
    short = dataclasses.replace(
        run, steps=run.steps // SELECTION_SHORTER[row], seed=SELECTION_SEED, part="selection"
    )
    return [dataclasses.replace(short, lr=lr) for lr in LRS]


def final_runs(row: str, lr: float) -> list[Run]:
    """The runs behind a row of the table."""
    return [dataclasses.replace(ROWS[row][1], lr=lr, seed=seed) for seed in SEEDS]


def record_path(folder: Path, row: str, run: Run) -> Path:
    """Where the record of a run is kept."""
    return folder / f"{run.part}-{row}-lr{run.lr:g}-seed{run.seed}.json"


def chosen_lr(records: Records) -> float:
    """The learning rate of the best validation accuracy; of equal ones the smallest."""
    best = min(records, key=lambda r: (-r["accuracy"], r["run"]["lr"]))
    return best["run"]["lr"]


def run_missing(folder: Path, jobs: Mapping[Path, Run], workers: int) -> None:
    """Train those runs whose records are not there, several processes of one thread at a time.

    Raises:
        ValueError: a record that is there was made by another recipe.
    """
    missing = {path: run for path, run in jobs.items() if not _is_done(path, run)}
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are there, {len(missing)} to do")
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=context) as pool:
        futures = {pool.submit(train_to_record, run, path): path for path, run in missing.items()}
        for number, future in enumerate(as_completed(futures), 1):
            record = future.result()
            print(
                f"[{number}/{len(missing)}] {time.strftime('%H:%M:%S')} {futures[future].stem}: "
                f"{100 * record['accuracy']:.1f} % in {record['seconds']:.0f} s",
                flush=True,
            )


def _is_done(path: Path, run: Run) -> bool:
    if not path.exists():
        return False
    record: Any = read_record(path)
    try:
        made = Run.from_dict(record.get("run"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}; delete it to run it again") from error
    if made != run:
        raise ValueError(f"{path} was made by another recipe; delete it to run it again")
    return True


def results(
    folder: Path = RECORDS, figure: Path = FIGURE, readme: Path = README, workers: int = 2
) -> None:
    """The full recipe, then the README's table and figure from the records."""
    selections = {row: selection_runs(row) for row in ROWS}
    run_missing(folder, _jobs(folder, selections), workers)
    tried = {row: _read(folder, row, runs) for row, runs in selections.items()}
    lrs = {row: chosen_lr(records) for row, records in tried.items()}
    print("learning rates chosen on the validation split: " + str(lrs))
    finals = {row: final_runs(row, lrs[row]) for row in ROWS}
    run_missing(folder, _jobs(folder, finals), workers)
    records = {row: _read(folder, row, runs) for row, runs in finals.items()}
    rows = [summarize(ROWS[row][0], records[row]) for row in ROWS]
    print(text_table(rows))
    print(provenance([r for many in (*tried.values(), *records.values()) for r in many]))
    draw({ROWS[row][0]: records[row] for row in ROWS}, figure)
    write_between_markers(readme, MARKER, f"{markdown_table(rows)}\n\n{caption(rows)}")
    print(f"wrote {figure} and the table in {readme}")


def _jobs(folder: Path, runs: Mapping[str, Sequence[Run]]) -> dict[Path, Run]:
    return {record_path(folder, row, run): run for row, many in runs.items() for run in many}


def _read(folder: Path, row: str, runs: Sequence[Run]) -> Records:
    return [read_record(record_path(folder, row, run)) for run in runs]


def provenance(records: Records) -> str:
    """The commits that made the records, and a warning where these may not be comparable."""
    commits = sorted({r["environment"]["commit"] or "unknown" for r in records})
    lines = [f"commits that made the {len(records)} records: {', '.join(commits)}"]
    if len(commits) > 1:
        lines.append("warning: the records are of several commits, which may differ in the recipe")
    if any(c == "unknown" or c.endswith("-dirty") for c in commits):
        lines.append("warning: not every record is of committed code (dirty, unknown)")
    return "\n".join(lines)


def caption(rows: Sequence[Row]) -> str:
    """How the table was made, in a paragraph for the README."""
    seeds = ", ".join(map(str, SEEDS))
    rates = ", ".join(f"{lr:g}" for lr in LRS)
    alone = "".join(
        f"; the first block alone, with 1 step, reaches {percent(r.first_block, r.first_block_std)}"
        for r in rows
        if r.first_block is not None
    )
    return (
        "A ViT of 12 layers and width 64 on scikit-learn's digits: 1,258 for training, 539 held "
        "out (30 % of each class), batches of 128, AdamW with a cosine. Accuracy is the mean ± "
        f"sample standard deviation of seeds {seeds}. Each line's learning rate is the best of "
        f"{{{rates}}} on a validation split, a fifth of the training part that selection runs do "
        "not train on; they have another seed and as many steps, in the third line a fifth. Blocks "
        f"classify with 3 denoising steps{alone}. Memory is counted in tensors: what autograd "
        "saves for one backward pass; and parameters, gradients and optimizer state of what one "
        "step trains (all that a worker of one block holds), in brackets of the whole process, "
        "which holds every block. Seconds are for one thread of a shared CPU, two runs at a time. "
        "Every run's record is in `benchmarks/results/vit_digits/`; "
        "`make results` makes the table from them and runs those that are missing."
    )


def draw(records: Mapping[str, Records], path: Path) -> None:
    """The figure of finished runs; `records` maps the name of a curve to its runs."""
    curves = [
        Curve(
            label=name,
            layer_evaluations=[point["layer_evaluations"] for point in runs[0]["curve"]],
            accuracies=[[point["accuracy"] for point in run["curve"]] for run in runs],
        )
        for name, runs in records.items()
    ]
    blocked = next(run for runs in records.values() for run in runs if run["blocks"] is not None)
    config = BlocksConfig.from_dict(blocked["blocks"])
    figure = comparison_figure(
        curves,
        config.schedule,
        config.num_blocks,
        config.layer_ranges(blocked["run"]["depth"]),
        title="A 12-layer ViT on handwritten digits, trained end to end and in blocks",
    )
    save_png(figure, path)


def demo(out: Path = DEMO, shorter: int = DEMO_SHORTER) -> None:
    """Train end to end and in 3 blocks with one seed and fewer steps; print what came of it."""
    make_folder(out)
    use_one_thread()
    runs = [dataclasses.replace(run, steps=run.steps // shorter) for run in (END_TO_END, BLOCKS)]
    records = [train(run, progress=True).record for run in runs]
    rows = [summarize(run.name, [record]) for run, record in zip(runs, records, strict=True)]
    write_record(out / "run.json", records)
    draw({row.name: [record] for row, record in zip(rows, records, strict=True)}, out / FIGURE.name)
    print(f"\n{text_table(rows)}\n\n{_moral(*rows)}\n")
    print(f"Files: {out / FIGURE.name} (both curves, and each block's noise), {out / 'run.json'}")


def _moral(whole: Row, blocks: Row) -> str:
    """What the demo's table shows, in words."""
    activations = blocks.activations_mib / whole.activations_mib
    state = blocks.state_mib / whole.state_mib
    gain = 100 * (blocks.accuracy - whole.accuracy)
    times = blocks.samples // whole.samples
    return (
        f"Both ran {whole.layer_evaluations:,} layers on batches of 128. In blocks a step ran and "
        f"differentiated {blocks.layers_per_step} of the 12 layers: it saved {activations:.0%} of "
        f"the activations\nand trained {state:.0%} of the state. It took {times} times "
        f"the steps, and the accuracy came out {abs(gain):.1f} points "
        f"{'higher' if gain >= 0 else 'lower'}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`demo` or `results`; a mistake is one line on stderr and the exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m dblocks.experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("demo", help="minutes: one seed, a third of the steps")
    one.add_argument("--out", type=Path, default=DEMO, help="folder of run.json and the figure")
    full = commands.add_parser("results", help="about an hour: the whole recipe, resumable")
    full.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    full.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    full.add_argument("--readme", type=Path, default=README, help="file with the table's markers")
    full.add_argument("--figure", type=Path, default=FIGURE, help="the PNG to write")
    args = parser.parse_args(argv)
    try:
        if args.command == "demo":
            demo(args.out)
        else:
            results(args.records, args.figure, args.readme, args.workers)
    except (ImportError, ValueError, OSError) as error:
        print(f"dblocks: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
