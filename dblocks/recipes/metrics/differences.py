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
    """Sample standard deviation of the differences; like the interval, None for one pair."""
    low: float | None
    high: float | None
    count: int
    """Number of pairs."""


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], level: float = LEVEL
) -> Difference:
    """The mean of the paired differences `ours - theirs`, with its confidence interval.

        mean ± t std / sqrt(n)

    where ±t encloses the probability `level` of Student's distribution with n-1 degrees of freedom.
    The differences are assumed to be normally distributed.

    Args:
        ours: values, such as those of seeds 0, 1 and 2.
        theirs: values of the same seeds in the same order.
        level: confidence level.

    Raises:
        ValueError: there are no pairs, the numbers of values differ, or a value is not finite.

    Source: Student 1908.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(
            f"there must be at least one pair of values, and as many in each, got {len(ours)} and "
            f"{len(theirs)} values"
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
    """The t with `P(|T| <= t) = level` for Student's distribution, integer degrees of freedom."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if freedom < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {freedom}")
    low, high = 0.0, math.pi / 2  # in terms of angles: t = sqrt(freedom) tan(angle)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """`P(|T| <= sqrt(freedom) tan(angle))`, a finite sum for integer degrees of freedom.

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
