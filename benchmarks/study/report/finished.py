"""Which rows of a comparison have records, and what the others would take."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.study.archive import Archive
from benchmarks.study.costing import SPARED, record_name
from benchmarks.study.experiment import Experiment, Records, record_path
from benchmarks.study.quality import Quality
from benchmarks.study.rows import Found, Row, Study
from benchmarks.study.running import hours, part_command
from dblocks.recipes.run import Run
from dblocks.recipes.tables import Column, Rows

# Minor versions whose runs have the same figures, bit for bit: CHANGELOG says so of 0.2.
SAME_FIGURES = ({"0.1", "0.2"},)


@dataclass(frozen=True)
class Missing:
    """What a row lacks."""

    title: str
    begun: bool
    """Whether some of its seeds are there."""
    runs: int
    """How many: to choose its own rate, and of the final seeds."""
    hours: float | None
    """Of one core, predicted by the rows that ran; None where none did."""
    command: str
    """What runs it, with the other rows of its part."""
    part: str = ""
    """Of a study."""


def by_command(missing: Sequence[Missing]) -> list[tuple[str, list[Missing]]]:
    """What one command runs together."""
    groups: dict[str, list[Missing]] = {}
    for one in missing:
        groups.setdefault(one.command, []).append(one)
    return [*groups.items()]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A comparison as far as it was run."""

    name: str
    titles: Mapping[str, str]
    """Of rows."""
    kinds: Mapping[str, type[Run]]
    """Of the rows' runs."""
    seeds: Mapping[str, int]
    """How many final runs a row is to have."""
    records: Mapping[str, Records]
    """By row; of as many seeds as were run."""
    missing: Sequence[Missing]
    quality: Quality
    columns: Sequence[Column]
    caption: Callable[[Rows], str]
    draw: Callable[[Rows, Path], None] | None
    """Of a figure; None where there is none."""
    curve: Mapping[str, Mapping[float, Records]] = field(default_factory=dict)
    """Records by the share of the budget that they took, of some rows; see `Study`."""
    costs: Rows = field(default_factory=dict)
    """What memory techniques cost, by title."""
    elsewhere: Set[str] = frozenset()
    """Heads of columns that the table of an experiment on the same data has."""
    note: str = ""
    """What the caption of that table leaves out."""
    edges: Set[str] = frozenset()
    """Rows whose learning rate is the smallest or the largest that was tried."""
    reference: str = "end_to_end"
    """The row that others are compared with."""

    @property
    def rows(self) -> Rows:
        """Records by the rows' titles."""
        return {self.titles[row]: found for row, found in self.records.items()}


def finished(experiment: Experiment) -> Finished:
    """Reads what there is of a comparison.

    Raises:
        ValueError: a record was made by another recipe, or records of different versions would
            stand in one table.
    """
    there = Archive(experiment.records).load()
    records, missing = _rows(experiment, there)
    if experiment.stored is not None:
        records = experiment.stored(experiment.records, records)
    check_versions(experiment.name, [r for many in records.values() for r in many])
    titles = {row: title for row, (title, _) in experiment.rows.items()}
    pace = _pace(records)
    how = f"python -m benchmarks.study results {experiment.name}"
    return Finished(
        name=experiment.name,
        titles=titles,
        kinds={row: type(run) for row, (_, run) in experiment.rows.items()},
        seeds=dict.fromkeys(experiment.rows, len(experiment.seeds)),
        records=records,
        missing=[
            Missing(titles[row], row in records, len(runs), _hours(runs, pace), how)
            for row, runs in missing.items()
        ],
        quality=experiment.quality,
        columns=experiment.columns,
        caption=experiment.caption,
        draw=experiment.draw,
    )


def score(experiment: Experiment) -> None:
    """Adds to the records that are there what `finish` of their experiment adds.

    Raises:
        ValueError: it adds nothing, or there are no records.
    """
    records, _ = _rows(experiment, Archive(experiment.records).load())
    if experiment.finish is None or not records:
        raise ValueError(f"{experiment.name} has no samples to score; run its rows first")
    experiment.finish(experiment.records, records)


def _rows(
    experiment: Experiment, there: Mapping[str, Any]
) -> tuple[dict[str, Records], dict[str, Sequence[Run]]]:
    """The final records by row, and the runs that rows lack, without those that choose a rate
    they take over."""
    records: dict[str, Records] = {}
    missing: dict[str, Sequence[Run]] = {}
    for row in experiment.rows:
        source = experiment.rates_of.get(row, row)
        selection = experiment.selection_runs(source)
        tried = _found(experiment, source, selection, there)
        if len(tried) < len(selection):
            own = _not_there(experiment, row, selection, there) if source == row else []
            missing[row] = [*own, *experiment.final_runs(row, 1.0)]
            continue
        runs = experiment.final_runs(row, experiment.chosen_lr(tried))
        if found := _found(experiment, row, runs, there):
            records[row] = found
        if lacking := _not_there(experiment, row, runs, there):
            missing[row] = lacking
    return records, missing


def _not_there(
    experiment: Experiment, row: str, runs: Sequence[Run], there: Mapping[str, Any]
) -> list[Run]:
    return [run for run in runs if record_path(experiment.records, row, run).stem not in there]


def finished_study(study: Study, like: Experiment | None = None) -> Finished:
    """Reads what there is of a study.

    Args:
        study: its rows; those of the part "budget" are points of curves, all others are compared.
        like: an experiment on the same data, whose caption and figure are taken.
    """
    found = Found(study)
    there = {row.name: found.records(row) for row in study.rows}
    if like is not None and like.stored is not None:
        like.stored(like.records, {row: there[row] for row in like.rows if there.get(row)})
    check_versions(study.name, [r for many in there.values() for r in many])
    compared = [row for row in study.rows if row.part != "budget" and there[row.name]]
    return Finished(
        name=study.name,
        titles={row.name: row.title for row in study.rows},
        kinds={row.name: type(row.run) for row in study.rows},
        seeds={row.name: len(row.seeds) for row in study.rows},
        records={row.name: there[row.name] for row in compared},
        missing=[_missing(found, row) for row in study.rows if found.missing(row)],
        quality=study.quality,
        columns=study.columns,
        caption=_beside(study, like) if like else lambda rows: _caption(study),
        draw=like.draw if like else None,
        curve=_curve(study.rows, there),
        costs=_costs(study, found.there),
        elsewhere=frozenset(column.head for column in like.columns) if like else frozenset(),
        note=_grown(study, like, {row.title: [] for row in compared}) if like else "",
        edges={row.name for row in compared if found.at_edge(row)},
        reference=study.reference,
    )


def check_versions(name: str, records: Records) -> None:
    """Raises ValueError where the figures of records may differ by the version that made them."""
    versions = {r["environment"]["dblocks"].rsplit(".", 1)[0] for r in records}
    if len(versions) > 1 and not any(versions <= same for same in SAME_FIGURES):
        raise ValueError(
            f"the records of {name} must be of one version of dblocks, or of versions with the "
            f"same figures, got {', '.join(sorted(versions))}; run the older rows again"
        )
    torches = {r["environment"]["torch"].split("+")[0].rsplit(".", 1)[0] for r in records}
    if len(torches) > 1:
        raise ValueError(
            f"the records of {name} must be of one version of torch, got "
            f"{', '.join(sorted(torches))}; run the older rows again"
        )


def _beside(study: Study, like: Experiment) -> Callable[[Rows], str]:
    """The caption of an experiment, with the rates of the rows that it lacks."""

    def caption(rows: Rows) -> str:
        shared = {title for title, _ in like.rows.values()}
        known = {title: records for title, records in rows.items() if title in shared}
        if not known:
            return _caption(study)
        return " ".join(filter(None, [like.caption(known), _grown(study, like, rows)]))

    return caption


def _grown(study: Study, like: Experiment, rows: Rows) -> str:
    """How the rates of rows were chosen that the experiment lacks."""
    shared = {title for title, _ in like.rows.values()}
    alone = {row.title for row in study.rows if row.lrs and row.title not in shared}
    return (
        "Rates of the rows that the table of every measure lacks are the best of a grid, which "
        "grew while its best was the smallest or the largest."
        if alone & rows.keys()
        else ""
    )


def _caption(study: Study) -> str:
    title = f"{study.title[0].upper()}{study.title[1:]}"
    return (
        f"{title}: mean ± sample standard deviation of the seeds; every row runs as many layer "
        "evaluations, unless its title says otherwise. Learning rates are the best of a grid by "
        f"runs of another seed on a validation split{_taken_over(study)}."
    )


def _taken_over(study: Study) -> str:
    """Whose rate rows without a grid of their own take over."""
    sources = {row.rate_of for row in study.rows if row.rate_of is not None}
    own = [row.title for row in study.rows if row.lrs]
    if not sources:
        return ""
    others = " or ".join(study.row(source).title for source in sorted(sources))
    return f", for {' and '.join(own)}; the others take over that of {others}"


def _missing(found: Found, row: Row) -> Missing:
    left = found.missing(row)
    runs = left + sum(path.stem not in found.there for path in found.selection(row))
    begun, how = left < len(row.seeds), part_command(found.study, row)
    return Missing(row.title, begun, runs, hours(found, row), how, row.part)


def _curve(rows: Sequence[Row], there: Mapping[str, Records]) -> dict[str, dict[float, Records]]:
    """Of rows that have points at other budgets, those and the row itself at budget 1."""
    curve: dict[str, dict[float, Records]] = {}
    for row in rows:
        if row.part != "budget" or row.rate_of is None or not there[row.name]:
            continue
        # The points are runs of one seed.
        seed = there[row.name][0]["run"]["seed"]
        whole = [record for record in there[row.rate_of] if record["run"]["seed"] == seed]
        line = curve.setdefault(row.rate_of, {1.0: whole} if whole else {})
        line[float(row.name.rsplit("_x", 1)[1])] = there[row.name]
    return {row: dict(sorted(line.items())) for row, line in curve.items()}


def _costs(study: Study, there: Mapping[str, Any]) -> dict[str, Records]:
    found: dict[str, Records] = {}
    for name, techniques in SPARED:
        for technique in techniques:
            record = there.get(record_name(name, technique))
            if record is not None:
                title = study.row(name).title
                found[title if technique == "none" else f"{title}, {technique}"] = [record]
    return found


def _pace(records: Mapping[str, Records]) -> float | None:
    """Seconds a layer evaluation, the median of all runs."""
    every = [r["seconds"] / r["layer_evaluations"] for many in records.values() for r in many]
    return statistics.median(every) if every else None


def _found(
    experiment: Experiment, row: str, runs: Sequence[Run], there: Mapping[str, Any]
) -> Records:
    found = []
    for run in runs:
        name = record_path(experiment.records, row, run).stem
        record = there.get(name)
        if record is None:
            continue
        if type(run).from_dict(record["run"]) != run:
            raise ValueError(
                f"the record {name} of {experiment.name} was made by another recipe; run it again"
            )
        found.append(record)
    return found


def _hours(runs: Sequence[Run], pace: float | None) -> float | None:
    if pace is None:
        return None
    return sum(run.steps * run.depth / run.num_blocks for run in runs) * pace / 3600
