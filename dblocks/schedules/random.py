"""Random draws: seeds, uniform numbers as functions of a seed on every device, and clamping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dblocks.config import check_seed
from dblocks.kernels.reference import philox
from dblocks.ops._levels import OffsetSeed

MAX_SEED = 2**63 - 1
UNIFORM_BITS = 52  # an odd multiple of 2^-53 is a float64, and neither 0 nor 1
# Counters that the normals of `functional.noise_inject` with the same seed never reach.
FIRST_COUNTER = 1 << 62


def check_generator(generator: object) -> None:
    """Raises unless `generator` is a `torch.Generator` or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {generator!r} of type "
            f"{type(generator).__name__}; torch.Generator().manual_seed(5) makes one"
        )


def draw_seed(generator: torch.Generator | None = None) -> int:
    """A seed for draws on any device: one number from a CPU generator.

    Raises:
        TypeError: this is no generator.
        ValueError: the generator is not on the CPU.
    """
    check_generator(generator)
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, got one on {generator.device}")
    return int(torch.randint(MAX_SEED, (), generator=generator, device="cpu"))


def draw_device(
    generator: torch.Generator | None, otherwise: torch.device | str = "cpu"
) -> torch.device | str:
    """The device of a generator, on which it draws; without one, `otherwise`.

    Raises:
        TypeError: this is no generator.
    """
    check_generator(generator)
    return otherwise if generator is None else generator.device


def uniforms(
    shape: Sequence[int],
    seed: int | Tensor | OffsetSeed,
    device: torch.device | str = "cpu",
    *,
    offset: int = 0,
) -> Tensor:
    """The uniform numbers `offset`, `offset + 1`, ... of a seed; see `uniforms_at`.

    Args:
        shape: shape of the result.
        seed: an int of 64 bits, or a 0-d int64 tensor on the device; or an `OffsetSeed`.
        device: device of the result.
        offset: index of the first one.
    """
    if isinstance(seed, OffsetSeed):
        seed, offset = seed.seed, seed.offset + offset
    numbers = torch.arange(offset, offset + math.prod(shape), device=device)
    return uniforms_at(numbers.view(tuple(shape)), seed)


def uniforms_at(numbers: Tensor, seed: int | Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64, that are functions only of the seed and their index.

    Index i uses the Philox 4x32-10 counter `2^62 + i//2` with the key `seed`: the first two words
    for even i, the last two for odd i. The number is `(k + 1/2)/2^52`, with k made of the upper 26
    bits of each word. These are independent of the normals of `functional.noise_inject` with the
    same seed.

    Args:
        numbers: int64, not negative, of any shape.
        seed: an int of 64 bits, or a 0-d int64 tensor on their device.

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3.
    """
    words = philox(check_seed(seed), (numbers >> 1) + FIRST_COUNTER)
    odd, half = numbers & 1 == 1, UNIFORM_BITS // 2
    high, low = torch.where(odd, words[2], words[0]), torch.where(odd, words[3], words[1])
    bits = (high >> (32 - half) << half) | (low >> (32 - half))
    return (bits.double() + 0.5) * 2.0**-UNIFORM_BITS


def with_top(levels: Tensor, top: float, share: float, generator: torch.Generator | None) -> Tensor:
    """float32 `levels`, each with probability `share` replaced by the highest level `top`."""
    if share == 0:
        return levels
    uniform = torch.rand(levels.shape, generator=generator, device=levels.device)
    return levels.masked_fill(uniform < share, _float32_at_most(top))


def clamp_inside(levels: Tensor, lo: float, hi: float) -> Tensor:
    """float32 `levels`, clamped to the float32 numbers in [lo, hi]."""
    return levels.clamp(_float32_at_least(lo), _float32_at_most(hi))


def holds_float32(lo: float, hi: float) -> bool:
    """Whether a float32 number lies in [lo, hi], and both ends are others as float32 numbers."""
    apart = _float32(lo).item() < _float32(hi).item()
    return apart and _float32_at_least(lo) <= _float32_at_most(hi)


@lru_cache(maxsize=256)
def _float32_at_most(value: float) -> float:
    rounded = _float32(value)
    if rounded.item() > value:
        rounded = torch.nextafter(rounded, _float32(0.0))
    return rounded.item()


@lru_cache(maxsize=256)
def _float32_at_least(value: float) -> float:
    rounded = _float32(value)
    if rounded.item() < value:
        rounded = torch.nextafter(rounded, _float32(math.inf))
    return rounded.item()


def _float32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")
