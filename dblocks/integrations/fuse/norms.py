"""Forwards of diffusers' adaptive norms, each the function of the class it is named after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dblocks.integrations.fuse.ops import modulate


def AdaLayerNorm(
    self: Any, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None
) -> Tensor:
    if self.emb is not None:
        temb = self.emb(timestep)
    modulation = self.linear(self.silu(temb))
    if self.chunk_dim == 1:
        shift, scale = modulation.chunk(2, dim=1)
    else:
        scale, shift = modulation.chunk(2, dim=0)
    return modulate(self.norm, x, shift, scale, self.fused_impl)


def AdaLayerNormZero(
    self: Any,
    x: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    hidden_dtype: torch.dtype | None = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
    return (modulate(self.norm, x, shift, scale, self.fused_impl), *rest)


def AdaLayerNormZeroSingle(
    self: Any, x: Tensor, emb: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return modulate(self.norm, x, shift, scale, self.fused_impl), gate


def SD35AdaLayerNormZeroX(
    self: Any, hidden_states: Tensor, emb: Tensor | None = None
) -> tuple[Tensor, ...]:
    chunks = self.linear(self.silu(emb)).chunk(9, dim=1)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = chunks
    first, second = (
        modulate(self.norm, hidden_states, *m, self.fused_impl)
        for m in ((shift, scale), (shift2, scale2))
    )
    return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate2


def AdaLayerNormContinuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    modulation = self.linear(self.silu(conditioning_embedding).to(x.dtype))
    scale, shift = modulation.chunk(2, dim=1)
    return modulate(self.norm, x, shift, scale, self.fused_impl)
