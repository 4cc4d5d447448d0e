"""The tables of docs/paper.md: `python -m benchmarks.models.paper [--plan]` prints them.

Prints the settings of every experiment of the paper with their sources; with --plan, the modelled
memory and time of training on one H200.
"""

from __future__ import annotations

import sys
from typing import Any

from dblocks.recipes import causal_lm, dit, masked_lm, recurrent, vit
from dblocks.recipes.paper import EXPERIMENTS, Experiment
from dblocks.recipes.paper.choice import run_of
from dblocks.recipes.paper.networks import network_config
from dblocks.recipes.run import Run
from dblocks.scale.planner import Costs, Machine, Planner, of_network
from dblocks.scale.planner.units import format_bytes

RECIPES: dict[str, Any] = {
    "vit": vit.RECIPE,
    "dit": dit.RECIPE,
    "masked-lm": masked_lm.RECIPE,
    "causal-lm": causal_lm.RECIPE,
    "recurrent": recurrent.RECIPE,
}
H200 = Machine(memory=141 * 10**9, link=50e9, flops=400e12)
DAY = 86400
PLAN_HEAD = (
    "| | end to end, peak | checkpointing | blocks | peak | days in blocks | days end to end |\n"
    "|---|--:|--:|--:|--:|--:|--:|"
)


def run(experiment: Experiment) -> Run:
    """The experiment as a run."""
    return run_of(experiment, RECIPES[experiment.network].run)


def command(experiment: Experiment) -> str:
    """The command of an experiment."""
    words = f"dblocks train {experiment.network} --recipe paper --data {experiment.data}"
    words += " --data-path PATH"
    return words + (" --tokenizer tokenizer.json" if experiment.tokenizer else "")


def settings(experiment: Experiment) -> str:
    """The command, the settings with their sources, the differences, and the rows of the paper."""
    lines = [f"    {command(experiment)}", "", "| setting | value | source |", "|---|---|---|"]
    for name, (value, source) in experiment.published.items():
        lines.append(f"| {name} | {_text(value)} | {source} |")
    for name, (value, source) in experiment.ours.items():
        lines.append(f"| {name} | {_text(value)} | ours: {source} |")
    lines += ["", *(f"- {sentence}" for sentence in experiment.differs), ""]
    lines += [f"| published: {experiment.metric} | | |", "|---|--:|---|"]
    lines += [f"| {row.method} | {row.value} | {row.table} |" for row in experiment.rows]
    return "\n".join(lines)


def plan(experiment: Experiment) -> str:
    """A row of modelled memory and time on one H200."""
    made = run(experiment)
    costs = Costs(of_network(network_config(experiment, made)), made.batch_size, bf16=made.bf16)
    whole, checkpointing, *blocks = Planner(costs, H200).ways()
    way = blocks[made.num_blocks - 1]
    peaks = [format_bytes(found.peak) for found in (whole, checkpointing, way)]
    seen = experiment.epochs * experiment.samples
    days = [seen / found.tokens_per_second / DAY for found in (way, whole)]
    name = f"{experiment.network}, {experiment.data}"
    cells = (name, *peaks[:2], str(made.num_blocks), peaks[2], *(f"{d:.2g}" for d in days))
    return f"| {' | '.join(cells)} |"


def tables() -> str:
    """The settings of all experiments."""
    parts = []
    for network, experiments in EXPERIMENTS.items():
        for experiment in experiments:
            parts.append(f"## {network} on {experiment.data}\n\n{settings(experiment)}")
    return "\n\n".join(parts)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


if __name__ == "__main__":
    if "--plan" in sys.argv[1:]:
        print(PLAN_HEAD)
        for found in EXPERIMENTS.values():
            for one in found:
                print(plan(one), flush=True)
    else:
        print(tables())
