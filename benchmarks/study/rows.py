"""What a row of a study is: a way of training, its learning rates, its seeds and what it is for.

A study is a list of rows whose records lie in one archive. Everything that reads or runs records
goes by these names: of the row `final-ROW-lrRATE-seedSEED`, of what chooses its learning rate
`selection-...`, see `experiment.record_path`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.archive import Archive
from benchmarks.study.experiment import SELECTION_SEED, Records, best_rate, record_path
from benchmarks.study.quality import Quality
from dblocks.recipes.run import Run
from dblocks.recipes.tables import Column

FACTOR = 2  # between learning rates
MORE_RATES = 3  # that are tried beyond the grid, while the best is at its edge


@dataclass(frozen=True, kw_only=True)
class Row:
    """A way of training with the runs behind it."""

    name: str
    """Short, of the records' files."""
    title: str
    """In tables."""
    method: str
    """What kind of training it is, such as "greedy layer-wise"."""
    part: str = "methods"
    """The table or curve that it belongs to."""
    run: Run
    """But for the learning rate and the seed."""
    lrs: Sequence[float] = ()
    """The grid of learning rates, ascending by a factor of 2; none where `rate_of` names a row."""
    shorter: int = 2
    """By what its steps are divided where the learning rate is chosen."""
    rate_of: str | None = None
    """The row whose learning rate it takes over."""
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    """Of the final runs."""
    hours: float = 0.0
    """Predicted, of one final run on one core."""
    planned: bool = True
    """Whether a study runs it; others are defined, and run where they are named."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Rows whose records are kept together."""

    name: str
    """Such as vit-fashion: of the folder and the archive of the records."""
    title: str
    rows: Sequence[Row]
    quality: Quality
    """What the rows are judged by."""
    headline: Callable[[Mapping[str, Any]], str]
    """What a record reached, in a few words."""
    columns: Sequence[Column]
    """Of the table."""
    reference: str = "end_to_end"
    """The row that others are compared with."""
    train: Callable[[Any, Path, Path], dict[str, Any]] | None = None
    """Trains a run and writes its record to the path, with checkpoints in the folder; by default
    `running.train_kept`."""

    @property
    def records(self) -> Path:
        """The folder of the records, see `Archive`."""
        return Path("benchmarks/results") / self.name.replace("-", "_")

    def row(self, name: str) -> Row:
        """The row of this name.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(f"{self.name} has no row {name!r}; its rows are {self.names()}")

    def names(self, part: str | None = None, *, planned: bool = False) -> list[str]:
        """Names of the rows, of a part or of all, and those that are planned or all."""
        return [
            row.name
            for row in self.rows
            if (part is None or row.part == part) and (row.planned or not planned)
        ]


class Found:
    """What the records of a study say so far.

    Args:
        study: its rows.
        folder: of the records, by default the study's.
    """

    def __init__(self, study: Study, folder: Path | None = None) -> None:
        self.study, self.folder = study, folder or study.records
        self.there = Archive(self.folder).load()

    def rates(self, row: Row) -> list[float]:
        """The learning rates to try: the grid, and those beyond while its best is at the edge."""
        rates = sorted(row.lrs)
        for _ in range(MORE_RATES):
            best = self._best(row, rates)
            if best is None or rates[0] < best < rates[-1]:
                break
            beyond = best / FACTOR if best == rates[0] else best * FACTOR
            rates = sorted([*rates, beyond])
        return rates

    def lr(self, row: Row) -> float | None:
        """The learning rate that was chosen; None where runs are missing."""
        source = row if row.rate_of is None else self.study.row(row.rate_of)
        return self._best(source, self.rates(source))

    def at_edge(self, row: Row) -> bool:
        """Whether the best learning rate so far is the smallest or the largest that was tried."""
        source = row if row.rate_of is None else self.study.row(row.rate_of)
        tried = self._tried(source)
        return bool(tried) and self._best(source, tried) in (tried[0], tried[-1])

    def selection(self, row: Row) -> dict[Path, Run]:
        """The runs that choose the learning rate, by the path of their record."""
        if row.rate_of is not None:
            return {}
        runs = (selection_run(row, lr) for lr in self.rates(row))
        return {record_path(self.folder, row.name, run): run for run in runs}

    def final(self, row: Row) -> dict[Path, Run]:
        """The runs behind the row, as far as its learning rate is chosen."""
        return self._final_at(row, self.lr(row))

    def _final_at(self, row: Row, lr: float | None) -> dict[Path, Run]:
        if lr is None:
            return {}
        runs = (dataclasses.replace(row.run, lr=lr, seed=seed) for seed in row.seeds)
        return {record_path(self.folder, row.name, run): run for run in runs}

    def records(self, row: Row) -> Records:
        """The final records that are there, also while a grid that grows is not done."""
        paths = self._final_at(row, self.lr(row) or self._so_far(row))
        return [self.there[path.stem] for path in paths if path.stem in self.there]

    def missing(self, row: Row) -> int:
        """Final runs that are not there."""
        return len(row.seeds) - len(self.records(row))

    def _so_far(self, row: Row) -> float | None:
        """The best of the rates that were tried, where the first grid was."""
        source = row if row.rate_of is None else self.study.row(row.rate_of)
        if self._best(source, source.lrs) is None:
            return None
        return self._best(source, self._tried(source))

    def _tried(self, source: Row) -> list[float]:
        """The rates of the grid, ascending, whose run is there."""
        return [rate for rate in self.rates(source) if self._best(source, [rate]) is not None]

    def _best(self, row: Row, rates: Sequence[float]) -> float | None:
        """The rate of the smallest error, see `best_rate`; None where runs miss."""
        paths = {lr: record_path(self.folder, row.name, selection_run(row, lr)) for lr in rates}
        if any(path.stem not in self.there for path in paths.values()):
            return None
        return best_rate({lr: self.study.quality.error(self.there[paths[lr].stem]) for lr in rates})


def selection_run(row: Row, lr: float) -> Run:
    """A run that chooses the learning rate; it never sees the held-out part."""
    steps = max(1, row.run.steps // row.shorter)
    return dataclasses.replace(row.run, steps=steps, lr=lr, seed=SELECTION_SEED, part="selection")
