"""Parameters of one number."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def number(value: float) -> nn.Parameter:
    """A number that trains, [1]: `fully_shard` takes no 0-d parameters."""
    return nn.Parameter(torch.tensor([float(value)]))


def accept_scalars(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Gives 0-d tensors of a state_dict the shape [1] of the parameters that they are for.

    Numbers were 0-d in files of earlier versions; for `_load_from_state_dict`.
    """
    for name, parameter in module._parameters.items():
        given = state.get(prefix + name)
        if parameter is None or given is None:
            continue
        if parameter.shape == (1,) and given.ndim == 0:
            state[prefix + name] = given.reshape(1)
