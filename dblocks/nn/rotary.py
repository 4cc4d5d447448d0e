"""Rotary positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """Rotations of the halves of a head, for some rows: `rotary_of` makes them."""

    cos: Tensor
    """float32 [1 or N, R, 1, Dh]."""
    sin: Tensor
    """float32 [1 or N, R, 1, Dh]; the first half is negated."""

    def rows(self, first: int, last: int | None = None) -> Rotary:
        """The rotations of rows `first` to `last`."""
        return Rotary(self.cos[:, first:last], self.sin[:, first:last])

    def rotate(self, x: Tensor) -> Tensor:
        """Rotates `x` [N, R, H, Dh], in float32, rounded once to the dtype of `x`."""
        turned = x.roll(x.shape[-1] // 2, -1)
        return torch.addcmul(x * self.cos, turned, self.sin).to(x.dtype)


def rotary_of(positions: Tensor, head_dim: int, theta: float) -> Rotary:
    """Rotary positions: column k of a head's first half turns with that of its second half.

        (a_k, b_k) -> (a_k cos t - b_k sin t, b_k cos t + a_k sin t),  t = position*theta^(-2k/Dh)

    Args:
        positions: int64 [R], or [N, R] where the samples' differ.
        head_dim: width Dh of a head, even.
        theta: base of the frequencies.

    Source: Su et al. 2021 (RoFormer).
    """
    half = head_dim // 2
    # Angles in float64: a position of 100,000 leaves few digits of a float32 behind the point.
    k = torch.arange(half, device=positions.device, dtype=torch.float64)
    angle = positions.double()[..., None] * theta ** (-k / half)
    angle = angle.view(-1, positions.shape[-1], 1, half)
    cos, sin = angle.cos().float(), angle.sin().float()
    return Rotary(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))
