"""Bayes' rule for targets that are one of K embeddings: what a noisy one adds to a prediction."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from dblocks.nn import over_rows
from dblocks.schedules import NoiseLevel

Head = Literal["posterior", "learned"]


def check_head(head: str) -> None:
    """Raises unless `head` is one of `Head`."""
    if head not in get_args(Head):
        raise ValueError(f"head must be one of {get_args(Head)}, got {head!r}")


def precision_of(level: NoiseLevel, z: Tensor) -> Tensor:
    """`1/sigma^2` in float32 (float64), of the shape that multiplies z [N, D] or [N, T, D]."""
    precision = level.sigma.square().reciprocal()
    return precision[:, None] if z.ndim == 2 else over_rows(precision.view(len(z), -1, 1), z)


def posterior_logits(logits: Tensor, z: Tensor, rows: Tensor, level: NoiseLevel) -> Tensor:
    """Logits of a class given its noisy embedding, from those without.

        ln p(k | z, c) = ln p(k | c) + E_k z / sigma^2 + const,   z = E_k + sigma*eps

    as all rows of E are of one norm. The second term is float32 (float64 for float64) under
    autocast too: in bfloat16 its error at sigma_min would be hundreds of nats.

    Args:
        logits: `ln p(k | c)` but for a constant, [N, K] or [N, T, K].
        z: noisy embeddings, [N, D] or [N, T, D].
        rows: E, [K, D].
        level: of z, [N] or [N, S].
    """
    with torch.autocast(z.device.type, enabled=False):
        scaled = precision_of(level, z) * z
        return logits + scaled @ rows.to(scaled.dtype).t()
