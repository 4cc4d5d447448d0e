"""Modulations and the norms that they modulate; modulations start at zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks import functional as F
from dblocks.nn.conditioning import ConditioningKind, conditioning_of, inverse_silu

GATE_CHUNKS = (2, 5)  # of a layer's modulation: shift, scale, gate of attention, then of the MLP
NormKind = Literal["layer", "rms"]


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
