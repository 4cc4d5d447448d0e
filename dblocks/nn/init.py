"""How linear layers start."""

from __future__ import annotations

from torch import nn


def init_linear_(module: nn.Module) -> None:
    """Xavier uniform weight and zero bias for a linear layer; leaves other modules alone."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
