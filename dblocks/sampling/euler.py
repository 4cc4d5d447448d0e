"""Euler sampling: each step calls the one block that owns its noise level."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dblocks import functional as F
from dblocks.blocks import (
    Bound,
    Denoiser,
    DiffusionBlocks,
    check_trained_at_top,
    unwrapped,
)
from dblocks.schedules import EDMSchedule

Callback = Callable[[dict[str, Any]], object]


def initial_noise(
    shape: Sequence[int],
    schedule: EDMSchedule,
    *,
    kind: Literal["paper", "unit_variance"] = "paper",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The state from which sampling starts, at noise level sigma_max.

    Args:
        shape: shape of the target, [N, ...].
        schedule: gives sigma_max.
        kind: "paper" is `sigma_max * N(0, I)`; "unit_variance" is
            `sqrt(1 + sigma_max^2) * N(0, I)`, as in the published code.
        generator: source of the draw; its device is the default of `device`.
        device: device of the draw.

    Returns:
        float32 of the given shape.
    """
    if kind not in ("paper", "unit_variance"):
        raise ValueError(f"kind must be 'paper' or 'unit_variance', got {kind!r}")
    if device is None:
        device = generator.device if generator is not None else "cpu"
    variance = schedule.sigma_max**2 + (kind == "unit_variance")
    return variance**0.5 * torch.randn(tuple(shape), generator=generator, device=device)


@torch.no_grad()
def sample_euler(
    model: Callable[..., Tensor],
    z: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    callback: Callback | None = None,
    **cond: Any,
) -> Tensor:
    """Euler's method on the probability flow: Karras et al. 2022, algorithm 1 without churn.

        z_next = a*z + (1 - a)*denoised,  a = sigma_next/sigma

    Each of the n levels is one model call, and the last call's denoised is the result; a final 0,
    as k-diffusion appends it, is accepted and is not a call.

    Args:
        model: a `DiffusionBlocks`, or any `model(z, sigma, **cond) -> denoised`. Wrappers of
            torch.compile and AveragedModel around a `DiffusionBlocks` are looked through; to
            sample compiled code, compile its layers or parts.
        z: state at the first level, [N, ...].
        sigmas: descending levels, [n]; on the CPU nothing synchronises. Each belongs to a block in
            its own dtype.
        callback: called after each model call with a dict of 'x', 'i', 'sigma', 'sigma_hat' and
            'denoised'.
        **cond: passed to the model; a `DiffusionBlocks` embeds it once, and takes
            `guidance_scale` here too.

    Returns:
        denoised [N, ...].

    Warns:
        UserWarning: the levels skip a block.
    """
    levels = levels_of(sigmas)
    grid = levels.tolist()
    call, blocks = _bind(model, levels, cond)
    z = _to_last_level(call, z, grid, blocks, callback)
    denoised = call(z, _full(z, grid[-1]), **blocks[-1])
    _report(callback, z, len(grid) - 1, grid[-1], denoised)
    return denoised


@torch.no_grad()
def sample_logits(
    model: Denoiser,
    z: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    callback: Callback | None = None,
    **cond: Any,
) -> Tensor:
    """As `sample_euler`, but returns the logits of the last call instead of its denoised.

    The callback sees every call but the last. With guidance, the steps combine denoised estimates
    and the result combines logits.
    """
    levels = levels_of(sigmas)
    grid = levels.tolist()
    bound, blocks = _bind(model, levels, cond)
    z = _to_last_level(bound, z, grid, blocks, callback)
    return bound.logits(z, _full(z, grid[-1]), **blocks[-1])


@torch.no_grad()
def product_logits(
    model: Denoiser, z: Tensor, *, guidance_scale: float = 1.0, **cond: Any
) -> Tensor:
    """The normalised geometric mean of all blocks' predictions at sigma_max: log-probabilities.

        mean over blocks of log_softmax(logits_b),   normalised

    for models of classes or tokens. The noise tells nothing there, so that each block predicts from
    the condition alone; it costs one call of each.

    Args:
        model: a `DiffusionBlocks` whose blocks were all trained at sigma_max, see
            `BlocksConfig.top_share`.
        z: state at sigma_max, [N, ...].
        guidance_scale: see `Bound`.
        **cond: what the model's `embed_condition` reads.

    Returns:
        float32 [N, ..., K].

    Raises:
        ValueError: blocks after the first one never saw sigma_max in training.
    """
    model = unwrapped(model)
    check_trained_at_top(model)
    config = model.config
    bound = model.bind(guidance_scale=guidance_scale, **cond)
    sigma = _full(z, config.noise_schedule.sigma_max)
    total = torch.zeros((), device=z.device)
    for block in range(config.num_blocks):
        total = total + bound.logits(z, sigma, block=block).log_softmax(-1)
    return (total / config.num_blocks).log_softmax(-1)


def grid_of(
    model: Denoiser, num_steps: int | None, sigmas: Tensor | Sequence[float] | None
) -> Tensor | Sequence[float]:
    """The levels that `num_steps` or `sigmas` ask for; one step for each block by default.

    Raises:
        ValueError: both are given, or `num_steps` is not positive.
    """
    if num_steps is not None and sigmas is not None:
        raise ValueError(
            "at most one of num_steps and sigmas must be given, "
            f"got num_steps={num_steps} and sigmas={sigmas}; leave one out"
        )
    if sigmas is not None:
        return sigmas
    config = model.config
    return config.noise_schedule.steps(config.num_blocks if num_steps is None else num_steps)


class SamplingCost(NamedTuple):
    """What sampling runs."""

    calls: tuple[int, ...]
    """Of each block, how often its layers run."""
    layer_evaluations: int
    """Calls of layers for one sample."""


def sampling_cost(
    model: DiffusionBlocks, sigmas: Tensor | Sequence[float], *, guidance_scale: float = 1.0
) -> SamplingCost:
    """What sampling with these levels runs: a call a level, with guidance two.

    Args:
        model: the blocks.
        sigmas: descending levels, as of `sample_euler`.
        guidance_scale: 0 and 1 take one call a level.
    """
    num_blocks, times = model.config.num_blocks, 1 if guidance_scale in (0, 1) else 2
    owners = model.config.noise_schedule.block_of(levels_of(sigmas), num_blocks)
    calls = tuple(times * n for n in owners.bincount(minlength=num_blocks).tolist())
    ends = zip(calls, model.layer_ranges, strict=True)
    return SamplingCost(calls, sum(n * (last - first) for n, (first, last) in ends))


def levels_of(sigmas: Tensor | Sequence[float]) -> Tensor:
    """The levels that are called, on the CPU, in their own dtype; float64 for numbers."""
    if not (isinstance(sigmas, Tensor) and sigmas.is_floating_point()):
        sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    levels = sigmas.detach().cpu().flatten()
    if len(levels) and levels[-1] == 0:
        levels = levels[:-1]
    grid = levels.tolist()
    if not grid:
        raise ValueError("sigmas must hold at least one level above 0, got none")
    if not (grid[-1] > 0 and all(a > b for a, b in pairwise(grid))):
        raise ValueError(f"sigmas must be positive and descending, got {grid}")
    return levels


def blocks_of(model: Denoiser, levels: Tensor, *, stacklevel: int = 3) -> list[int]:
    """The block of each level.

    Warns:
        UserWarning: the levels skip a block, at the caller `stacklevel` calls away.
    """
    num_blocks = model.config.num_blocks
    blocks = model.config.noise_schedule.block_of(levels, num_blocks).tolist()
    skipped = sorted(set(range(num_blocks)) - set(blocks))
    if skipped:
        few = len(levels) < num_blocks
        advice = f"at least {num_blocks} steps" if few else "more steps or the equal_mass grid"
        warnings.warn(
            f"the {len(levels)} sampling steps call no level of blocks {skipped} of {num_blocks}; "
            f"use {advice}",
            UserWarning,
            stacklevel=stacklevel,
        )
    return blocks


def _bind(model: Any, levels: Tensor, cond: dict[str, Any]) -> tuple[Any, list[dict[str, int]]]:
    """The model with its condition, and the keywords of each call."""
    model = unwrapped(model)
    if not isinstance(model, Denoiser):
        return (lambda z, sigma: model(z, sigma, **cond)), [{} for _ in levels]
    blocks = blocks_of(model, levels, stacklevel=5)
    bound: Bound = model.bind(**cond)
    return bound, [{"block": block} for block in blocks]


def _to_last_level(
    call: Any, z: Tensor, grid: list[float], blocks: list[dict[str, int]], callback: Callback | None
) -> Tensor:
    """Every step but the last model call: the state at the last level."""
    z = z if z.dtype == torch.float64 else z.float()
    for i, (sigma, sigma_next) in enumerate(pairwise(grid)):
        denoised = call(z, _full(z, sigma), **blocks[i])
        _report(callback, z, i, sigma, denoised)
        z = F.euler_step(z, denoised, sigma, sigma_next)
    return z


def _full(z: Tensor, sigma: float) -> Tensor:
    return torch.full((z.shape[0],), sigma, dtype=z.dtype, device=z.device)


def _report(callback: Callback | None, z: Tensor, i: int, sigma: float, denoised: Tensor) -> None:
    if callback is not None:
        callback({"x": z, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
