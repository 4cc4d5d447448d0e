"""What a rewritten graph calls: the fused ops, for rows of any shape.

A graph has modulations in the shape in which they are broadcast, such as [N, 1, D] for rows
[N, T, D] or [N, T, 1, 1, D] for [N, T, H, W, D]. The ops take [N, T, D] and [N, S, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dblocks import functional as F
from dblocks.ops._dispatch import Impl, Norm


def modulated(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    eps: float,
    out_dtype: torch.dtype,
    impl: Impl,
) -> Tensor:
    """`norm(x) * (1 + scale) + shift` of x [..., D]; the modulation broadcasts against it."""
    rows, shift, scale = _as_rows(x, shift, scale)
    y = F.adaln(
        rows, shift, scale,
        weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype, impl=impl,
    )  # fmt: skip
    return y.view(x.shape)


def gated(x: Tensor, branch: Tensor, gate: Tensor, out_dtype: torch.dtype, impl: Impl) -> Tensor:
    """`x + gate * branch` of x and branch [..., D]; the gate broadcasts against them."""
    rows, gate_rows = _as_rows(x.to(out_dtype), gate)
    y = F.gated_residual(rows, branch.reshape(rows.shape), gate_rows, impl=impl)
    return y.view(x.shape)


def gated_modulated(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    x_dtype: torch.dtype,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    eps: float,
    out_dtype: torch.dtype,
    impl: Impl,
) -> tuple[Tensor, Tensor]:
    """`gated`, and `modulated` of the sum, in one op."""
    rows, gate, shift, scale = _as_rows(x.to(x_dtype), gate, shift, scale)
    x_new, y = F.residual_adaln(
        rows, branch.reshape(rows.shape), gate, shift, scale,
        weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype, impl=impl,
    )  # fmt: skip
    return x_new.view(x.shape), y.view(x.shape)


def _as_rows(x: Tensor, *modulation: Tensor | None) -> tuple[Any, ...]:
    """x as [N, T, D], and each modulation as [N, S, D] with one S."""
    x = x[None] if x.ndim == 2 else x
    full = [None if m is None else m[(None,) * (x.ndim - m.ndim)] for m in modulation]
    # The tokens of a segment are those of the dimensions after the last one that a modulation has.
    varying = [
        d for d in range(1, x.ndim - 1) if any(m is not None and m.shape[d] != 1 for m in full)
    ]
    lead = x.shape[: varying[-1] + 1] if varying else x.shape[:1]
    ones = (1,) * (x.ndim - 1 - len(lead))
    N, D = x.shape[0], x.shape[-1]
    S = lead[1:].numel()
    rows = [None if m is None else m.expand(*lead, *ones, D).reshape(N, S, D) for m in full]
    return x.reshape(N, x.shape[1:-1].numel(), D), *rows
