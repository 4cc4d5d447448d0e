"""Precision and recall of generated samples, by nearest neighbours."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 3
AT_ONCE = 1024  # rows of distances in memory


class PrecisionRecall(NamedTuple):
    """How well two sets of features cover each other; both in [0, 1]."""

    precision: float
    """The fraction of generated samples among real ones, a measure of quality."""
    recall: float
    """The fraction of real samples among generated ones, a measure of diversity."""


def precision_recall(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall.

    A sample is among a set if its distance to some sample of the set is at most the distance of
    that sample to its k-th nearest neighbour in the set.

    Both depend on the number of samples: only compare sets of the same size.

    Args:
        real: features [n, D].
        generated: features [m, D].
        k: number of neighbours.

    Raises:
        ValueError: the shapes do not match, a set has at most k samples, or a feature is not
            finite.

    Source: Kynkaanniemi et al. 2019, arXiv 1904.06991, with 3 neighbours.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features must have shapes [n, D] and [m, D] with one D, got {list(real.shape)} and "
            f"{list(generated.shape)}"
        )
    for features in (real, generated):
        if len(features) <= k:
            raise ValueError(f"features must have more than {k} samples, got {len(features)}")
        if not features.isfinite().all():
            raise ValueError("features must be finite, got some that are not")
    real, generated = real.detach().double(), generated.detach().double()
    return PrecisionRecall(_share_among(generated, real, k), _share_among(real, generated, k))


def _share_among(samples: Tensor, others: Tensor, k: int) -> float:
    """The fraction of samples among others."""
    # The nearest sample is the sample itself.
    radii = torch.cat([_distances(x, others).kthvalue(k + 1).values for x in others.split(AT_ONCE)])
    inside = [(_distances(x, others) <= radii).any(1) for x in samples.split(AT_ONCE)]
    return torch.cat(inside).double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Without a matrix product, whose rounding could put a sample outside its own ball.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
