"""Differences between two ways of training over the same seeds, with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dblocks.recipes.metrics.classes import mean_std

LEVEL = 0.95


class Difference(NamedTuple):
    """A mean of paired differences and its confidence interval."""

    mean: float
    std: float | None
    """Sample standard deviation of the differences; None for one pair, as the interval."""
    low: float | None
    high: float | None
    count: int
    """How many pairs."""


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], level: float = LEVEL
) -> Difference:
    """The mean of `ours - theirs`, pair by pair, with its confidence interval.

        mean ± t std / sqrt(n)

    with the quantile t of Student's distribution of n-1 degrees of freedom, within whose ±t lies
    the share `level`. It assumes that the differences are about normal.

    Args:
        ours: values, such as those of the seeds 0, 1 and 2.
        theirs: values of the same seeds in the same order.
        level: of confidence.

    Raises:
        ValueError: there are no pairs, there is no partner for a value, or one is not finite.

    Source: Student 1908.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(
            f"each value must have a partner, and there must be one pair at least, got {len(ours)} "
            f"and {len(theirs)} values"
        )
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if not all(map(math.isfinite, differences)):
        raise ValueError(f"values must be finite, got differences {differences}")
    mean, std = mean_std(differences)
    if (n := len(differences)) == 1:
        return Difference(mean, None, None, None, 1)
    half = student_quantile(level, n - 1) * std / math.sqrt(n)
    return Difference(mean, std, mean - half, mean + half, n)


def student_quantile(level: float, freedom: int) -> float:
    """The t with `P(|T| <= t) = level`, of Student's distribution of whole degrees of freedom."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if freedom < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {freedom}")
    low, high = 0.0, math.pi / 2  # angles: t = sqrt(freedom) tan(angle)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """`P(|T| <= sqrt(freedom) tan(angle))`, a finite sum for whole degrees of freedom.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    square = math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for i in range(2 + odd, freedom + 1, 2):
        total += term
        term *= square * (i - 1) / i
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
