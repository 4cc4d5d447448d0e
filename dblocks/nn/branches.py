"""The branches of a transformer layer, which do not depend on noise: attention and MLPs.

Linear layers start as in DiT and in ViT's JAX code: Xavier uniform weights, zero biases.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def init_linear_(module: nn.Module) -> None:
    """Xavier uniform weight and zero bias for a linear layer; leaves other modules alone."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Rotary(NamedTuple):
    """Rotary embeddings of some rows, made by `rotary_of`."""

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
    """Rotary positions: rotates column k of a head's first half with column k of its second half.

        (a_k, b_k) -> (a_k cos t - b_k sin t, b_k cos t + a_k sin t),  t = position*theta^(-2k/Dh)

    Args:
        positions: int64 [R], or [N, R] if they differ between samples.
        head_dim: width Dh of a head, even.
        theta: base of the frequencies.

    Source: Su et al. 2021 (RoFormer).
    """
    half = head_dim // 2
    # Angles in float64: at position 100,000 a float32 has only two decimals left.
    k = torch.arange(half, device=positions.device, dtype=torch.float64)
    angle = positions.double()[..., None] * theta ** (-k / half)
    angle = angle.view(-1, positions.shape[-1], 1, half)
    cos, sin = angle.cos().float(), angle.sin().float()
    return Rotary(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        dim: width D.
        num_heads: number of heads H, a divisor of `dim`.
        num_kv_heads: number of key/value heads, a divisor of `num_heads`, each shared by
            num_heads/num_kv_heads query heads; by default every head has its own.
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
        """Self-attention of `x` [N, T, D], computed by `attend` if given; returns [N, T, D]."""
        return self.merge((attend or self.attend)(*self.project(x, rotary)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of `q` [N, H, T, Dh] over `k` and `v` [N, Hkv, T, Dh]; may be causal."""
        return nnf.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, enable_gqa=self.num_kv_heads != self.num_heads
        )

    def project(self, x: Tensor, rotary: Rotary | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [N, H, R, Dh], keys and values [N, Hkv, R, Dh] for `x` [N, R, D], as views."""
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
        """The output layer, applied to heads `o` [N, H, R, Dh]; returns [N, R, D]."""
        N, H, R, Dh = o.shape
        return self.out(o.transpose(1, 2).reshape(N, R, H * Dh))

    def _heads(self, x: Tensor) -> Tensor:
        # All sizes explicit: none can be inferred for an empty batch.
        return x.view(x.shape[0], x.shape[1], x.shape[2] // self.head_dim, self.head_dim)


class MLP(nn.Module):
    """`Linear(GELU(Linear(x)))`.

    Args:
        dim: width D.
        hidden_dim: width between the two layers.
        bias: the linear layers have biases.
        approximate: "none", or "tanh" for the approximation of GELU.
    """

    def __init__(
        self, dim: int, hidden_dim: int, *, bias: bool = True, approximate: str = "none"
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)
        self.apply(init_linear_)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the two layers to the last dimension of `x`."""
        return self.fc2(nnf.gelu(self.fc1(x), approximate=self.approximate))


class SwiGLU(nn.Module):
    """`Linear(SiLU(a)*b)`, where a and b are the halves of `Linear(x)`.

    Args:
        dim: width D.
        hidden_dim: width of a and of b.
        bias: the linear layers have biases.

    Source: Shazeer 2020.
    """

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)
        self.apply(init_linear_)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the two layers to the last dimension of `x`."""
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(nnf.silu(a) * b)


MLPKind = Literal["gelu", "gelu_tanh", "swiglu"]
MLPS = {"gelu": MLP, "gelu_tanh": partial(MLP, approximate="tanh"), "swiglu": SwiGLU}
