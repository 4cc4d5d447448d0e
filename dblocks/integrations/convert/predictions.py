"""Predictions of denoisers, converted to F of the EDM preconditioning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from dblocks.schedules import NoiseLevel

DDPM_STEPS = 1000
DDPM_BETAS = (1e-4, 0.02)  # Ho et al. 2020: linear


class Rates(NamedTuple):
    """How a model is called at a level, and how its output is converted to F.

    Its input is x = rate*z, and `F = skip*c_in*z - out*output`.
    """

    time: Tensor
    """The time, from 0 (clean target) to 1."""
    rate: Tensor
    skip: Tensor
    out: Tensor


class Prediction(ABC):
    """The prediction of a family of models from a noisy target z = y + sigma*eps."""

    name: str

    @abstractmethod
    def rates(self, level: NoiseLevel) -> Rates:
        """See `Rates`."""


class Flow(Prediction):
    """The velocity `v = eps - y` at `x = (1 - t) y + t eps`, with `t = sigma/(1 + sigma)`.

    So x = z/(1 + sigma), and `y = x - t v` gives F.

    Source: Lipman et al. 2023, arXiv 2210.02747; Esser et al. 2024, arXiv 2403.03206.
    """

    name = "flow"

    def rates(self, level: NoiseLevel) -> Rates:
        """See `Rates`."""
        s, sd = level.sigma, level.sigma_data
        rate = 1 / (1 + s)
        # c_skip is taken from 1/(1 + s) by algebra: at low noise they are nearly the same.
        return Rates(s * rate, rate, (s - sd**2) * rate / sd, rate / (level.c_in * sd))


class Epsilon(Prediction):
    """The noise eps at `x = z/sqrt(1 + sigma^2)` and at DDPM's timestep with this noise level.

    Between two of the 1000 timesteps, time is linear in ln sigma, as in k-diffusion.

    Source: Ho et al. 2020, arXiv 2006.11239.
    """

    name = "epsilon"

    def rates(self, level: NoiseLevel) -> Rates:
        """See `Rates`."""
        s, sd = level.sigma, level.sigma_data
        return Rates(_ddpm_time(s), (1 + s.square()).rsqrt(), s / sd, 1 / (level.c_in * sd))


def _ddpm_time(sigma: Tensor) -> Tensor:
    """DDPM's timestep / 1000, interpolated; clamped to the first and the last."""
    betas = torch.linspace(*DDPM_BETAS, DDPM_STEPS, dtype=torch.float64, device=sigma.device)
    kept = (1 - betas).cumprod(0)
    known = ((1 - kept) / kept).log().div(2).to(sigma.dtype)
    log = sigma.log().clamp(known[0], known[-1])
    above = torch.searchsorted(known, log).clamp(1, DDPM_STEPS - 1)
    low, high = known[above - 1], known[above]
    return (above - 1 + (log - low) / (high - low)) / DDPM_STEPS


FLOW, EPSILON = Flow(), Epsilon()
