"""Forward of diffusers' BasicTransformerBlock, as DiT and PixArt use it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dblocks.integrations.fuse.blocks import feed_forward
from dblocks.integrations.fuse.ops import gated_add, gated_add_and_modulate, modulate

UNFUSED_KWARGS = {"gligen", "scale"}  # of cross_attention_kwargs: a module between, a warning


def is_adaptive(block: Any) -> bool:
    """Whether the block modulates and gates, with nothing between its norms and attentions."""
    return block.norm_type in ("ada_norm_zero", "ada_norm_single") and block.pos_embed is None


def BasicTransformerBlock(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    kwargs = cross_attention_kwargs or {}
    if hidden_states.ndim != 3 or not UNFUSED_KWARGS.isdisjoint(kwargs):
        return self.unfused.forward(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            timestep, cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    impl, x, single = self.fused_impl, hidden_states, self.norm_type == "ada_norm_single"
    if single:
        table = self.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
        shift1, scale1, gate, shift, scale, gate_mlp = table.chunk(6, dim=1)
        h = modulate(self.norm1, x, shift1, scale1, impl)
    else:
        h, gate, shift, scale, gate_mlp = self.norm1(
            x, timestep, class_labels, hidden_dtype=x.dtype
        )
    branch = self.attn1(
        h,
        encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
        attention_mask=attention_mask,
        **kwargs,
    )
    if self.attn2 is not None:
        if single:
            x = h = gated_add(x, branch, gate, impl)
        else:
            x, h = gated_add_and_modulate(self.norm2, x, branch, gate, None, None, impl)
        branch, gate = (
            self.attn2(
                h,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                **kwargs,
            ),
            None,
        )
    norm = self.norm2 if single else self.norm3
    x, h = gated_add_and_modulate(norm, x, branch, gate, shift, scale, impl)
    return gated_add(x, feed_forward(self, self.ff, h), gate_mlp, impl)
