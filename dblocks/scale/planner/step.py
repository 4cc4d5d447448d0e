"""The memory of one training step, moment by moment: gradients arrive as activations leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from dblocks.scale.planner.trace import Part

Optimizer = Literal["adamw", "adamw-foreach"]
STEP_BYTES = 4  # AdamW counts the steps of every tensor by itself
MOMENTS = 2


class Held(NamedTuple):
    """Bytes that a step holds from its beginning to its end."""

    parameters: int
    trained: int
    """Bytes of those that train."""
    optimizer: int


class Peak(NamedTuple):
    """The largest memory of a step."""

    bytes: int
    moment: str
    """When: the end of the forward, the backward of a part, or the optimizer."""


@dataclass(frozen=True)
class Flow:
    """How memory changes in the backward of some parts, first to last as the backward meets them."""

    highest: int
    """The largest memory, over that at the beginning."""
    change: int
    """The memory at the end, over that at the beginning."""


def state_bytes(parameters: Sequence[Any], optimizer: Optimizer) -> int:
    """Bytes of the state of AdamW for parameters that train."""
    return sum(MOMENTS * p.nbytes + STEP_BYTES for p in parameters)


def temporaries(trained: int, optimizer: Optimizer) -> int:
    """Bytes that a step of the optimizer makes and frees: none if fused, else a copy of all."""
    return 0 if optimizer == "adamw" else trained


def backward_flow(part: Part) -> Flow:
    """The backward of one part: its events in reverse order."""
    memory = highest = 0
    for saved, gradient in reversed(part.events):
        memory += gradient
        highest = max(highest, memory)
        memory -= saved
    return Flow(highest, memory)


def step_peak(held: Held, parts: Sequence[tuple[str, Part]], optimizer: Optimizer) -> Peak:
    """The peak of a step and its moment.

    It holds parameters and optimizer state all along. The forward adds what it saves; the backward
    takes this away again, part by part from the last, and adds gradients; the optimizer's
    temporaries come last, when all gradients are there. What single operations take meanwhile is
    not counted.

    Args:
        held: all along.
        parts: of the forward pass, first to last, by their names.
        optimizer: which one.
    """
    base = held.parameters + held.optimizer
    memory = base + sum(part.saved for _, part in parts)
    peak = Peak(memory, "end of the forward")
    for name, part in reversed(parts):
        flow = backward_flow(part)
        if memory + flow.highest > peak.bytes:
            peak = Peak(memory + flow.highest, f"backward of {name}")
        memory += flow.change
    stepping = base + held.trained + temporaries(held.trained, optimizer)
    return Peak(stepping, "optimizer") if stepping > peak.bytes else peak


def checkpointed(part: Part, again: Part | None = None) -> Part:
    """A layer that keeps its input, and computes the rest again when the backward meets it.

    Its events in reverse are those of one call of the layer, which appear at once.
    """
    calls = max(part.calls, 1)
    events = [(s // calls, g) for s, g in (again or part).events]
    saved = sum(s for s, _ in events)
    # Read backwards: the activations appear, leave as usual, and at last the input leaves.
    return Part([(part.inputs, 0), *events, (-saved, 0)], part.flops, part.inputs, part.calls)
