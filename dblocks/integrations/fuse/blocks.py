"""Forwards of diffusers' two-stream and single-stream blocks, each named after its class."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention
from torch import Tensor

from dblocks.integrations.fuse.ops import gated_add, gated_add_and_modulate

MAX_HALF = 65504  # the largest float16, at which Flux clips its residual stream


def feed_forward(block: Any, mlp: Any, h: Tensor) -> Tensor:
    """`mlp(h)`, in chunks where the block was told to."""
    if block._chunk_size is None:
        return mlp(h)
    return attention._chunked_feed_forward(mlp, h, block._chunk_dim, block._chunk_size)


def clipped(x: Tensor) -> Tensor:
    """`x`, where float16 would overflow its largest value."""
    return x.clip(-MAX_HALF, MAX_HALF) if x.dtype == torch.float16 else x


def JointTransformerBlock(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    impl, kwargs = self.fused_impl, joint_attention_kwargs or {}
    x, context = hidden_states, encoder_hidden_states
    h, gate, shift, scale, gate_mlp, *second = self.norm1(x, emb=temb)
    modulation: Any = ()
    if self.context_pre_only:
        h_context = self.norm1_context(context, temb)
    else:
        h_context, *modulation = self.norm1_context(context, emb=temb)
    branch, branch_context = self.attn(hidden_states=h, encoder_hidden_states=h_context, **kwargs)
    if self.use_dual_attention:
        h2, gate2 = second
        x = gated_add(x, branch, gate, impl)
        branch, gate = self.attn2(hidden_states=h2, **kwargs), gate2
    x, h = gated_add_and_modulate(self.norm2, x, branch, gate, shift, scale, impl)
    x = gated_add(x, feed_forward(self, self.ff, h), gate_mlp, impl)
    if self.context_pre_only:
        return None, x
    gate, shift, scale, gate_mlp = modulation
    context, h = gated_add_and_modulate(
        self.norm2_context, context, branch_context, gate, shift, scale, impl
    )
    return gated_add(context, feed_forward(self, self.ff_context, h), gate_mlp, impl), x


def SD3SingleTransformerBlock(self: Any, hidden_states: Tensor, temb: Tensor) -> Tensor:
    h, gate, shift, scale, gate_mlp = self.norm1(hidden_states, emb=temb)
    branch = self.attn(hidden_states=h, encoder_hidden_states=None)
    x, h = gated_add_and_modulate(
        self.norm2, hidden_states, branch, gate, shift, scale, self.fused_impl
    )
    return gated_add(x, self.ff(h), gate_mlp, self.fused_impl)


def FluxTransformerBlock(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    impl, x, context = self.fused_impl, hidden_states, encoder_hidden_states
    h, gate, shift, scale, gate_mlp = self.norm1(x, emb=temb)
    h_context, *modulation = self.norm1_context(context, emb=temb)
    branch, branch_context, *ip_adapter = self.attn(
        hidden_states=h,
        encoder_hidden_states=h_context,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x, h = gated_add_and_modulate(self.norm2, x, branch, gate, shift, scale, impl)
    x = gated_add(x, self.ff(h), gate_mlp, impl)
    for added in ip_adapter:
        x = x + added
    gate, shift, scale, gate_mlp = modulation
    context, h = gated_add_and_modulate(
        self.norm2_context, context, branch_context, gate, shift, scale, impl
    )
    return clipped(gated_add(context, self.ff_context(h), gate_mlp, impl)), x


def FluxSingleTransformerBlock(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    length = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    h, gate = self.norm(x, emb=temb)
    hidden = self.act_mlp(self.proj_mlp(h))
    attended = self.attn(
        hidden_states=h, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
    )
    branch = self.proj_out(torch.cat([attended, hidden], dim=2))
    x = clipped(gated_add(x, branch, gate, self.fused_impl))
    return x[:, :length], x[:, length:]
