"""Modules: embeddings of targets and noise, adaptive norm, the noise-conditioned transformer layer.

Linear layers start as in DiT and in ViT's JAX code: Xavier uniform weights, zero biases;
modulations start at zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks import functional as F
from dblocks._transformer import MLP as MLP
from dblocks._transformer import Attend as Attend
from dblocks._transformer import Attention as Attention
from dblocks._transformer import Rotary as Rotary
from dblocks._transformer import SwiGLU as SwiGLU
from dblocks._transformer import init_linear_ as init_linear_
from dblocks._transformer import rotary_of as rotary_of

SINCOS_WIDTH = 256  # Peebles and Xie 2023 (DiT), frequency embedding
MAX_PERIOD = 10_000.0
EMBEDDING_STD = 0.02  # Peebles and Xie 2023 (DiT), initialisation of the timestep embedding
OFFICIAL_WIDTH_DIVISOR = 6  # the published DiffusionBlocks ViT conditions on D//6 numbers

GATE_CHUNKS = (2, 5)  # of a layer's modulation: shift, scale, gate of attention, then of the MLP

ConditioningKind = Literal["dit", "official", "none"]
NormKind = Literal["layer", "rms"]
MLPKind = Literal["gelu", "gelu_tanh", "swiglu"]
MLPS = {"gelu": MLP, "gelu_tanh": partial(MLP, approximate="tanh"), "swiglu": SwiGLU}


@dataclass(frozen=True)
class Conditioning:
    """What a way to condition on the noise means for norms and modulations."""

    affine: bool
    """Norms have a weight and a bias."""
    eps: float
    """Added to the variance by norms."""
    silu_output: bool
    """Modulations end in a SiLU."""
    width_divisor: int
    """Width of the model over that of the conditioning vector."""

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


class LabelEmbedding(nn.Module):
    """A table of target embeddings whose rows are read at norm `embed_scale`.

    Args:
        num_classes: rows.
        dim: width of a row.
        embed_scale: norm of each row.
    """

    def __init__(self, num_classes: int, dim: int, embed_scale: float = 1.0) -> None:
        super().__init__()
        self.embed_scale = embed_scale
        self.weight = nn.Parameter(torch.randn(num_classes, dim))

    def rows(self) -> Tensor:
        """All rows at their norm, float32 [V, D]: those that training and sampling use."""
        return self.embed_scale * nnf.normalize(self.weight.float(), dim=-1)

    def forward(self, labels: Tensor) -> Tensor:
        """Rows of `labels` [N] or [N, T], float32 with a last dimension D."""
        return self.rows()[labels]


class NoiseEmbedding(nn.Module):
    """The conditioning vector of a noise level: `MLP(sincos(c_noise))`.

    `sincos` is [cos | sin] of `c_noise * exp(-ln(1e4) k/128)`, in float32 (float64 for float64),
    also under autocast.

    Args:
        cond_dim: width of the conditioning vector.
    """

    frequencies: Tensor

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        half = SINCOS_WIDTH // 2
        frequencies = torch.exp(
            -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float64) / half
        )
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.fc1 = nn.Linear(SINCOS_WIDTH, cond_dim)
        self.fc2 = nn.Linear(cond_dim, cond_dim)
        # DiT's start: a weak dependence on the noise extrapolates to the levels seldom drawn.
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=EMBEDDING_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Embeds `c_noise` [N] or [N, S] as [N, cond_dim] or [N, S, cond_dim]."""
        angle = (c_noise if c_noise.dtype == torch.float64 else c_noise.float())[
            ..., None
        ] * self.frequencies.float()
        sincos = torch.cat([angle.cos(), angle.sin()], dim=-1)
        # Autocast would round the angles' functions to bfloat16; the work is one row a sample.
        with torch.autocast(c_noise.device.type, enabled=False):
            return self.fc2(nnf.silu(self.fc1(sincos.to(self.fc1.weight.dtype))))


class Modulation(nn.Module):
    """Shifts, scales and gates from a conditioning vector, zero at the start.

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
        """Makes some chunks start at `value` >= 0 instead of 0, for every conditioning vector."""
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
    """The weight and bias of a norm that an op applies, if the convention has them.

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
        """`x + gate*branch`, and that normalised and modulated, as one op."""
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

    The first sum and the second norm are one op. With kind "none" there is no modulation, and the
    layer is that of the classical ViT; with `norm="rms", mlp="swiglu", bias=False` and rotary
    positions, that of Llama.

    Args:
        dim: width D.
        num_heads: number of heads.
        hidden_dim: width inside the MLP.
        kind: the convention of the conditioning.
        causal: whether attention is causal.
        gate_init: what the gates are at the start: 0, as published, makes the layer the identity,
            and 1 the plain layer.
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
            rotary: rotations of the queries and keys.
            attend: attention of queries over keys and values; the layer's own by default.

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
        """One layer on clean rows, under the null conditioning, beside noisy rows.

        The rows share the attention only, which sees them as `[clean | noisy]`.

        Args:
            clean: [N, C, D].
            noisy: [N, R, D].
            cond: conditioning of the noisy rows, [N, cond_dim] or [N, S, cond_dim].
            rotary: rotations of all C + R rows.
            attend: attention of the queries over keys and values of all rows; queries are of all
                rows too, or with `keys_only` of the noisy ones.
            keys_only: clean rows give keys and values and are not computed further.

        Returns:
            The clean rows, as they were with `keys_only`, and the noisy rows.
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
