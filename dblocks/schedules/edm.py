"""The EDM preconditioning of Gaussian noise, whatever the density of its levels."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from dblocks import functional as F
from dblocks.schedules.base import computed

SIGMA_DATA = 0.5  # Karras et al. 2022, table 1


class NoiseLevel(NamedTuple):
    """sigma and the coefficients of the EDM preconditioning, each of the shape of sigma."""

    sigma: Tensor
    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor
    sigma_data: float


class EDMPreconditioning:
    """What a noise level means for a target and for a network.

        z = y + sigma*eps,   denoised = c_skip*z + c_out*F(c_in*z, c_noise)

    Source: Karras et al. 2022, arXiv 2206.00364.
    """

    sigma_data: float
    """Standard deviation of one element of the clean target."""

    corruption: ClassVar[Literal["noise", "masks"]] = "noise"
    symbol: ClassVar[str] = "sigma"
    loss_kinds: ClassVar[tuple[str, ...]] = ("cross_entropy", "l2")
    weightings: ClassVar[tuple[str, ...]] = ("auto", "edm", "clamped", "none", "batch_mean")

    def level(self, sigma: Tensor) -> NoiseLevel:
        """The coefficients of the preconditioning at sigma (Karras et al. 2022, table 1).

        `c_skip = sd^2/(s^2+sd^2)`, `c_out = s sd/sqrt(s^2+sd^2)`, `c_in = 1/sqrt(s^2+sd^2)`,
        `c_noise = ln(s)/4`, in float32 (float64 for float64).
        """
        s = computed(sigma)
        sd = self.sigma_data
        total = s.square() + sd**2
        c_in = total.rsqrt()
        return NoiseLevel(s, sd**2 / total, s * sd * c_in, c_in, s.log() / 4, sd)

    def state(self, z: Tensor) -> Tensor:
        """z in float32 (float64 for float64)."""
        return computed(z)

    def corrupt(self, y: Tensor, level: NoiseLevel, seed: int | Tensor | F.OffsetSeed) -> F.Noised:
        """`z = y + sigma*eps` and `c_in*z`; see `functional.noise_inject`."""
        return F.noise_inject(y, level.sigma, seed, sigma_data=self.sigma_data)

    def scale_in(self, z: Tensor, level: NoiseLevel) -> Tensor:
        """`c_in*z`, of z [N, ...] at levels [N], or [N, S] for z [N, T, D]."""
        return z * _over_rows(level.c_in, z)

    def loss_weight(
        self, sigma: Tensor, block: int = 0, num_blocks: int = 1, *, overlap: float = 0.0
    ) -> Tensor:
        """The EDM loss weight `(s^2 + sd^2)/(s sd)^2 = 1/c_out^2`, in float32 (float64).

        It is the same in every block.
        """
        s = computed(sigma)
        return s.square().reciprocal() + self.sigma_data**-2


def _over_rows(value: Tensor, z: Tensor) -> Tensor:
    """`value` [N] or [N, S], of the shape that multiplies z."""
    if value.ndim == 2:
        value = value.repeat_interleave(z.shape[1] // value.shape[1], dim=1)
    return value.reshape(value.shape + (1,) * (z.ndim - value.ndim))
