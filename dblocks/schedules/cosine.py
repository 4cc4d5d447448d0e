"""The density of noise levels of the cosine schedule, as in v-diffusion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dblocks.schedules.base import register
from dblocks.schedules.noise import SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, EDMSchedule, Partition


@register
@dataclass(frozen=True)
class CosineNoiseSchedule(EDMSchedule):
    """`sigma = tan(pi t/2)` with t uniform, truncated to [sigma_min, sigma_max].

    The variance-preserving state `cos(pi t/2) y + sin(pi t/2) eps` over its first factor is
    `y + sigma*eps`. The median of sigma is 1 before truncation.

    Source: Salimans and Ho 2022, arXiv 2202.00512; Nichol and Dhariwal 2021, arXiv 2102.09672.
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
        """`t = 2/pi atan(sigma)`, or `1 - t = 2/pi atan(1/sigma)`; see `EDMSchedule.cdf`."""
        return 2 / math.pi * math.atan(1 / sigma if upper else sigma)

    def log_quantile(self, p: Tensor, *, upper: bool = False) -> Tensor:
        """`ln tan(pi p/2)`, negative from above; see `EDMSchedule.log_quantile`."""
        log_sigma = torch.tan(math.pi / 2 * p).log()
        return -log_sigma if upper else log_sigma
