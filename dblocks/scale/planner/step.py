"""The memory of a training step over time: gradients are allocated as activations are freed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dblocks.scale.planner.trace import Part


class Held(NamedTuple):
    """Bytes that a step holds from its beginning to its end."""

    parameters: int
    trained: int
    """Bytes of those that train."""
    optimizer: int
    temporaries: int = 0
    """Bytes that a step of the optimizer makes and frees."""


class Peak(NamedTuple):
    """The largest memory of a step."""

    bytes: int
    moment: str
    """When: the end of the forward, the backward of a part, or the optimizer."""


def step_peak(held: Held, parts: Sequence[tuple[str, Part]]) -> Peak:
    """The peak of a step and its moment.

    Parameters and optimizer state are held throughout. The forward adds what it saves; the backward
    frees this, part by part from the last, and adds gradients; the optimizer's temporaries come
    last, with all gradients. Temporaries of single operations are not counted.

    Args:
        held: all along.
        parts: of the forward pass, first to last, by their names.
    """
    base = held.parameters + held.optimizer
    memory = base + sum(part.saved for _, part in parts)
    peak = Peak(memory, "end of the forward")
    for name, part in reversed(parts):
        if memory + part.highest > peak.bytes:
            peak = Peak(memory + part.highest, f"backward of {name}")
        memory += part.gradients - part.saved
    stepping = base + held.trained + held.temporaries
    return Peak(stepping, "optimizer") if stepping > peak.bytes else peak


def checkpointed(part: Part) -> Part:
    """A layer with gradient checkpointing: keeps its input and recomputes the rest."""
    calls = max(part.calls, 1)
    events = [(saved // calls, gradient) for saved, gradient in part.events]
    kept = part.kept // calls
    again = sum(saved for saved, _ in events) - kept
    # Read backwards: the activations of one call appear, leave as usual, and the input leaves last.
    return Part([(part.inputs - kept, 0), *events, (-again, 0)], part.flops)
