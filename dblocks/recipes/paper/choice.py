"""Looks up an experiment of the paper for the command line, and checks that its files are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dblocks.recipes.paper.experiment import Experiment
from dblocks.recipes.run import Run


def experiment_of(experiments: Sequence[Experiment], data: str | None) -> Experiment:
    """The experiment on a data set; by default the first one.

    Raises:
        ValueError: the paper has no experiment on this data set.
    """
    found = [e for e in experiments if data in (None, e.data)]
    if not found:
        names = " or ".join(e.data for e in experiments)
        raise ValueError(
            f"--data must be {names} with --recipe paper, got {data!r}; for other data, leave "
            "--recipe out"
        )
    return found[0]


def run_of(experiment: Experiment, run: Run) -> Run:
    """A run with the settings of an experiment."""
    values: dict[str, Any] = {"data": experiment.data, **experiment.settings()}
    return dataclasses.replace(run, **values)


def check_files(experiment: Experiment, run: Run) -> None:
    """Raises ValueError if the run has no data files, which the user must provide."""
    if getattr(run, "data_path", None) is None:
        raise ValueError(
            f"--recipe paper trains on {experiment.data}, whose files must be given with "
            f"--data-path: {experiment.files}; nothing is downloaded"
        )
    if experiment.tokenizer and getattr(run, "tokenizer", None) is None:
        raise ValueError(
            f"--recipe paper needs a tokenizer, {experiment.tokenizer}; give its tokenizer.json "
            "with --tokenizer"
        )
