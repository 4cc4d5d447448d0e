"""Tables of results measured here next to results of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dblocks.info import aligned
from dblocks.recipes.paper.experiment import Experiment
from dblocks.recipes.run import Run

NOT_A_SETTING = ("seed", "device", "data", "data_path", "tokenizer", "points", "shared", "block")


def changed(run: Run, recipe: Run) -> list[str]:
    """Settings of a run that differ from its recipe, such as "steps 3 (585,000)"."""
    own, planned = vars(run), vars(recipe)
    return [
        f"{name} {own[name]} ({planned[name]})"
        for name in own
        if own[name] != planned[name] and name not in NOT_A_SETTING
    ]


def beside(experiment: Experiment, run: Run, recipe: Run, record: Mapping[str, Any]) -> str:
    """A table of a run's result and the paper's results, with their sources.

    Args:
        experiment: the experiment of the paper.
        run: the run that was trained.
        recipe: the experiment as a run, without changes.
        record: the record of the run.
    """
    value = experiment.measured(record)
    here = "not measured here" if value is None else f"{value:.2f}"
    rows = [("here", run.name, here, f"{run.steps:,} steps, seed {run.seed}")]
    rows += [
        ("published", row.method, row.value, f"{row.table} of arXiv 2506.14202")
        for row in experiment.rows
    ]
    lines = [f"{experiment.data}: {experiment.metric}", *aligned(rows)]
    if other := changed(run, recipe):
        lines.append(f"Settings that differ from the paper's: {', '.join(other)}")
    lines += [f"Difference from the paper: {sentence}" for sentence in experiment.differs]
    if value is None and experiment.unmeasured:
        lines.append(f"To compare: {experiment.unmeasured}")
    return "\n".join(lines)
