"""Memory and time of a training step of each arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.models.finetune.arms import Arm, Settings, Trainee, trainee
from benchmarks.models.finetune.saved import PeakSaved
from benchmarks.ops import timing


def costs(model: Any, arms: Sequence[Arm], settings: Settings, rounds: int) -> list[dict[str, Any]]:
    """Memory of a step of each arm, for the largest block, and the mean time over blocks."""
    tokens = torch.zeros(settings.batch_size, settings.pretraining.context, dtype=torch.int64)
    found, runs = [], {}
    for arm in arms:
        how = trainee(model, arm, settings, seed=0)
        blocks = range(1 if arm.trains == "all" else settings.blocks)

        def all_blocks(how: Trainee = how, blocks: range = blocks) -> None:
            for block in blocks:
                how.step(tokens, block)

        all_blocks()  # Adam creates its state at the first step
        held = [_held(how, tokens, block) for block in blocks]
        row = {name: max(h[name] for h in held) for name in held[0]}
        row["process_optimizer_bytes"] = _state_bytes(how.optimizers)
        found.append({"arm": arm.name, "steps_timed_together": len(blocks), **row})
        runs[arm.name] = all_blocks
    times = timing.interleaved(runs, torch.device("cpu"), rounds, round_ms=1.0)
    for row in found:
        share = row["steps_timed_together"]
        row |= {k: v / share for k, v in timing.summary(times[row["arm"]]).items()}
    return found


def _held(how: Trainee, tokens: Tensor, block: int) -> dict[str, int]:
    parameters = list(how.network.parameters())
    with PeakSaved(parameters) as saved:
        loss = how.loss(tokens, block)
    loss.backward()
    grads = [p.grad for p in parameters if p.grad is not None]
    how.network.zero_grad(set_to_none=True)
    return {
        "parameters": sum(g.numel() for g in grads),
        "gradient_bytes": sum(g.nbytes for g in grads),
        "optimizer_bytes": _state_bytes(how.optimizers_of(block)),
        "saved_bytes": saved.peak,
    }


def _state_bytes(optimizers: Sequence[Optimizer]) -> int:
    values = [v for o in optimizers for state in o.state.values() for v in state.values()]
    return sum(v.nbytes for v in values if isinstance(v, Tensor))
