"""Conventions of conditioning on the noise level, for norms and modulations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

OFFICIAL_WIDTH_DIVISOR = 6  # conditioning vectors of the published ViT are D//6 wide
ConditioningKind = Literal["dit", "official", "none"]


@dataclass(frozen=True)
class Conditioning:
    """A convention of conditioning on the noise level."""

    affine: bool
    """Norms have a weight and a bias."""
    eps: float
    """Added to the variance by norms."""
    silu_output: bool
    """Modulations end in a SiLU."""
    width_divisor: int
    """Width of the model divided by that of the conditioning vector."""

    def width(self, dim: int) -> int:
        """Width of the conditioning vector in a model of width `dim`."""
        return max(dim // self.width_divisor, 1)


CONDITIONINGS = {
    "dit": Conditioning(affine=False, eps=1e-6, silu_output=False, width_divisor=1),
    "official": Conditioning(
        affine=True, eps=1e-12, silu_output=True, width_divisor=OFFICIAL_WIDTH_DIVISOR
    ),
    "none": Conditioning(affine=True, eps=1e-6, silu_output=False, width_divisor=1),
}


def conditioning_of(kind: str) -> Conditioning:
    """The convention called `kind`: "dit", "official" or "none"."""
    if kind not in CONDITIONINGS:
        raise ValueError(f"conditioning must be one of {list(CONDITIONINGS)}, got {kind!r}")
    return CONDITIONINGS[kind]


def inverse_silu(value: float) -> float:
    """The x >= 0 with `x * sigmoid(x) = value`, for value >= 0, by Newton's method."""
    if not 0 <= value < math.inf:
        raise ValueError(f"value must be a finite number >= 0, got {value}")
    x = value
    for _ in range(50):
        s = 1 / (1 + math.exp(-x))
        x -= (x * s - value) / (s * (1 + x * (1 - s)))
    return x


def over_rows(value: Tensor, x: Tensor) -> Tensor:
    """`value` [N, D] or [N, S, D], expanded to broadcast with rows x [N, T, D]."""
    if value.ndim == 2:
        return value[:, None]
    return value.repeat_interleave(x.shape[1] // value.shape[1], dim=1)
