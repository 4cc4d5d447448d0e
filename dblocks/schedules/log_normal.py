"""The log-normal density of noise levels of Karras et al. 2022."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dblocks.config import JsonConfig, check_finite
from dblocks.schedules.base import register
from dblocks.schedules.noise import SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, EDMSchedule, Partition

P_MEAN = -1.2  # Karras et al. 2022, table 1
P_STD = 1.2


@register
@dataclass(frozen=True)
class NoiseSchedule(EDMSchedule):
    """A log-normal distribution of noise levels, truncated to [sigma_min, sigma_max].

    `ln sigma ~ N(p_mean, p_std^2)`. Defaults are those of Karras et al. 2022, table 1.
    """

    sigma_min: float = SIGMA_MIN
    """Lowest noise level."""
    sigma_max: float = SIGMA_MAX
    """Highest noise level."""
    p_mean: float = P_MEAN
    """Mean of ln sigma."""
    p_std: float = P_STD
    """Standard deviation of ln sigma."""
    sigma_data: float = SIGMA_DATA
    """Standard deviation of one element of the clean target."""
    partition: Partition | tuple[float, ...] = "equal_mass"
    """Partition of the levels into blocks: a rule, or the inner boundaries, descending."""

    def __post_init__(self) -> None:
        JsonConfig.__post_init__(self)  # checks types before values
        check_finite("p_mean", self.p_mean)
        check_finite("p_std", self.p_std)
        if self.p_std <= 0:
            raise ValueError(f"p_std must be positive, got {self.p_std}")
        super().__post_init__()

    def cdf(self, sigma: float, *, upper: bool = False) -> float:
        """The normal distribution function of ln sigma; see `EDMSchedule.cdf`."""
        x = (math.log(sigma) - self.p_mean) / self.p_std
        return math.erfc((x if upper else -x) / math.sqrt(2)) / 2

    def log_quantile(self, p: Tensor, *, upper: bool = False) -> Tensor:
        """Its inverse; see `EDMSchedule.log_quantile`."""
        x = torch.special.ndtri(p)
        return self.p_mean + self.p_std * (-x if upper else x)
