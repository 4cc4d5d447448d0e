"""Writes the tables of docs/results.md and of the README from the records that are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from benchmarks.study.archive import Archive
from benchmarks.study.experiment import Experiment
from benchmarks.study.pages import measures_block, write_between_markers
from benchmarks.study.report.finished import Finished
from benchmarks.study.report.markdown import memory_block, not_run, study_block
from benchmarks.study.report.planned import compared
from benchmarks.study.report.readme import readme_block
from benchmarks.study.report.speed_of_writing import BLOCK, LATER, stored, written_block
from benchmarks.study.rows import Study

README = Path("README.md")
README_BLOCK = "results:readme"
MEMORY_BLOCK = "study:memory"


def write_documents(
    comparisons: Mapping[str, Finished],
    experiments: Mapping[str, Experiment],
    studies: Mapping[str, Study],
    results: Path | None,
    readme: Path | None,
) -> None:
    """Writes every block of both pages, of those that are given.

    Args:
        comparisons: by name, with their records.
        experiments: whose tables show every measure.
        studies: whose tables show every method.
        results: the page of all results.
        readme: gets five rows of them.

    Raises:
        ValueError: a page lacks the markers of a block.
    """
    if readme is not None:
        write_between_markers(readme, README_BLOCK, readme_block(comparisons))
    if results is None:
        return
    for name, text in blocks(comparisons, experiments, studies).items():
        write_between_markers(results, name, text)
    rows = [(name, row) for name, found in comparisons.items() for row in compared(found)]
    write_between_markers(results, MEMORY_BLOCK, memory_block(rows))
    if (written := stored()) is not None:
        write_between_markers(results, BLOCK, written_block(written, stored(LATER)))


def blocks(
    comparisons: Mapping[str, Finished],
    experiments: Mapping[str, Experiment],
    studies: Mapping[str, Study],
) -> dict[str, str]:
    """The blocks of the page of results by name, but for the one of memory."""
    made = {}
    for name, experiment in experiments.items():
        found = of_experiment(comparisons[name], experiment)
        parts = [_measures(found, experiment) if found.records else ""]
        if name not in studies:  # whose own block says what misses
            parts.append(not_run(found.missing))
        made[f"results:{name}"] = "\n\n".join(filter(None, parts))
    return made | {f"study:{name}": study_block(comparisons[name]) for name in studies}


def _measures(found: Finished, experiment: Experiment) -> str:
    rows, archive = found.rows, Archive(experiment.records).file
    return measures_block(rows, found.columns, found.caption(rows), archive)


def of_experiment(found: Finished, experiment: Experiment) -> Finished:
    """The rows of an experiment, also where a study on the same data has more."""
    records = {row: found.records[row] for row in experiment.rows if row in found.records}
    if experiment.stored is not None:
        records = experiment.stored(experiment.records, records)
    titles = {row: title for row, (title, _) in experiment.rows.items()}
    return dataclasses.replace(found, records=records, titles=titles, columns=experiment.columns)
