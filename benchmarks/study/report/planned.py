"""The memory columns beside what `dblocks plan` predicts for the same network and batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.study.report.finished import Finished
from dblocks.models import CausalLMConfig, DiTConfig, MaskedLMConfig, ViTConfig
from dblocks.recipes.causal_lm import CausalLMRun
from dblocks.recipes.costs import MIB
from dblocks.recipes.dit import DiTRun
from dblocks.recipes.masked_lm import MaskedLMRun
from dblocks.recipes.run import Run
from dblocks.recipes.tables import Record
from dblocks.recipes.vit import ViTRun
from dblocks.scale.planner import Costs, of_network

# Recurrences of a recurrent model are drawn, and other methods train other networks.
CONFIGS: Sequence[tuple[type[Run], Any]] = (
    (ViTRun, ViTConfig),
    (DiTRun, DiTConfig),
    (CausalLMRun, CausalLMConfig),
    (MaskedLMRun, MaskedLMConfig),
)


class Memory(NamedTuple):
    """Of a training step, in MiB."""

    activations: float
    """Saved for the backward."""
    state: float
    """Parameters, gradients and optimizer state of what the step trains."""


class Compared(NamedTuple):
    """A row's memory, as its run counted it and as the planner predicts it."""

    title: str
    counted: Memory
    planned: Memory

    @property
    def ratios(self) -> Memory:
        """Predicted over counted."""
        return Memory(*(p / c for p, c in zip(self.planned, self.counted, strict=True)))


def compared(found: Finished) -> list[Compared]:
    """The rows of a comparison that the planner knows."""
    rows = []
    for row, records in found.records.items():
        planned = planned_memory(found.kinds[row], records[0])
        if planned is not None:
            counted = Memory(records[0]["activations_mib"], records[0]["state_mib"])
            rows.append(Compared(found.titles[row], counted, planned))
    return rows


def planned_memory(kind: type[Run], record: Record) -> Memory | None:
    """What the planner predicts for the network of a record; None for what it does not plan.

    Nothing runs: the planner traces the network without data or weights.

    Args:
        kind: of the run that made it.
        record: with the network's config and how it is cut.
    """
    config = next((config for made, config in CONFIGS if issubclass(kind, made)), None)
    if config is None:
        return None
    run, cut = record["run"], record["blocks"]
    costs = Costs(of_network(config.from_dict(record["model"])), run["batch_size"])
    if run["end_to_end"]:
        steps = [costs.end_to_end]
    else:
        counts = cut["layers_per_block"] or [run["depth"] // run["blocks"]] * run["blocks"]
        ends = [sum(counts[: b + 1]) for b in range(len(counts))]
        steps = [costs.block(end - n, end) for n, end in zip(counts, ends, strict=True)]
    held = [step.held.parameters + step.held.trained + step.held.optimizer for step in steps]
    return Memory(max(step.activations for step in steps) / MIB, max(held) / MIB)
