"""Runs what a study misses, and says what there is: a killed study goes on where it was."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.archive import Archive
from benchmarks.study.experiment import run_missing
from benchmarks.study.rows import Found, Row, Study
from dblocks.recipes.data.splits import Images
from dblocks.recipes.keeping import Keeping
from dblocks.recipes.records import train, use_one_thread, write_record
from dblocks.recipes.run import Run
from dblocks.recipes.tables import text_table

KEPT = Path("runs/study")  # checkpoints of runs that are under way
EVERY = 250  # steps between two checkpoints
QUICK = Path("runs/quick")  # records of `--quick`
QUICK_WINDOWS = 8  # of held-out text that are scored
QUICK_IMAGES = 500  # that a run is judged by
QUICK_SHARE = 100  # by what its steps are divided


def run_study(study: Study, rows: Sequence[Row], folder: Path, *, workers: int = 2) -> None:
    """Chooses learning rates and runs all seeds of rows; finished runs are not run again.

    Args:
        study: whose records are kept.
        rows: of it, which are run.
        folder: of the records.
        workers: processes at a time.
    """
    train_one = partial(study.train or train_kept, kept=KEPT)
    found = Found(study, folder)
    sources = [study.row(row.rate_of) if row.rate_of else row for row in rows]
    jobs: dict[Path, Run] = {}
    # Grids grow while their best rate is at the edge.
    while jobs != (jobs := all_of(sources, found.selection)):
        run_missing(jobs, study.headline, workers, train_one)
        found = Found(study, folder)
    for row in dict.fromkeys(source.name for source in sources):
        edge = ", at the edge of what was tried" if found.at_edge(study.row(row)) else ""
        print(f"{study.name} {row}: learning rate {found.lr(study.row(row)):g}{edge}")
    run_missing(all_of(rows, found.final), study.headline, workers, train_one)
    Archive(found.folder).pack()


def run_quick(study: Study, rows: Sequence[Row], folder: Path, *, workers: int = 2) -> None:
    """A hundredth of each row's steps, one seed, one learning rate: shows that all of it runs."""
    short: dict[Path, Run] = {}
    for row in rows:
        source = study.row(row.rate_of) if row.rate_of else row
        run: Any = dataclasses.replace(
            row.run,
            steps=max(2, row.run.steps // QUICK_SHARE),
            lr=sorted(source.lrs)[len(source.lrs) // 2],
            points=1,
            part="final",
        )
        if hasattr(run, "samples"):
            run = dataclasses.replace(run, samples=100, sampling_steps=5)
        if hasattr(run, "windows"):  # all of the held-out text takes longer than the training
            run = dataclasses.replace(run, windows=QUICK_WINDOWS)
        short[folder / f"{row.name}.json"] = run
    run_missing(short, study.headline, workers, train_quick)
    there = Archive(folder).load()
    print(text_table({row.title: [there[row.name]] for row in rows}, study.columns))


def train_quick(run: Run, path: Path) -> dict[str, Any]:
    """One run on one thread, evaluated on few images, and its record."""
    use_one_thread()
    record = train(run, prepare=_with_few_images).record
    write_record(path, record)
    return record


def _with_few_images(trainer: Any) -> None:
    """The run is judged by few images; its batches are those of all."""
    for name in ("data", "evaluated"):
        images = getattr(trainer, name, None)
        if isinstance(images, Images):
            setattr(trainer, name, images[torch.arange(min(QUICK_IMAGES, len(images)))])


def train_kept(run: Run, path: Path, kept: Path) -> dict[str, Any]:
    """One run on one thread, and its record; checkpoints on the way, so that it can be killed."""
    use_one_thread()
    folder = kept / path.parent.name / path.stem
    keeping = Keeping(folder=folder / "checkpoints", every=EVERY, keep=1, resume=True)
    record = train(run, keeping=keeping).record
    write_record(path, record)
    shutil.rmtree(folder, ignore_errors=True)
    return record


def status(study: Study, rows: Sequence[Row], folder: Path) -> str:
    """A line for each row: what is there, and for what is not the command and predicted hours."""
    found = Found(study, folder)
    lines = [f"{study.name}: {study.title}"]
    for row in rows:
        missing = found.missing(row)
        state = "done" if not missing else f"{len(row.seeds) - missing} of {len(row.seeds)} seeds"
        if missing and not row.planned:
            state += ", defined, not run"
        todo = f"; {command(study, row)}, {hours(found, row):.1f} h" if missing else ""
        lines.append(f"  {row.part:11} {row.name:28} {state}{todo}")
    return "\n".join(lines)


def command(study: Study, row: Row) -> str:
    """What runs a row."""
    return f"python -m benchmarks.study study {study.name} --rows {row.name}"


def part_command(study: Study, row: Row) -> str:
    """What runs a row and the others of its part that are as planned as it is."""
    start = f"python -m benchmarks.study study {study.name}"
    rows = [other for other in study.rows if other.part == row.part]
    if row.planned:
        return f"{start} --part {row.part}"
    if any(other.planned for other in rows):
        return f"{start} --rows {' '.join(other.name for other in rows if not other.planned)}"
    return f"{start} --part {row.part} --all"


def hours(found: Found, row: Row) -> float:
    """Predicted hours of one core for what a row misses, with the runs that choose its rate."""
    selection = found.selection(row).items()
    steps = sum(run.steps for path, run in selection if path.stem not in found.there)
    return (found.missing(row) + steps / row.run.steps) * row.hours


def all_of(rows: Sequence[Row], of: Callable[[Row], Mapping[Path, Run]]) -> dict[Path, Run]:
    """The runs of many rows, by the path of their record."""
    return {path: run for row in rows for path, run in of(row).items()}
