"""Differences between two ways of training, paired by their seeds, with an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from dblocks.recipes.metrics.classes import mean_std

LEVEL = 0.95


class Difference(NamedTuple):
    """A mean of paired differences and its confidence interval."""

    mean: float
    std: float
    """Sample standard deviation of the differences; nan for one pair."""
    low: float
    high: float
    """The interval; nan for one pair."""
    pairs: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies above or below 0, and 0 where it does not."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def paired_difference(
    ours: Mapping[int, float], theirs: Mapping[int, float], level: float = LEVEL
) -> Difference:
    """The mean of `ours - theirs` over the seeds that both have, with its interval.

        mean ± t std / sqrt(n)

    with the quantile t of Student's distribution of n-1 degrees of freedom, within whose ±t lies
    the share `level`. It assumes that the differences are about normal.

    Args:
        ours: a value for each seed.
        theirs: likewise.
        level: of confidence.

    Raises:
        ValueError: there is no common seed, or a value is not finite.

    Source: Student 1908.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ValueError(
            f"two rows must have a seed in common, got {sorted(ours)} and {sorted(theirs)}"
        )
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    if not all(map(math.isfinite, differences)):
        raise ValueError(f"values must be finite, got differences {differences}")
    mean, std = mean_std(differences)
    n = len(differences)
    half = math.nan if n == 1 else student_quantile(level, n - 1) * std / math.sqrt(n)
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
