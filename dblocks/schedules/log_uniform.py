"""A log-uniform density of noise levels."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dblocks.schedules.base import register
from dblocks.schedules.noise import SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, EDMSchedule, Partition


@register
@dataclass(frozen=True)
class LogUniformNoiseSchedule(EDMSchedule):
    """`ln sigma` is uniform on [ln sigma_min, ln sigma_max].

    Every octave of noise has the same probability, so the equal-mass partition equals
    `uniform_log`.
    """

    sigma_min: float = SIGMA_MIN
    """Lowest noise level."""
    sigma_max: float = SIGMA_MAX
    """Highest noise level."""
    sigma_data: float = SIGMA_DATA
    """Standard deviation of one element of the clean target."""
    partition: Partition | tuple[float, ...] = "equal_mass"
    """Partition of the levels into blocks: a rule, or the inner boundaries, descending."""

    def cdf(self, sigma: float, *, upper: bool = False) -> float:
        """The fraction of the range below (above) ln sigma; see `EDMSchedule.cdf`."""
        length = math.log(self.sigma_max / self.sigma_min)
        part = math.log(self.sigma_max / sigma if upper else sigma / self.sigma_min)
        return min(max(part / length, 0.0), 1.0)

    def log_quantile(self, p: Tensor, *, upper: bool = False) -> Tensor:
        """Its inverse; see `EDMSchedule.log_quantile`."""
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return high + (low - high) * p if upper else low + (high - low) * p
