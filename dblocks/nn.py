"""Modules: noise embedding, adaptive layer norm, the noise-conditioned transformer layer.

Linear layers start as in DiT and in ViT's JAX code: Xavier uniform weights, zero biases;
modulations start at zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks import functional as F

SINCOS_WIDTH = 256  # Peebles and Xie 2023 (DiT), frequency embedding
MAX_PERIOD = 10_000.0
EMBEDDING_STD = 0.02  # Peebles and Xie 2023 (DiT), initialisation of the timestep embedding
OFFICIAL_WIDTH_DIVISOR = 6  # the published DiffusionBlocks ViT conditions on D//6 numbers

GATE_CHUNKS = (2, 5)  # of a layer's modulation: shift, scale, gate of attention, then of the MLP

ConditioningKind = Literal["dit", "official", "none"]


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


def init_linear_(module: nn.Module) -> None:
    """Xavier uniform weight and zero bias for a linear layer; leaves other modules alone."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class NoiseEmbedding(nn.Module):
    """The conditioning vector of a noise level: `MLP(sincos(c_noise))`.

    `sincos` is [cos | sin] of `c_noise * exp(-ln(1e4) k/128)`, in float32 also under autocast.

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
        angle = c_noise.float()[..., None] * self.frequencies.float()
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
    """

    def __init__(self, dim: int, chunks: int, kind: ConditioningKind = "dit") -> None:
        super().__init__()
        convention = conditioning_of(kind)
        self.chunks = chunks
        self.silu_output = convention.silu_output
        self.linear = nn.Linear(convention.width(dim), chunks * dim)
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
    """The weight and bias of a layer norm that an op applies, if the convention has them."""

    def __init__(self, dim: int, kind: ConditioningKind = "dit") -> None:
        super().__init__()
        convention = conditioning_of(kind)
        self.eps = convention.eps
        self.weight = nn.Parameter(torch.ones(dim)) if convention.affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if convention.affine else None


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
        return F.adaln(x, shift, scale, weight=self.weight, bias=self.bias, eps=self.eps)


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        dim: width D.
        num_heads: number of heads, a divisor of `dim`.
        causal: each token attends to itself and to earlier tokens only.
    """

    def __init__(self, dim: int, num_heads: int, *, causal: bool = False) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.apply(init_linear_)

    def forward(self, x: Tensor) -> Tensor:
        """Attends within `x` [N, T, D]; returns [N, T, D]."""
        N, T, D = x.shape
        # Every size is named: none can be inferred where the batch is empty.
        qkv = self.qkv(x).view(N, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        o = nnf.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(o.transpose(1, 2).reshape(N, T, D))


class MLP(nn.Module):
    """`Linear(GELU(Linear(x)))`.

    Args:
        dim: width D.
        hidden_dim: width between the two layers.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.apply(init_linear_)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the two layers to the last dimension of `x`."""
        return self.fc2(nnf.gelu(self.fc1(x)))


class TransformerLayer(nn.Module):
    """A pre-norm transformer layer, conditioned on the noise by AdaLN-zero.

        h = norm1(x)*(1 + scale1) + shift1 ;  x = x + gate1*attention(h)
        h = norm2(x)*(1 + scale2) + shift2 ;  x = x + gate2*mlp(h)

    The first sum and the second norm are one op. With kind "none" there is no modulation, and the
    layer is that of the classical ViT.

    Args:
        dim: width D.
        num_heads: number of heads.
        hidden_dim: width inside the MLP.
        kind: the convention of the conditioning.
        causal: whether attention is causal.
        gate_init: what the gates are at the start: 0, as published, makes the layer the identity,
            and 1 the plain layer.

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
    ) -> None:
        super().__init__()
        self.norm1 = Norm(dim, kind)
        self.attention = Attention(dim, num_heads, causal=causal)
        self.norm2 = Norm(dim, kind)
        self.mlp = MLP(dim, hidden_dim)
        self.modulation = None if kind == "none" else Modulation(dim, 6, kind)
        if self.modulation is not None and gate_init:
            self.modulation.start_at_(GATE_CHUNKS, gate_init)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """One layer.

        Args:
            x: [N, T, D].
            cond: [N, cond_dim], [N, S, cond_dim], or None for the null conditioning.

        Returns:
            [N, T, D] in the dtype of `x`.
        """
        shift1 = scale1 = gate1 = shift2 = scale2 = gate2 = None
        if self.modulation is not None:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond, x.shape[0])
        n1, n2 = self.norm1, self.norm2
        h = F.adaln(x, shift1, scale1, weight=n1.weight, bias=n1.bias, eps=n1.eps)
        x, h = F.residual_adaln(
            x, self.attention(h), gate1, shift2, scale2,
            weight=n2.weight, bias=n2.bias, eps=n2.eps,
        )  # fmt: skip
        return F.gated_residual(x, self.mlp(h), gate2)
