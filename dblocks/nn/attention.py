"""The attention of a transformer layer.

Linear layers start as in DiT and in ViT's JAX code: Xavier uniform weights, zero biases.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks.nn.init import init_linear_
from dblocks.nn.rotary import Rotary

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        dim: width D.
        num_heads: number of heads H, a divisor of `dim`.
        num_kv_heads: number of key/value heads, a divisor of `num_heads`, each of which serves
            as many query heads; by default every head has its own.
        causal: each token attends to itself and to earlier tokens only.
        bias: the linear layers have biases.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        causal: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}"
            )
        self.head_dim = dim // num_heads
        self.causal = causal
        self.qkv = nn.Linear(dim, (num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.apply(init_linear_)

    def forward(
        self, x: Tensor, rotary: Rotary | None = None, attend: Attend | None = None
    ) -> Tensor:
        """Attends within `x` [N, T, D], or by `attend`; returns [N, T, D]."""
        return self.merge((attend or self.attend)(*self.project(x, rotary)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of `q` [N, H, T, Dh] over `k` and `v` [N, Hkv, T, Dh], as the layer's own."""
        return nnf.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, enable_gqa=self.num_kv_heads != self.num_heads
        )

    def project(self, x: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, R, Dh], keys and values [N, Hkv, R, Dh] of `x` [N, R, D], as views."""
        H, Hkv = self.num_heads, self.num_kv_heads
        heads = self._heads(self.qkv(x))
        if rotary is None:
            q, k, v = heads.transpose(1, 2).split((H, Hkv, Hkv), dim=1)
            return q, k, v
        turned, v = heads.split((H + Hkv, Hkv), dim=2)
        q, k = rotary.rotate(turned).transpose(1, 2).split((H, Hkv), dim=1)
        return q, k, v.transpose(1, 2)

    def project_keys(self, x: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor]:
        """The keys and values of `project` alone."""
        first = self.num_heads * self.head_dim
        bias = None if self.qkv.bias is None else self.qkv.bias[first:]
        k, v = self._heads(nnf.linear(x, self.qkv.weight[first:], bias)).chunk(2, dim=2)
        k = k if rotary is None else rotary.rotate(k)
        return k.transpose(1, 2), v.transpose(1, 2)

    def merge(self, o: Tensor) -> Tensor:
        """The output layer, of heads `o` [N, H, R, Dh]; returns [N, R, D]."""
        N, H, R, Dh = o.shape
        return self.out(o.transpose(1, 2).reshape(N, R, H * Dh))

    def _heads(self, x: Tensor) -> Tensor:
        # Every size is named: none can be inferred where the batch is empty.
        return x.view(x.shape[0], x.shape[1], x.shape[2] // self.head_dim, self.head_dim)
