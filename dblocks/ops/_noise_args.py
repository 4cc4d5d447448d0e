"""Checks of the arguments that noise and its levels come with: sigma, sigma_data, seed, offset."""

import torch
from torch import Tensor

from dblocks.ops import _common

SEED_RANGE = 2**63


def widest(*tensors: Tensor) -> Tensor:
    """The first float64 tensor, which decides the arithmetic, or else the first tensor."""
    return next((t for t in tensors if t.dtype == torch.float64), tensors[0])


def check_samples(name: str, x: Tensor) -> None:
    """`x` is [N, ...]."""
    if x.ndim == 0:
        raise ValueError(f"{name} must have shape [N, ...], got a 0-d tensor; add a dimension")


def check_sigma(name: str, sigma: Tensor, x_name: str, x: Tensor, *, zero: bool = False) -> None:
    """`sigma` is a floating tensor, 0-d, [N] or [N, S], on the device of `x`, and positive.

    Values are looked at where that needs no synchronisation: on the CPU, outside a compiled graph.
    """
    if not isinstance(sigma, Tensor):
        raise TypeError(
            f"{name} must be a floating tensor, got {type(sigma).__name__}; "
            "make a 0-d tensor of it on the device"
        )
    _common.check_float(**{name: sigma})
    _common.check_device(x, **{name: sigma})
    _check_sigma_shape(name, sigma, x_name, x)
    known = type(sigma) is Tensor and sigma.device.type == "cpu"
    if known and not torch.compiler.is_compiling():
        values = sigma.detach()
        if not bool((values >= 0 if zero else values > 0).all()):
            raise ValueError(_sigma_message(name, f"a minimum of {values.min().item()}", zero))


def _sigma_message(name: str, got: str, zero: bool) -> str:
    bound = ">= 0" if zero else "> 0"
    return f"{name} must be {bound} everywhere, got {got}; clamp it to the schedule's sigma_min"


def check_sigma_value(name: str, sigma: float, *, zero: bool = False) -> None:
    """The number `sigma` is positive (or 0, where `zero` allows it)."""
    if not (sigma >= 0 if zero else sigma > 0):
        raise ValueError(_sigma_message(name, str(sigma), zero))


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
    """`sigma_data` is positive."""
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be a number > 0, got {sigma_data}; 0.5 is usual")


def split_seed(seed: int | Tensor, offset: int, x: Tensor) -> tuple[Tensor | None, int]:
    """The seed as a tensor or as a number, after checks of it and of `offset`."""
    if not isinstance(offset, int):
        raise TypeError(f"offset must be an int, got {type(offset).__name__}; convert it first")
    if offset < 0:
        raise ValueError(f"offset must be >= 0, got {offset}; elements are counted from 0")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int64 tensor, got {seed.dtype}; convert it first")
        if seed.ndim != 0:
            raise ValueError(f"seed must be 0-d, got shape {list(seed.shape)}; take one element")
        _common.check_device(x, seed=seed)
        return seed, 0
    if not isinstance(seed, int):
        raise TypeError(
            f"seed must be an int or a 0-d int64 tensor, got {type(seed).__name__}; convert it"
        )
    # In a compiled graph every int has 64 bits already, and a comparison would be a guard.
    if not torch.compiler.is_compiling() and not -SEED_RANGE <= seed < SEED_RANGE:
        raise ValueError(f"seed must fit in 64 bits (two's complement), got {seed}; reduce it")
    return None, seed
