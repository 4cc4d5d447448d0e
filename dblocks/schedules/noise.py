"""Noise levels: their distribution, their partition into blocks, and sampling grids.

Block 0 holds the highest noise. Boundaries are Python numbers in float64 on the CPU, whatever
torch's default device; only drawing touches a device, and it never synchronises.
`dblocks.schedules.mask` is the same for tokens that are masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dblocks import functional as F
from dblocks.config import (
    JsonConfig,
    check_block,
    check_count,
    check_finite,
    check_overlap,
    check_share,
)

# Karras et al. 2022, table 1
SIGMA_MIN = 0.002
SIGMA_MAX = 80.0
P_MEAN = -1.2
P_STD = 1.2
SIGMA_DATA = 0.5
RHO = 7.0

OVERLAP = 0.05  # gamma; Shing et al. 2026

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


@dataclass(frozen=True)
class NoiseSchedule(JsonConfig):
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
    """How blocks share the levels: a rule, or the inner boundaries, descending."""

    symbol: ClassVar[str] = "sigma"
    loss_kinds: ClassVar[tuple[str, ...]] = ("cross_entropy", "l2")
    weightings: ClassVar[tuple[str, ...]] = ("auto", "edm", "clamped", "none", "batch_mean")

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max", "p_mean", "p_std", "sigma_data"):
            check_finite(name, getattr(self, name))
        for name in ("sigma_min", "p_std", "sigma_data"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.sigma_max <= self.sigma_min:
            raise ValueError(
                "sigma_max must be greater than sigma_min, "
                f"got {self.sigma_max} and {self.sigma_min}"
            )
        if not isinstance(self.partition, str):
            object.__setattr__(self, "partition", tuple(float(s) for s in self.partition))
        self._check_partition()
        _, _, mass = self._tails(self.sigma_min, self.sigma_max)
        if not mass > 0:
            raise ValueError(
                f"p_mean={self.p_mean}, p_std={self.p_std} put no mass on "
                f"[{self.sigma_min}, {self.sigma_max}]"
            )

    def boundaries(self, num_blocks: int) -> Tensor:
        """The noise levels that separate the blocks.

        Block b owns `boundaries[b] >= sigma > boundaries[b+1]`, the last block also sigma_min. The
        two ends are sigma_max and sigma_min as given.

        Args:
            num_blocks: number of blocks B.

        Returns:
            Descending float64 [B+1] on the CPU.

        Raises:
            ValueError: `num_blocks` is not positive, or not what the given boundaries make.
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
        factor = (hi / lo) ** overlap
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
        """Draws noise levels of one block: the log-normal, truncated to the widened range.

        Each of them is sigma_max instead with probability `top_share`.

        Drawn in float64 on the device by inverting the distribution function, then rounded to
        float32 and clamped to the float32 numbers inside the range. The device must have float64:
        a CPU, CUDA or ROCm device has, Apple's MPS has not; draw on the CPU there and move sigma.

        Args:
            block: the block.
            num_blocks: number of blocks.
            shape: shape of the result, [N], [N, S] or [N, T].
            overlap: how far the range is widened in log space, as a fraction of its length.
            top_share: share of draws, in [0, 1], that are sigma_max whatever the block.
            generator: source of the draw; its device is the default of `device`.
            device: device of the draw.

        Returns:
            float32 sigma of the given shape.
        """
        lo, hi = self.range_of(block, num_blocks, overlap=overlap)
        check_share("top_share", top_share)
        if device is None:
            device = generator.device if generator is not None else "cpu"
        u = torch.rand(tuple(shape), generator=generator, device=device, dtype=torch.float64)
        below, above, mass = self._tails(lo, hi)
        # ndtri is accurate for small probabilities only: count from the nearer tail.
        if below <= above:
            x = torch.special.ndtri(below + mass * u)
        else:
            x = -torch.special.ndtri(above + mass * u)
        sigma = torch.exp(self.p_mean + self.p_std * x).float()
        return with_top(clamp_inside(sigma, lo, hi), self.sigma_max, top_share, generator)

    def block_of(self, sigma: Tensor, num_blocks: int) -> Tensor:
        """The block that owns each sigma: the number of inner boundaries >= sigma.

        Both sides are compared in the dtype of sigma (float32 for float64), so that a boundary
        given in any dtype belongs to the block below it. Values outside the range clamp.

        Args:
            sigma: floating point, any shape.
            num_blocks: number of blocks.

        Returns:
            int64 of the shape of sigma.
        """
        return owner_of(sigma, self.boundaries(num_blocks), self.symbol)

    def steps(
        self, n: int, kind: Literal["equal_mass", "karras"] = "equal_mass", *, rho: float = RHO
    ) -> Tensor:
        """A sampling grid from sigma_max to sigma_min: n levels are n model calls.

        `equal_mass` takes the n quantile points of the truncated log-normal, so that each block of
        an equal-mass partition is called about equally often. `karras` is Karras et al. 2022,
        eq. 5, without the final 0; with few steps it skips blocks.

        Args:
            n: number of levels; 1 gives [sigma_max].
            kind: the rule.
            rho: exponent of the `karras` rule.

        Returns:
            Descending float64 [n] on the CPU.
        """
        n = check_count("number of steps", n)
        if kind not in ("equal_mass", "karras"):
            raise ValueError(f"kind must be 'equal_mass' or 'karras', got {kind!r}")
        if n == 1:
            return torch.tensor([self.sigma_max], dtype=torch.float64, device="cpu")
        if kind == "equal_mass":
            levels = [self._quantile(i, n - 1) for i in range(n)]
        else:
            check_finite("rho", rho)
            if rho <= 0:
                raise ValueError(f"rho must be positive, got {rho}")
            first, last = self.sigma_max ** (1 / rho), self.sigma_min ** (1 / rho)
            levels = [(first + i / (n - 1) * (last - first)) ** rho for i in range(n)]
        levels[0], levels[-1] = self.sigma_max, self.sigma_min
        return torch.tensor(levels, dtype=torch.float64, device="cpu")

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

    def corrupt(self, y: Tensor, level: NoiseLevel, seed: int | Tensor) -> F.Noised:
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
        a = (math.log(lo) - self.p_mean) / self.p_std
        b = (math.log(hi) - self.p_mean) / self.p_std
        below, above = _normal_cdf(a), _normal_cdf(-b)
        if a > 0:
            return below, above, _normal_cdf(-a) - above
        if b < 0:
            return below, above, _normal_cdf(b) - below
        return below, above, 1 - below - above

    def _quantile(self, i: int, n: int) -> float:
        """The sigma that has i/n of the truncated mass above it."""
        below, above, mass = self._tails(self.sigma_min, self.sigma_max)
        p, q = below + mass * (n - i) / n, above + mass * i / n
        tail = torch.tensor(min(p, q), dtype=torch.float64, device="cpu")
        x = torch.special.ndtri(tail).item()
        return math.exp(self.p_mean + self.p_std * (x if p <= q else -x))


@lru_cache(maxsize=256)
def _boundaries(schedule: NoiseSchedule, num_blocks: int) -> tuple[float, ...]:
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
    return (hi, *map(float, inner), lo)


def _normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def owner_of(levels: Tensor, boundaries: Tensor, symbol: str) -> Tensor:
    """The number of inner boundaries >= each level, compared in the levels' dtype (not float64)."""
    if not levels.is_floating_point():
        raise TypeError(f"{symbol} must be floating point, got {levels.dtype}")
    if levels.dtype == torch.float64:
        levels = levels.float()
    inner = boundaries[1:-1].to(device=levels.device, dtype=levels.dtype)
    return (inner >= levels[..., None]).sum(-1)


def with_top(levels: Tensor, top: float, share: float, generator: torch.Generator | None) -> Tensor:
    """float32 `levels`, each with probability `share` replaced by the highest level `top`."""
    if share == 0:
        return levels
    uniform = torch.rand(levels.shape, generator=generator, device=levels.device)
    return levels.masked_fill(uniform < share, _float32_at_most(top))


def clamp_inside(levels: Tensor, lo: float, hi: float) -> Tensor:
    """float32 `levels`, clamped to the float32 numbers in [lo, hi]."""
    return levels.clamp(_float32_at_least(lo), _float32_at_most(hi))


def computed(x: Tensor) -> Tensor:
    """`x` in the dtype of the arithmetic: float64 for float64, else float32."""
    return x if x.dtype == torch.float64 else x.float()


def _over_rows(value: Tensor, z: Tensor) -> Tensor:
    """`value` [N] or [N, S], of the shape that multiplies z."""
    if value.ndim == 2:
        value = value.repeat_interleave(z.shape[1] // value.shape[1], dim=1)
    return value.reshape(value.shape + (1,) * (z.ndim - value.ndim))


def _float32_at_most(value: float) -> float:
    rounded = _float32(value)
    if rounded.item() > value:
        rounded = torch.nextafter(rounded, _float32(0.0))
    return rounded.item()


def _float32_at_least(value: float) -> float:
    rounded = _float32(value)
    if rounded.item() < value:
        rounded = torch.nextafter(rounded, _float32(math.inf))
    return rounded.item()


def _float32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")
