"""Conditioning of layers: embeddings of labels and noise levels, and the norms they modulate.

Modulations start at zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks import functional as F

OFFICIAL_WIDTH_DIVISOR = 6  # conditioning vectors of the published ViT are D//6 wide
SINCOS_WIDTH = 256  # Peebles and Xie 2023 (DiT), frequency embedding
MAX_PERIOD = 10_000.0
EMBEDDING_STD = 0.02  # Peebles and Xie 2023 (DiT), initialisation of the timestep embedding

NormKind = Literal["layer", "rms"]
ConditioningKind = Literal["dit", "official", "none"]


@dataclass(frozen=True)
class Conditioning:
    """A convention of conditioning on the noise level."""

    affine: bool
    """Norms have a weight and a bias."""
    eps: float
    """Added to the variance by norms."""
    silu_output: bool
    """Modulations end in a SiLU."""
    width_divisor: int
    """Width of the model divided by that of the conditioning vector."""

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


def conditioning_of(name: str) -> Conditioning:
    """The convention called `name`: "dit", "official" or "none"."""
    if name not in CONDITIONINGS:
        raise ValueError(f"conditioning must be one of {list(CONDITIONINGS)}, got {name!r}")
    return CONDITIONINGS[name]


def inverse_silu(value: float) -> float:
    """The x >= 0 with `x * sigmoid(x) = value`, for value >= 0, by Newton's method."""
    if not 0 <= value < math.inf:
        raise ValueError(f"value must be a finite number >= 0, got {value}")
    x = value
    for _ in range(50):
        s = 1 / (1 + math.exp(-x))
        x -= (x * s - value) / (s * (1 + x * (1 - s)))
    return x


def over_rows(value: Tensor, x: Tensor) -> Tensor:
    """`value` [N, D] or [N, S, D], expanded to broadcast with rows x [N, T, D]."""
    if value.ndim == 2:
        return value[:, None]
    return value.repeat_interleave(x.shape[1] // value.shape[1], dim=1)


class LabelEmbedding(nn.Module):
    """A table of target embeddings whose rows are normalised to norm `embed_scale`.

    Args:
        num_classes: number of rows K.
        dim: width of a row.
        embed_scale: norm of each row.
    """

    def __init__(self, num_classes: int, dim: int, embed_scale: float = 1.0) -> None:
        super().__init__()
        self.embed_scale = embed_scale
        self.weight = nn.Parameter(torch.randn(num_classes, dim))

    def rows(self) -> Tensor:
        """All normalised rows, float32 [K, D], as used in training and sampling."""
        return self.embed_scale * nnf.normalize(self.weight.float(), dim=-1)

    def forward(self, labels: Tensor) -> Tensor:
        """The normalised rows of `labels` [N] or [N, T]: float32 [N, D] or [N, T, D]."""
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
        # DiT's initialisation: a weak dependence on the noise extrapolates to rarely drawn levels.
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=EMBEDDING_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Embeds `c_noise` [N] or [N, S] as [N, cond_dim] or [N, S, cond_dim]."""
        angle = (c_noise if c_noise.dtype == torch.float64 else c_noise.float())[
            ..., None
        ] * self.frequencies.float()
        sincos = torch.cat([angle.cos(), angle.sin()], dim=-1)
        # Autocast would round sines and cosines to bfloat16; the work is one row per sample.
        with torch.autocast(c_noise.device.type, enabled=False):
            return self.fc2(nnf.silu(self.fc1(sincos.to(self.fc1.weight.dtype))))


class Modulation(nn.Module):
    """Shifts, scales and gates from a conditioning vector, initialised to zero.

    `Linear(SiLU(e))`, and `SiLU(Linear(SiLU(e)))` in the `official` convention; the null
    conditioning is e = 0, so the bias alone.

    Args:
        dim: width D of each chunk.
        chunks: number of chunks.
        conditioning: the convention.
        cond_dim: width of the conditioning vector; that of the convention by default.
    """

    def __init__(
        self,
        dim: int,
        chunks: int,
        conditioning: ConditioningKind = "dit",
        *,
        cond_dim: int | None = None,
    ) -> None:
        super().__init__()
        convention = conditioning_of(conditioning)
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
        conditioning: the convention.
        norm: "layer", or "rms", which has no bias.
    """

    def __init__(
        self, dim: int, conditioning: ConditioningKind = "dit", *, norm: NormKind = "layer"
    ) -> None:
        super().__init__()
        convention = conditioning_of(conditioning)
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
        conditioning: the convention; "none" is a plain affine layer norm.
    """

    def __init__(self, dim: int, conditioning: ConditioningKind = "dit") -> None:
        super().__init__(dim, conditioning)
        self.modulation = None if conditioning == "none" else Modulation(dim, 2, conditioning)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Normalises `x` [N, T, D]; `cond` is [N, cond_dim], [N, S, cond_dim] or None (null)."""
        shift = scale = None
        if self.modulation is not None:
            shift, scale = self.modulation(cond, x.shape[0])
        return self.modulate(x, shift, scale)
