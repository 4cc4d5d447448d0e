"""Distance of generated images from real ones: Fréchet distance in a classifier's features."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dblocks.recipes.data.splits import values


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The squared Frechet distance of normal distributions fitted to two sets of features.

        |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

    with means m and sample covariances S. With `A^T A = S_a` and `B^T B = S_b`, the last trace is
    the sum of the singular values of `A B^T`. A and B are triangular factors of the centred
    features, which avoids the loss of digits in the square root of a covariance.

    For n samples the distance is biased by about `tr(S)/n` even if the distributions are equal, so
    only compare distances with the same number of samples.

    Args:
        a: features [n, D].
        b: features [m, D].

    Returns:
        The distance, in float64.

    Raises:
        ValueError: the shapes do not match; there are not more samples than features, so the
            covariance is singular; or a feature is not finite.

    Source: Dowson and Landau 1982; Heusel et al. 2017 (FID).
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] == 0:
        raise ValueError(
            f"features must have shapes [n, D] and [m, D] with one D, got {list(a.shape)} and "
            f"{list(b.shape)}; flatten them"
        )
    (mean_a, factor_a), (mean_b, factor_b) = _moments(a), _moments(b)
    distance = (mean_a - mean_b).square().sum()
    spread = factor_a.square().sum() + factor_b.square().sum()
    common = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    # For equal sets, rounding may make the distance negative.
    return max(0.0, (distance + spread - 2 * common).item())


@torch.no_grad()
def in_batches(
    function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 256
) -> Tensor:
    """The results of `function` on images [n, ...], computed in batches, on the CPU."""
    return torch.cat([function(chunk).cpu() for chunk in images.split(batch_size)])


def spread(images: Tensor, count: int) -> Tensor:
    """`count` of the images [n, ...], evenly spaced."""
    return images[torch.linspace(0, len(images) - 1, count, dtype=torch.float64).long()]


def standard_deviation(images: Tensor) -> float:
    """The standard deviation of all elements, in float64: the sigma_data of a data set."""
    if images.numel() < 2:
        raise ValueError(f"the standard deviation needs at least 2 numbers, got {images.numel()}")
    total = square = 0.0
    # In pieces: a float64 copy of a whole data set may not fit into memory.
    for chunk in images.split(1024):
        found = values(chunk).double()
        total += found.sum().item()
        square += found.square().sum().item()
    mean = total / images.numel()
    return math.sqrt(max(0.0, square / images.numel() - mean**2))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [D], and R [D, D] with `R^T R` the sample covariance."""
    n, D = features.shape
    if n <= D:
        raise ValueError(
            f"the Frechet distance needs more samples than the {D} features, got {n}; "
            "use more samples or fewer features"
        )
    x = features.detach().double()
    if not x.isfinite().all():
        raise ValueError("features must be finite, got some that are not")
    mean = x.mean(0)
    return mean, torch.linalg.qr(x - mean, mode="r").R / math.sqrt(n - 1)
