"""Noise levels of any density: their partition into blocks, draws, and sampling grids.

A subclass of `EDMSchedule` defines the distribution of the levels by `cdf` and `log_quantile`; the
rest follows from these. Block 0 owns the highest levels. Boundaries are computed in float64 on the
CPU, whatever torch's default device; only drawing uses a device, and it never synchronises.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dblocks import functional as F
from dblocks.config import (
    HIGHEST_LEVEL,
    LOWEST_LEVEL,
    JsonConfig,
    check_block,
    check_count,
    check_finite,
    check_overlap,
    check_share,
)
from dblocks.schedules.base import OVERLAP, owner_of
from dblocks.schedules.random import clamp_inside, draw_device, holds_float32, with_top

# Karras et al. 2022, table 1
SIGMA_MIN = 0.002
SIGMA_MAX = 80.0
SIGMA_DATA = 0.5
RHO = 7.0

Partition = Literal["equal_mass", "uniform_log", "uniform"]
PARTITIONS = ("equal_mass", "uniform_log", "uniform")


class NoiseLevel(NamedTuple):
    """sigma and the coefficients of the EDM preconditioning, each of the shape of sigma."""

    sigma: Tensor
    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor
    sigma_data: float


class EDMSchedule(JsonConfig, ABC):
    """Noise levels with a density truncated to [sigma_min, sigma_max], preconditioned as in EDM.

        z = y + sigma*eps,   denoised = c_skip*z + c_out*F(c_in*z, c_noise)

    A subclass is a frozen dataclass with the fields `sigma_min`, `sigma_max`, `sigma_data` and
    `partition`, in any order, and those of its density, which `cdf` and `log_quantile` describe.
    Decorated with `register`, it is read from JSON.

    Source: Karras et al. 2022, arXiv 2206.00364.
    """

    sigma_min: float
    """Lowest noise level."""
    sigma_max: float
    """Highest noise level."""
    sigma_data: float
    """Standard deviation of one element of the clean target."""
    partition: Partition | tuple[float, ...]
    """Partition of the levels into blocks: a rule, or the inner boundaries, descending."""

    corruption: ClassVar[Literal["noise", "masks"]] = "noise"
    symbol: ClassVar[str] = "sigma"
    loss_kinds: ClassVar[tuple[str, ...]] = ("cross_entropy", "l2")
    weightings: ClassVar[tuple[str, ...]] = ("auto", "edm", "clamped", "none", "batch_mean")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sigma_min", "sigma_max", "sigma_data"):
            check_finite(name, getattr(self, name))
        for name in ("sigma_min", "sigma_data"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("sigma_min", "sigma_max", "sigma_data"):
            if not LOWEST_LEVEL <= getattr(self, name) <= HIGHEST_LEVEL:
                raise ValueError(
                    f"{name} must lie between {LOWEST_LEVEL} and {HIGHEST_LEVEL}, whose squares "
                    f"are float32 numbers, got {getattr(self, name)}"
                )
        if self.sigma_max <= self.sigma_min:
            raise ValueError(
                "sigma_max must be greater than sigma_min, "
                f"got {self.sigma_max} and {self.sigma_min}"
            )
        if not isinstance(self.partition, str):
            object.__setattr__(self, "partition", tuple(float(s) for s in self.partition))
        self._check_partition()
        if not self.mass(self.sigma_min, self.sigma_max) > 0:
            raise ValueError(
                "the density must not vanish between sigma_min and sigma_max, got numbers that "
                f"put no mass on [{self.sigma_min}, {self.sigma_max}]: {self}"
            )

    @abstractmethod
    def cdf(self, sigma: float, *, upper: bool = False) -> float:
        """The probability of levels below sigma (with `upper`: above), before truncation.

        Both are computed without cancellation: where one is nearly 1, the other is accurate.
        """

    @abstractmethod
    def log_quantile(self, p: Tensor, *, upper: bool = False) -> Tensor:
        """The inverse of `cdf`: the ln sigma below (above) which levels have probability p.

        Args:
            p: float64, of any shape; accurate for p up to about 1/2.
            upper: whether p is the probability above.

        Returns:
            float64 of the shape of p.
        """

    def mass(self, lo: float, hi: float) -> float:
        """The probability of levels from lo to hi, before truncation, without cancellation."""
        return self._tails(lo, hi)[2]

    def boundaries(self, num_blocks: int) -> Tensor:
        """The noise levels that separate the blocks.

        Block b owns `boundaries[b] >= sigma > boundaries[b+1]`, the last block also sigma_min. The
        two ends are exactly sigma_max and sigma_min.

        Args:
            num_blocks: number of blocks B.

        Returns:
            Descending float64 [B+1] on the CPU.

        Raises:
            ValueError: `num_blocks` is not positive, or does not match the given inner boundaries.
        """
        levels = _boundaries(self, check_count("num_blocks", num_blocks))
        return torch.tensor(levels, dtype=torch.float64, device="cpu")

    def range_of(self, block: int, num_blocks: int, *, overlap: float = 0.0) -> tuple[float, float]:
        """The lowest and highest sigma that block `block` is trained on.

        The block's own range [lo, hi], widened at each end by the factor `(hi/lo)^overlap` and
        clamped to [sigma_min, sigma_max].
        """
        num_blocks = check_count("num_blocks", num_blocks)
        block = check_block(block, num_blocks)
        check_overlap(overlap)
        hi, lo = _boundaries(self, num_blocks)[block : block + 2]
        factor = _power(hi / lo, overlap)
        return max(lo / factor, self.sigma_min), min(hi * factor, self.sigma_max)

    def sample(
        self,
        block: int,
        num_blocks: int,
        shape: Sequence[int],
        *,
        overlap: float = OVERLAP,
        top_share: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws noise levels of one block: the density, truncated to the widened range.

        With probability `top_share`, each is instead sigma_max.

        Drawn in float64 on the device by inverting the distribution function, then rounded to
        float32 and clamped to the float32 numbers inside the range. The device must support
        float64, as CPU, CUDA and ROCm do. Apple's MPS does not: draw on the CPU and move sigma.

        Args:
            block: the block.
            num_blocks: number of blocks.
            shape: shape of the result, [N], [N, S] or [N, T].
            overlap: how far the range is widened in log space, as a fraction of its length.
            top_share: fraction of draws, in [0, 1], that are sigma_max in any block.
            generator: source of the draw; its device is the default of `device`.
            device: device of the draw.

        Returns:
            float32 sigma of the given shape.
        """
        B = num_blocks if type(num_blocks) is int else check_count("num_blocks", num_blocks)
        try:
            ranges = _ranges(self, B, overlap, top_share)
        except TypeError:  # of something without a hash: the check of the number says what it is
            ranges = _ranges.__wrapped__(self, B, overlap, top_share)
        known = type(block) is int and 0 <= block < B
        lo, hi, mass, tail, upper = ranges[block if known else check_block(block, B)]
        drawn_on = draw_device(generator)
        device = drawn_on if device is None else device
        u = torch.rand(tuple(shape), generator=generator, device=device, dtype=torch.float64)
        # Quantiles are accurate for small probabilities only: use the nearer tail.
        log_sigma = self.log_quantile(tail + mass * u, upper=upper)
        sigma = clamp_inside(log_sigma.exp().float(), lo, hi)
        return with_top(sigma, self.sigma_max, top_share, generator)

    def block_of(self, sigma: Tensor, num_blocks: int) -> Tensor:
        """The block that owns each sigma: the number of inner boundaries >= sigma.

        Both are compared in the dtype of sigma (float32 for float64), so that a boundary given in
        any dtype belongs to the block below it. Values outside the range are clamped.

        Args:
            sigma: floating point, any shape.
            num_blocks: number of blocks.

        Returns:
            int64 of the shape of sigma.
        """
        return owner_of(sigma, self.boundaries(num_blocks), self.symbol)

    def steps(
        self, n: int, spacing: Literal["equal_mass", "karras"] = "equal_mass", *, rho: float = RHO
    ) -> Tensor:
        """A sampling grid from sigma_max to sigma_min: n levels are n model calls.

        `equal_mass` takes the n quantile points of the truncated density, so that each block of
        an equal-mass partition is called about equally often. `karras` is Karras et al. 2022,
        eq. 5, without the final 0; with few steps it skips blocks.

        Args:
            n: number of levels; 1 gives [sigma_max].
            spacing: the rule.
            rho: exponent of the `karras` rule.

        Returns:
            Descending float64 [n] on the CPU.
        """
        n = check_count("number of steps", n)
        if spacing not in ("equal_mass", "karras"):
            raise ValueError(f"spacing must be 'equal_mass' or 'karras', got {spacing!r}")
        if n == 1:
            return torch.tensor([self.sigma_max], dtype=torch.float64, device="cpu")
        if spacing == "equal_mass":
            levels = [self._quantile(i, n - 1) for i in range(n)]
        else:
            check_finite("rho", rho)
            if rho <= 0:
                raise ValueError(f"rho must be positive, got {rho}")
            # sigma_max (1 + i/(n-1) (r - 1))^rho with r = (sigma_min/sigma_max)^(1/rho), which is
            # the same for any rho > 0, without overflow for small and cancellation for large ones.
            fall = math.expm1(math.log(self.sigma_min / self.sigma_max) / rho)
            inner = (rho * math.log1p(i / (n - 1) * fall) for i in range(1, n - 1))
            levels = [0.0, *(self.sigma_max * math.exp(x) for x in inner), 0.0]
        levels[0], levels[-1] = self.sigma_max, self.sigma_min
        return torch.tensor(levels, dtype=torch.float64, device="cpu")

    # Preconditioning

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

        It does not depend on the block.
        """
        s = computed(sigma)
        return s.square().reciprocal() + self.sigma_data**-2

    def _check_partition(self) -> None:
        if isinstance(self.partition, str):
            if self.partition not in PARTITIONS:
                raise ValueError(
                    f"partition must be one of {PARTITIONS} or the inner boundaries, "
                    f"got {self.partition!r}"
                )
            return
        ends = (self.sigma_max, *self.partition, self.sigma_min)
        if not all(high > low for high, low in pairwise(ends)):
            raise ValueError(
                "partition must hold the inner boundaries, descending and strictly between "
                f"sigma_max={self.sigma_max} and sigma_min={self.sigma_min}, got {self.partition}"
            )

    def _tails(self, lo: float, hi: float) -> tuple[float, float, float]:
        """Probabilities of sigma < lo, of sigma > hi, and of lo..hi, before truncation."""
        below, above = self.cdf(lo), self.cdf(hi, upper=True)
        if below > 0.5:
            return below, above, self.cdf(lo, upper=True) - above
        if above > 0.5:
            return below, above, self.cdf(hi) - below
        return below, above, 1 - below - above

    def _quantile(self, i: int, n: int) -> float:
        """The sigma that has i/n of the truncated mass above it."""
        below, above, mass = self._tails(self.sigma_min, self.sigma_max)
        p, q = below + mass * (n - i) / n, above + mass * i / n
        tail = torch.tensor(min(p, q), dtype=torch.float64, device="cpu")
        return math.exp(self.log_quantile(tail, upper=p > q).item())


def computed(x: Tensor) -> Tensor:
    """`x` in the dtype of the arithmetic: float64 for float64, else float32."""
    return x if x.dtype == torch.float64 else x.float()


# The type is part of the key: True equals 1, but is not a number.
@lru_cache(maxsize=256, typed=True)
def _ranges(
    schedule: EDMSchedule, num_blocks: int, overlap: float, top_share: float
) -> list[tuple[float, float, float, float, bool]]:
    """What `sample` draws from, for each block: numbers are checked once, not in a step.

    The lowest and highest level, their mass, that of the nearer tail, and whether it is the upper.
    """
    check_share("top_share", top_share)
    ranges = []
    for block in range(check_count("num_blocks", num_blocks)):
        lo, hi = schedule.range_of(block, num_blocks, overlap=overlap)
        below, above, mass = schedule._tails(lo, hi)
        ranges.append((lo, hi, mass, min(below, above), below > above))
    return ranges


@lru_cache(maxsize=256)
def _boundaries(schedule: EDMSchedule, num_blocks: int) -> tuple[float, ...]:
    hi, lo = schedule.sigma_max, schedule.sigma_min
    fractions = [i / num_blocks for i in range(1, num_blocks)]
    if schedule.partition == "equal_mass":
        inner = [schedule._quantile(i, num_blocks) for i in range(1, num_blocks)]
    elif schedule.partition == "uniform_log":
        inner = [hi * (lo / hi) ** fraction for fraction in fractions]
    elif schedule.partition == "uniform":
        inner = [hi + (lo - hi) * fraction for fraction in fractions]
    else:
        inner = list(schedule.partition)
    if len(inner) != num_blocks - 1:
        raise ValueError(
            f"partition has {len(inner)} inner boundaries, which make {len(inner) + 1} blocks, "
            f"got num_blocks={num_blocks}"
        )
    levels = (hi, *map(float, inner), lo)
    for high, low in pairwise(levels):
        if not holds_float32(low, high):
            raise ValueError(
                "the range of every block must hold float32 numbers, in which levels are drawn, "
                f"got {low!r} to {high!r}; widen sigma_min to sigma_max or take fewer blocks"
            )
    return levels


def _power(base: float, exponent: float) -> float:
    """`base**exponent`, infinite where it is too large for a float."""
    try:
        return base**exponent
    except OverflowError:
        return math.inf


def _over_rows(value: Tensor, z: Tensor) -> Tensor:
    """`value` [N] or [N, S], expanded to broadcast with z."""
    if value.ndim == 2:
        value = value.repeat_interleave(z.shape[1] // value.shape[1], dim=1)
    return value.reshape(value.shape + (1,) * (z.ndim - value.ndim))
