"""The noise-conditioned transformer layer: modulations, modulated norms, and the layer.

Modulations start at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks import functional as F
from dblocks.nn.branches import MLPS, Attend, Attention, MLPKind, Rotary
from dblocks.nn.conditioning import ConditioningKind, conditioning_of, inverse_silu

GATE_CHUNKS = (2, 5)  # of a layer's chunks: shift, scale, gate of attention, then of the MLP
NormKind = Literal["layer", "rms"]


class Modulation(nn.Module):
    """Shifts, scales and gates from a conditioning vector, initialised to zero.

    `Linear(SiLU(e))`, and `SiLU(Linear(SiLU(e)))` in the `official` convention; the null
    conditioning is e = 0, so the bias alone.

    Args:
        dim: width D of each chunk.
        chunks: number of chunks.
        kind: the convention.
        cond_dim: width of the conditioning vector; that of the convention by default.
    """

    def __init__(
        self,
        dim: int,
        chunks: int,
        kind: ConditioningKind = "dit",
        *,
        cond_dim: int | None = None,
    ) -> None:
        super().__init__()
        convention = conditioning_of(kind)
        self.chunks = chunks
        self.silu_output = convention.silu_output
        self.linear = nn.Linear(cond_dim or convention.width(dim), chunks * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def start_at_(self, chunks: Sequence[int], value: float) -> None:
        """Initialises some chunks to `value` >= 0 instead of 0, for every conditioning vector."""
        bias = inverse_silu(value) if self.silu_output else value
        with torch.no_grad():
            for i in chunks:
                self.linear.bias.chunk(self.chunks)[i].fill_(bias)

    def forward(self, cond: Tensor | None, batch_size: int) -> tuple[Tensor, ...]:
        """Chunks of the modulation, as strided views of one tensor.

        Args:
            cond: [N, cond_dim], [N, S, cond_dim], or None for the null conditioning.
            batch_size: N.

        Returns:
            `chunks` tensors, each [N, D] or [N, S, D].
        """
        out = self.linear.bias if cond is None else self.linear(nnf.silu(cond))
        if self.silu_output:
            out = nnf.silu(out)
        if cond is None:
            out = out.expand(batch_size, -1)
        return out.chunk(self.chunks, dim=-1)


class Norm(nn.Module):
    """The weight and bias of a norm, if the convention has them; an op applies the norm.

    Args:
        dim: width D.
        kind: the convention.
        norm: "layer", or "rms", which has no bias.
    """

    def __init__(
        self, dim: int, kind: ConditioningKind = "dit", *, norm: NormKind = "layer"
    ) -> None:
        super().__init__()
        convention = conditioning_of(kind)
        if norm not in get_args(NormKind):
            raise ValueError(f"norm must be one of {get_args(NormKind)}, got {norm!r}")
        affine = convention.affine
        self.eps = convention.eps
        self.norm: NormKind = norm
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine and norm == "layer" else None

    def modulate(self, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        """`norm(x)*(1 + scale) + shift` of `x` [N, T, D]."""
        return F.adaln(
            x, shift, scale, weight=self.weight, bias=self.bias, norm=self.norm, eps=self.eps
        )

    def add_and_modulate(
        self,
        x: Tensor,
        branch: Tensor,
        gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor | None,
    ) -> F.Residual:
        """`x + gate*branch`, and its modulated norm, as one op."""
        return F.residual_adaln(
            x, branch, gate, shift, scale,
            weight=self.weight, bias=self.bias, norm=self.norm, eps=self.eps,
        )  # fmt: skip


class AdaLayerNorm(Norm):
    """Layer norm modulated by a conditioning vector: `norm(x)*(1 + scale) + shift`.

    Args:
        dim: width D.
        kind: the convention; "none" is a plain affine layer norm.
    """

    def __init__(self, dim: int, kind: ConditioningKind = "dit") -> None:
        super().__init__(dim, kind)
        self.modulation = None if kind == "none" else Modulation(dim, 2, kind)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Normalises `x` [N, T, D]; `cond` is [N, cond_dim], [N, S, cond_dim] or None (null)."""
        shift = scale = None
        if self.modulation is not None:
            shift, scale = self.modulation(cond, x.shape[0])
        return self.modulate(x, shift, scale)


class TransformerLayer(nn.Module):
    """A pre-norm transformer layer, conditioned on the noise by AdaLN-zero.

        h = norm1(x)*(1 + scale1) + shift1 ;  x = x + gate1*attention(h)
        h = norm2(x)*(1 + scale2) + shift2 ;  x = x + gate2*mlp(h)

    The first sum and the second norm are one op. With kind "none" there is no modulation: the layer
    is then that of the original ViT, or, with `norm="rms", mlp="swiglu", bias=False` and rotary
    positions, that of Llama.

    Args:
        dim: width D.
        num_heads: number of heads.
        hidden_dim: width inside the MLP.
        kind: the convention of the conditioning.
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
        kind: ConditioningKind = "dit",
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
        self.norm1 = Norm(dim, kind, norm=norm)
        self.attention = Attention(
            dim, num_heads, num_kv_heads=num_kv_heads, causal=causal, bias=bias
        )
        self.norm2 = Norm(dim, kind, norm=norm)
        self.mlp = MLPS[mlp](dim, hidden_dim, bias=bias)
        self.modulation = None if kind == "none" else Modulation(dim, 6, kind)
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
