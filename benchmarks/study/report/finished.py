"""Which rows of a comparison have records, and what the others would take."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.study.archive import Archive
from benchmarks.study.experiment import Experiment, Records, record_path
from dblocks.recipes.run import Run
from dblocks.recipes.tables import Rows

# Minor versions whose runs have the same figures, bit for bit: CHANGELOG says so of 0.2.
SAME_FIGURES = ({"0.1", "0.2"},)


@dataclass(frozen=True)
class Missing:
    """A row without records."""

    runs: int
    """How many, to choose the rate and of the final seeds, where the rate is not chosen of all."""
    hours: float | None
    """Of one core, by the seconds a layer evaluation of the rows that ran; None where none did."""


@dataclass(frozen=True)
class Finished:
    """A comparison as far as it was run."""

    experiment: Experiment
    records: Mapping[str, Records]
    """By row; of as many seeds as were run."""
    missing: Mapping[str, Missing]
    """By row."""

    @property
    def rows(self) -> Rows:
        """Records by the rows' titles."""
        return {self.experiment.rows[row][0]: found for row, found in self.records.items()}


def finished(experiment: Experiment) -> Finished:
    """Reads what there is of a comparison.

    Raises:
        ValueError: a record was made by another recipe, or records of different versions would
            stand in one table.
    """
    there = Archive(experiment.records).load()
    records: dict[str, Records] = {}
    selections: dict[str, Records] = {}
    for row in experiment.selection_shorter:
        selections[row] = _found(experiment, row, experiment.selection_runs(row), there)
    missing: dict[str, Sequence[Run]] = {}
    for row in experiment.rows:
        source = experiment.rates_of.get(row, row)
        tried = selections[source]
        if len(tried) < len(experiment.lrs):
            missing[row] = [*experiment.selection_runs(source), *experiment.final_runs(row, 1.0)]
            continue
        runs = experiment.final_runs(row, experiment.chosen_lr(tried))
        found = _found(experiment, row, runs, there)
        if found:
            records[row] = found
        else:
            missing[row] = runs
    if experiment.stored is not None:
        scored = experiment.stored(experiment.records, records)
        missing |= {row: [] for row in records if row not in scored}
        records = scored
    check_versions(experiment.name, [r for many in records.values() for r in many])
    seconds = [r["seconds"] / r["layer_evaluations"] for many in records.values() for r in many]
    pace = statistics.median(seconds) if seconds else None
    return Finished(
        experiment,
        records,
        {row: Missing(len(runs), _hours(runs, pace)) for row, runs in missing.items()},
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


def _found(
    experiment: Experiment, row: str, runs: Sequence[Run], there: Mapping[str, Any]
) -> Records:
    found = []
    for run in runs:
        record = there.get(record_path(experiment.records, row, run).stem)
        if record is None:
            continue
        made = type(run).from_dict(record["run"])
        if made != run:
            raise ValueError(
                f"the record {record_path(experiment.records, row, run).stem} of "
                f"{experiment.name} was made by another recipe; run it again"
            )
        found.append(record)
    return found


def _hours(runs: Sequence[Run], pace: float | None) -> float | None:
    if pace is None:
        return None
    return sum(run.steps * run.depth / run.num_blocks for run in runs) * pace / 3600
