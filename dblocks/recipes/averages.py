"""Moving averages of the weights, which a run with `--ema` evaluates and saves.

An average is stored in its parameter's optimizer state, so it moves with that state: into
checkpoints, to the host with `--resident`, in shards with `--sharding fsdp`, per block with
`--block`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

AVERAGE = "average"  # key in the state of a parameter
UPDATES = "updates"  # key in an optimizer's first group, which is part of its state_dict


def keep_average(optimizer: Optimizer, decay: float) -> None:
    """Averages the parameters of an optimizer after each of its steps.

        average <- d*average + (1 - d)*parameter,   d = min(decay, (1 + n)/(10 + n))

    where n is the number of earlier steps; after the first step the average is the parameter. Each
    block has its own optimizer, so n counts the steps of the block. A parameter that never had a
    gradient never changed and has no average.

    Args:
        optimizer: an optimizer with a state for each parameter after its first step, such as AdamW.
        decay: at least 0 and below 1.

    Source: the warm-up is that of TensorFlow's ExponentialMovingAverage and of diffusers.
    """
    optimizer.register_step_post_hook(partial(_update, decay))


@torch.no_grad()
def _update(decay: float, optimizer: Optimizer, *_: Any) -> None:
    first = optimizer.param_groups[0]
    n = first[UPDATES] = first.get(UPDATES, -1) + 1
    averages: list[Tensor] = []
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state:
                continue
            if AVERAGE in state:
                averages.append(state[AVERAGE])
                parameters.append(parameter)
            else:
                state[AVERAGE] = parameter.clone(memory_format=torch.preserve_format)
    if averages:
        rate = min(decay, (1 + n) / (10 + n))
        cast(Any, torch)._foreach_lerp_(averages, parameters, 1 - rate)


@torch.no_grad()
def exchange(model: Any, optimizers: Iterable[Optimizer]) -> None:
    """Swaps parameters and their averages exactly; a second call undoes the first.

    Args:
        model: the trained model; a resident one is moved to the host first.
        optimizers: optimizers passed to `keep_average`.
    """
    residency = getattr(model, "residency", None)
    if residency is not None:
        residency.release()
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if (average := state.get(AVERAGE)) is not None:
                weights = parameter.clone(memory_format=torch.preserve_format)
                parameter.copy_(average)
                average.copy_(weights)


@contextmanager
def without_average_kept(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Restores the parameters that have no average after the `with` block."""
    kept = [
        (parameter, parameter.detach().clone(memory_format=torch.preserve_format))
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if AVERAGE not in optimizer.state.get(parameter, {})
    ]
    yield
    with torch.no_grad():
        for parameter, weights in kept:
            parameter.copy_(weights)
