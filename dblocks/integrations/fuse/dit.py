"""Forwards for blocks written as in the DiT paper's code, to register for one's own classes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dblocks.integrations.fuse.ops import gated_add, gated_add_and_modulate, modulate


def dit_block(self: Any, x: Tensor, c: Tensor) -> Tensor:
    """An adaLN-Zero block with the children norm1, attn, norm2, mlp and adaLN_modulation.

        shift1, scale1, gate1, shift2, scale2, gate2 = adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * attn(norm1(x) * (1 + scale1) + shift1)
        x = x + gate2 * mlp(norm2(x) * (1 + scale2) + shift2)

    Args:
        self: the block.
        x: [N, T, D].
        c: [N, C], the conditioning.

    Returns:
        [N, T, D].

    Source: Peebles and Xie 2023 (DiT), adaLN-Zero block.
    """
    impl = self.fused_impl
    shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
    branch = self.attn(modulate(self.norm1, x, shift1, scale1, impl))
    x, h = gated_add_and_modulate(self.norm2, x, branch, gate1, shift2, scale2, impl)
    return gated_add(x, self.mlp(h), gate2, impl)


def dit_final_layer(self: Any, x: Tensor, c: Tensor) -> Tensor:
    """The last layer of such a network, with the children norm_final, linear and adaLN_modulation.

        shift, scale = adaLN_modulation(c).chunk(2, dim=-1)
        y = linear(norm_final(x) * (1 + scale) + shift)

    Args:
        self: the layer.
        x: [N, T, D].
        c: [N, C], the conditioning.

    Returns:
        [N, T, width of the linear layer].

    Source: Peebles and Xie 2023 (DiT).
    """
    shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
    return self.linear(modulate(self.norm_final, x, shift, scale, self.fused_impl))
