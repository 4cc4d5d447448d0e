"""Checks of the arguments of noise: the levels sigma, sigma_data, the seed and the offset."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dblocks.config import HIGHEST_LEVEL, LOWEST_LEVEL, check_seed
from dblocks.ops import _checks, _dispatch
from dblocks.ops._dispatch import COUNT_RANGE


def check_samples(name: str, x: Tensor) -> None:
    """`x` is [N, ...]."""
    if x.ndim == 0:
        raise ValueError(f"{name} must have shape [N, ...], got a 0-d tensor; add a dimension")


def check_noised(samples: Mapping[str, Tensor], sigma: Tensor, sigma_data: float) -> None:
    """One or two samples by name, their levels sigma and `sigma_data`."""
    (name, x), *others = samples.items()
    if others:
        check_pair(name, x, *others[0])
    else:
        _checks.check_tensor(**samples)
        check_samples(name, x)
        _checks.check_float(**samples)
        _dispatch.remember("samples", (x,))
    check_sigma("sigma", sigma, name, x)
    check_sigma_data(sigma_data)


def check_pair(x_name: str, x: Tensor, name: str, tensor: Tensor) -> None:
    """Both are floating tensors [N, ...] of one shape on one device."""
    _checks.check_tensor(**{x_name: x, name: tensor})
    check_samples(x_name, x)
    _checks.check_same_shape(name, tensor, x_name, x)
    _checks.check_float(**{x_name: x, name: tensor})
    _checks.check_device(x, **{name: tensor})
    _dispatch.remember("samples", (x, tensor))


def check_sigma(name: str, sigma: Tensor, x_name: str, x: Tensor, *, zero: bool = False) -> None:
    """`sigma` is a floating tensor, 0-d, [N] or [N, S], on the device of `x`, > 0 and at most 1e18.

    The square of 1e18 is a float32 number.

    Values are checked only on the CPU, outside compiled graphs, tracing and torch.func transforms.
    """
    if not isinstance(sigma, Tensor):
        raise TypeError(
            f"{name} must be a floating tensor, got {_checks.type_name(sigma)}; "
            "make a 0-d tensor of it on the device"
        )
    _checks.check_float(**{name: sigma})
    _checks.check_device(x, **{name: sigma})
    _check_sigma_shape(name, sigma, x_name, x)
    known = type(sigma) in (Tensor, torch.nn.Parameter) and sigma.is_cpu and sigma.numel() > 0
    if known and not _dispatch.is_traced():
        low, high = (value.item() for value in sigma.detach().aminmax())  # NaN if there is one
        if not (low >= 0 if zero else low > 0):
            raise ValueError(_sigma_message(name, f"a minimum of {low}", zero))
        if high > HIGHEST_LEVEL:
            raise ValueError(_too_high_message(name, high))


def _too_high_message(name: str, got: float) -> str:
    return (
        f"{name} must be at most {HIGHEST_LEVEL} everywhere, whose square is a float32 number, "
        f"got {got}; clamp it to the schedule's sigma_max"
    )


def _sigma_message(name: str, got: str, zero: bool) -> str:
    bound = ">= 0" if zero else "> 0"
    return f"{name} must be {bound} everywhere, got {got}; clamp it to the schedule's sigma_min"


def check_sigma_value(name: str, sigma: float, *, zero: bool = False) -> None:
    """The number `sigma` is positive (or 0, where `zero` allows it) and at most 1e18."""
    _checks.check_number(name, sigma)
    if not (sigma >= 0 if zero else sigma > 0):
        raise ValueError(_sigma_message(name, str(sigma), zero))
    if sigma > HIGHEST_LEVEL:
        raise ValueError(_too_high_message(name, sigma))


def _check_sigma_shape(name: str, sigma: Tensor, x_name: str, x: Tensor) -> None:
    N = x.shape[0]
    if sigma.ndim == 0 or (sigma.ndim == 1 and sigma.shape[0] == N):
        return
    if sigma.ndim != 2 or sigma.shape[0] != N:
        raise ValueError(
            f"{name} must be 0-d or have shape [N] = [{N}] or [N, S] = [{N}, S], "
            f"got {list(sigma.shape)}; drop or expand dimensions"
        )
    if x.ndim != 3:
        raise ValueError(
            f"{x_name} must have shape [N, T, D] where {name} is [N, S], got {list(x.shape)}; "
            f"reshape it, or give {name} [N]"
        )
    S, T = sigma.shape[1], x.shape[1]
    if T % S != 0 if S else T != 0:
        raise ValueError(
            f"{name} must have a number of segments S that divides T = {T}, got S = {S}; "
            "choose segments of equal length"
        )


def check_sigma_data(sigma_data: float) -> None:
    """`sigma_data` has a square and an inverse in float32."""
    _checks.check_number("sigma_data", sigma_data)
    if not LOWEST_LEVEL <= sigma_data <= HIGHEST_LEVEL:
        raise ValueError(
            f"sigma_data must be a number from {LOWEST_LEVEL} to {HIGHEST_LEVEL}, "
            f"got {sigma_data}; 0.5 is usual"
        )


class OffsetSeed(NamedTuple):
    """A seed whose random numbers every op uses from `offset` on."""

    seed: int | Tensor
    offset: int


def split_seed(seed: int | Tensor, offset: int, x: Tensor) -> tuple[Tensor | None, int]:
    """The seed as a tensor or as a number, after checks of it and of `offset`."""
    _check_offset(offset, x)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int64 tensor, got {seed.dtype}; convert it first")
        if seed.ndim != 0:
            raise ValueError(f"seed must be 0-d, got shape {list(seed.shape)}; take one element")
        _checks.check_device(x, seed=seed)
        return seed, 0
    return None, check_seed(seed)


def _is_known(value: int | torch.SymInt) -> bool:
    """Whether `value` is a Python number: comparing a graph's symbolic one would add a guard."""
    return isinstance(value, int) and not torch.compiler.is_compiling()


def _check_offset(offset: int | torch.SymInt, x: Tensor) -> None:
    if not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"offset must be an int, got {_checks.type_name(offset)}; convert it first")
    if isinstance(offset, int) and offset < 0:
        raise ValueError(f"offset must be >= 0, got {offset}; elements are counted from 0")
    if _is_known(offset) and offset + max(x.numel(), 1) > COUNT_RANGE:
        raise ValueError(
            f"offset + the number of elements must be <= 2**63, got {offset} + {x.numel()}; "
            "start a stream with another seed"
        )
