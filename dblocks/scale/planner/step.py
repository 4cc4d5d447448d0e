"""The memory of a training step over time: gradients are allocated as activations are freed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dblocks.scale.planner.trace import Part


class Held(NamedTuple):
    """Memory held throughout a step, in bytes."""

    parameters: int
    trained: int
    """Bytes of the trained parameters, and so of their gradients."""
    optimizer: int
    temporaries: int = 0
    """Temporaries of the optimizer's step."""


class Peak(NamedTuple):
    """The largest memory of a step."""

    bytes: int
    moment: str
    """When it occurs: at the end of the forward, in the backward of a part, or in the optimizer."""


def step_peak(held: Held, parts: Sequence[tuple[str, Part]]) -> Peak:
    """The peak memory of a step and when it occurs.

    Parameters and optimizer state are held throughout. The forward adds saved activations; the
    backward frees them part by part, from the last, and adds gradients; the optimizer then adds its
    temporaries to all gradients. Temporaries of single operations are not counted.

    Args:
        held: memory held throughout.
        parts: the parts of the forward pass with their names, first to last.
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
    # In the backward: a call's activations are recomputed, then freed as usual; its input goes
    # last.
    return Part([(part.inputs - kept, 0), *events, (-again, 0)], part.flops)
