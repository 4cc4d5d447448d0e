"""The noise-conditioned transformer layer, and its branches: attention and MLPs.

The branches know nothing of noise. Their linear layers start as in DiT and in ViT's JAX code:
Xavier uniform weights, zero biases.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks import functional as F
from dblocks.nn.conditioning import ConditioningKind, Modulation, Norm, NormKind

GATE_CHUNKS = (2, 5)  # of a layer's chunks: shift, scale, gate of attention, then of the MLP
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
        # Such as one with an adapter, or a scripted one.
        if getattr(type(self.qkv), "forward", None) is not nn.Linear.forward:
            return self.project(x, rotary)[1:]
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


class TransformerLayer(nn.Module):
    """A pre-norm transformer layer, conditioned on the noise by AdaLN-zero.

        h = norm1(x)*(1 + scale1) + shift1 ;  x = x + gate1*attention(h)
        h = norm2(x)*(1 + scale2) + shift2 ;  x = x + gate2*mlp(h)

    The first sum and the second norm are one op. With conditioning "none" there is no modulation:
    the layer is then that of the original ViT, or, with `norm="rms", mlp="swiglu", bias=False` and
    rotary positions, that of Llama.

    Args:
        dim: width D.
        num_heads: number of heads.
        hidden_dim: width inside the MLP.
        conditioning: the convention.
        causal: whether attention is causal.
        gate_init: initial value of the gates: with 0, as published, the layer starts as the
            identity; with 1, as the plain layer.
        norm: "layer" or "rms".
        mlp: "gelu", "gelu_tanh" (GELU's approximation by tanh, as in DiT) or "swiglu".
        num_kv_heads: number of key/value heads; `num_heads` by default.
        bias: attention and MLP have biases.

    Source: Peebles and Xie 2023 (DiT), adaLN-Zero block.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        conditioning: ConditioningKind = "dit",
        causal: bool = False,
        gate_init: float = 0.0,
        norm: NormKind = "layer",
        mlp: MLPKind = "gelu",
        num_kv_heads: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if mlp not in MLPS:
            raise ValueError(f"mlp must be one of {list(MLPS)}, got {mlp!r}")
        self.norm1 = Norm(dim, conditioning, norm=norm)
        self.attention = Attention(
            dim, num_heads, num_kv_heads=num_kv_heads, causal=causal, bias=bias
        )
        self.norm2 = Norm(dim, conditioning, norm=norm)
        self.mlp = MLPS[mlp](dim, hidden_dim, bias=bias)
        self.modulation = None if conditioning == "none" else Modulation(dim, 6, conditioning)
        if self.modulation is not None and gate_init:
            self.modulation.start_at_(GATE_CHUNKS, gate_init)

    def forward(
        self,
        x: Tensor,
        cond: Tensor | None = None,
        *,
        rotary: Rotary | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x: [N, T, D].
            cond: [N, cond_dim], [N, S, cond_dim], or None for the null conditioning.
            rotary: rotary embeddings of the queries and keys.
            attend: computes the attention from queries, keys and values; the layer's own by
                default.

        Returns:
            [N, T, D] in the dtype of `x`.
        """
        h, modulation = self._enter(x, cond)
        return self._leave(x, self.attention(h, rotary, attend), modulation)

    def doubled(
        self,
        clean: Tensor,
        noisy: Tensor,
        cond: Tensor | None,
        *,
        rotary: Rotary,
        attend: Attend,
        keys_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Runs the layer on clean rows (with the null conditioning) and noisy rows.

        Clean and noisy rows interact only in the attention, whose input is `[clean | noisy]`.

        Args:
            clean: [N, C, D].
            noisy: [N, R, D].
            cond: conditioning of the noisy rows, [N, cond_dim] or [N, S, cond_dim].
            rotary: rotary embeddings of all C + R rows.
            attend: computes the attention over keys and values of all rows, from queries of all
                rows, or with `keys_only` of the noisy rows only.
            keys_only: compute only keys and values of the clean rows.

        Returns:
            The clean rows (with `keys_only` unchanged) and the noisy rows.
        """
        attention, C = self.attention, clean.shape[1]
        h_clean, m_clean = self._enter(clean, None)
        h_noisy, m_noisy = self._enter(noisy, cond)
        if keys_only:
            k_clean, v_clean = attention.project_keys(h_clean, rotary.rows(0, C))
            q, k, v = attention.project(h_noisy, rotary.rows(C))
            o = attend(q, torch.cat([k_clean, k], dim=2), torch.cat([v_clean, v], dim=2))
            return clean, self._leave(noisy, attention.merge(o), m_noisy)
        branch = attention(torch.cat([h_clean, h_noisy], dim=1), rotary, attend)
        b_clean, b_noisy = branch.split((C, noisy.shape[1]), dim=1)
        return self._leave(clean, b_clean, m_clean), self._leave(noisy, b_noisy, m_noisy)

    def _enter(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The input of the attention, and the modulation of the rest of the layer."""
        modulation: tuple[Tensor | None, ...] = (None,) * 6
        if self.modulation is not None:
            modulation = self.modulation(cond, x.shape[0])
        shift, scale, *rest = modulation
        return self.norm1.modulate(x, shift, scale), tuple(rest)

    def _leave(self, x: Tensor, branch: Tensor, modulation: tuple[Tensor | None, ...]) -> Tensor:
        gate1, shift, scale, gate2 = modulation
        x, h = self.norm2.add_and_modulate(x, branch, gate1, shift, scale)
        return F.gated_residual(x, self.mlp(h), gate2)
