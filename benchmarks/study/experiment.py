"""What every comparison does: choose learning rates, run what is missing, write table and figure.

Learning rates are chosen on a validation split, then three seeds run on the held-out part. Each run
leaves a record; those that are there are not run again.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.study.archive import Archive
from benchmarks.study.pages import measures_block, write_between_markers
from benchmarks.study.plots import Curve, Measure, Panel, comparison_figure, noise_panel
from benchmarks.study.quality import Quality
from dblocks.blocks import BlocksConfig
from dblocks.recipes.image_grid import save_png
from dblocks.recipes.records import train_to_record
from dblocks.recipes.run import Run
from dblocks.recipes.tables import Column, Rows, text_table

REPORT = Path("docs/results.md")
SELECTION_SEED = 100

Records = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Ways of training that are compared, and how their records become a table and a figure."""

    name: str
    """Such as vit-digits: of the records' folder, the figure and the markers in the report."""
    rows: Mapping[str, tuple[str, Run]]
    """A row's title and its run, by the row's short name."""
    lrs: Sequence[float]
    """The learning rates that are tried for each row."""
    beyond: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Further ones of rows whose best was the smallest or the largest of `lrs`."""
    seeds: Sequence[int] = (0, 1, 2)
    """Of the final runs."""
    selection_shorter: Mapping[str, int]
    """By what a row's steps are divided where its learning rate is chosen; rows that are not here
    take the rate of `rates_of`."""
    rates_of: Mapping[str, str] = field(default_factory=dict)
    """The row whose learning rate another takes over."""
    quality: Quality
    """What the rows are judged by."""
    headline: Callable[[Mapping[str, Any]], str]
    """What a record reached, in a few words."""
    columns: Sequence[Column]
    """Of the whole table, for a terminal and the report."""
    caption: Callable[[Rows], str]
    """How the runs were made and measured, in sentences of the report."""
    draw: Callable[[Rows, Path], None]
    """Writes the figure of the rows."""
    finish: Callable[[Path, Mapping[str, Records]], None] | None = None
    """Adds to the final records, in the folder, what needs all of them."""
    stored: Callable[[Path, Mapping[str, Records]], dict[str, Records]] | None = None
    """All rows, with what `finish` added where the folder holds it; computes nothing."""

    @property
    def records(self) -> Path:
        """The folder of the records, see `Archive`."""
        return Path("benchmarks/results") / self.name.replace("-", "_")

    @property
    def figure(self) -> Path:
        """The picture."""
        return Path("docs/images") / f"{self.name.replace('-', '_')}.png"

    def selection_runs(self, row: str) -> list[Run]:
        """The runs that choose the learning rate of a row; they never see the held-out part."""
        _, run = self.rows[row]
        steps = run.steps // self.selection_shorter[row]
        short = dataclasses.replace(run, steps=steps, seed=SELECTION_SEED, part="selection")
        return [dataclasses.replace(short, lr=lr) for lr in self.rates(row)]

    def rates(self, row: str) -> list[float]:
        """The learning rates that are tried for a row, ascending."""
        return sorted({*self.lrs, *self.beyond.get(row, ())})

    def final_runs(self, row: str, lr: float) -> list[Run]:
        """The runs behind a row of the table."""
        return [dataclasses.replace(self.rows[row][1], lr=lr, seed=seed) for seed in self.seeds]

    def chosen_lr(self, records: Records) -> float:
        """The learning rate of the smallest error, see `best_rate`."""
        return best_rate({r["run"]["lr"]: self.quality.error(r) for r in records})

    def results(
        self,
        folder: Path | None = None,
        figure: Path | None = None,
        report: Path = REPORT,
        workers: int = 2,
    ) -> None:
        """The full recipe; then from the records the figure and the report.

        Args:
            folder: of the records.
            figure: the PNG to write.
            report: gets the table, and how it was made, between its markers.
            workers: processes at a time.
        """
        folder, figure = folder or self.records, figure or self.figure
        selections = {row: self.selection_runs(row) for row in self.selection_shorter}
        run_missing(jobs(folder, selections), self.headline, workers)
        tried = read(folder, selections)
        lrs = {row: self.chosen_lr(records) for row, records in tried.items()}
        lrs |= {row: lrs[other] for row, other in self.rates_of.items()}
        print(f"{self.name}: learning rates chosen on the validation split: {lrs}")
        finals = {row: self.final_runs(row, lrs[row]) for row in self.rows}
        run_missing(jobs(folder, finals), self.headline, workers)
        records = read(folder, finals)
        if self.finish is not None:
            self.finish(folder, records)
        Archive(folder).pack()
        rows = {self.rows[row][0]: records[row] for row in self.rows}
        table = text_table(rows, self.columns)
        print(table)
        print(provenance([r for many in (*tried.values(), *records.values()) for r in many]))
        self.draw(rows, figure)
        archive = Archive(self.records).file
        block = measures_block(rows, self.columns, self.caption(rows), archive)
        write_between_markers(report, f"results:{self.name}", block)
        print(f"wrote {figure} and the table in {report}")


def best_rate(errors: Mapping[float, float]) -> float:
    """The learning rate of the smallest error; of several the middle one, the lower of two."""
    best = sorted(rate for rate, error in errors.items() if error == min(errors.values()))
    return best[(len(best) - 1) // 2]


def rates_in_words(lrs: Sequence[float], beyond: Mapping[str, Sequence[float]]) -> str:
    """The learning rates that were tried, for a caption.

    Args:
        lrs: those of each row.
        beyond: further ones by the title of the row.
    """
    listed = ", ".join(f"{lr:g}" for lr in lrs)
    further = "; ".join(
        f"for {title} also {', '.join(f'{lr:g}' for lr in more)}" for title, more in beyond.items()
    )
    return f"{{{listed}}}" + (f" ({further})" if further else "")


def draw_comparison(
    rows: Rows,
    path: Path,
    value: Callable[[Mapping[str, Any]], float],
    *,
    title: str,
    measure: Measure,
    panel: Panel = noise_panel,
) -> None:
    """The figure of finished runs: a measure against layer evaluations, and the blocks' noise.

    Args:
        rows: the records of each curve.
        path: the PNG to write.
        value: reads the measure of a point of a record's curve.
        title: of the figure.
        measure: how it is shown.
        panel: what shows the blocks' ranges.
    """
    curves = [
        Curve(
            label=name,
            layer_evaluations=[point["layer_evaluations"] for point in runs[0]["curve"]],
            values=[[value(point) for point in run["curve"]] for run in runs],
        )
        for name, runs in rows.items()
    ]
    every = (record for records in rows.values() for record in records)
    blocked = next((record for record in every if _in_blocks(record)), None)
    config, depth = None, 0
    if blocked is not None:
        config, depth = BlocksConfig.from_dict(blocked["blocks"]), blocked["run"]["depth"]
    figure = comparison_figure(curves, config, depth, title, measure, panel)
    save_png(figure, path)


def _in_blocks(record: Mapping[str, Any]) -> bool:
    """Whether it is of blocks with noise ranges, which other methods have not."""
    return not record["run"]["end_to_end"] and record["blocks"] is not None


def record_path(folder: Path, row: str, run: Run) -> Path:
    """The file that a run writes its record to, which `Archive` packs."""
    return folder / f"{run.part}-{row}-lr{run.lr:g}-seed{run.seed}.json"


def jobs(folder: Path, runs: Mapping[str, Sequence[Run]]) -> dict[Path, Run]:
    """The records of all runs, and what to run for each."""
    return {record_path(folder, row, run): run for row, many in runs.items() for run in many}


def run_missing(
    jobs: Mapping[Path, Run],
    headline: Callable[[Mapping[str, Any]], str],
    workers: int,
    train_one: Callable[[Run, Path], dict[str, Any]] = train_to_record,
) -> None:
    """Train those runs whose records are not there, several processes of one thread at a time.

    Args:
        jobs: the records' paths, and what to run for each.
        headline: what a record reached, in a few words.
        workers: processes at a time.
        train_one: trains a run, writes its record to the path and returns it.

    Raises:
        ValueError: a record that is there was made by another recipe.
    """
    there = {folder: Archive(folder).load() for folder in {path.parent for path in jobs}}
    missing = {
        path: run for path, run in jobs.items() if not _is_done(path, run, there[path.parent])
    }
    print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are there, {len(missing)} to do")
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(missing)), mp_context=context) as pool:
        futures = {pool.submit(train_one, run, path): path for path, run in missing.items()}
        for number, future in enumerate(as_completed(futures), 1):
            record = future.result()
            print(
                f"[{number}/{len(missing)}] {time.strftime('%H:%M:%S')} {futures[future].stem}: "
                f"{headline(record)} in {record['seconds']:.0f} s",
                flush=True,
            )


def provenance(records: Records) -> str:
    """The commits that made the records, and a warning where these may not be comparable."""
    commits = sorted({r["environment"]["commit"] or "unknown" for r in records})
    lines = [f"commits that made the {len(records)} records: {', '.join(commits)}"]
    if len(commits) > 1:
        lines.append("warning: the records are of several commits, which may differ in the recipe")
    if any(c == "unknown" or c.endswith("-dirty") for c in commits):
        lines.append("warning: not every record is of committed code (dirty, unknown)")
    return "\n".join(lines)


def read(folder: Path, runs: Mapping[str, Sequence[Run]]) -> dict[str, Records]:
    """The records of all runs, by row."""
    there = Archive(folder).load()
    return {
        row: [there[record_path(folder, row, run).stem] for run in many]
        for row, many in runs.items()
    }


def _is_done(path: Path, run: Run, there: Mapping[str, dict[str, Any]]) -> bool:
    record: Any = there.get(path.stem)
    if record is None:
        return False
    again = "delete it to run it again"
    if not path.exists():
        again = f"unpack {Archive(path.parent).file} and {again}"
    try:
        made = type(run).from_dict(record.get("run"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}; {again}") from error
    if made != run:
        raise ValueError(f"{path} was made by another recipe; {again}")
    return True
