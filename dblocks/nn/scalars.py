"""Scalar parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def number(value: float) -> nn.Parameter:
    """A scalar parameter of shape [1], since `fully_shard` does not take 0-d parameters."""
    return nn.Parameter(torch.tensor([float(value)]))


def accept_scalars(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Reshapes 0-d tensors of a state_dict to [1], the shape of scalar parameters.

    For `_load_from_state_dict`: scalars were 0-d in files of earlier versions.
    """
    for name, parameter in module._parameters.items():
        given = state.get(prefix + name)
        if parameter is None or given is None:
            continue
        if parameter.shape == (1,) and given.ndim == 0:
            state[prefix + name] = given.reshape(1)
