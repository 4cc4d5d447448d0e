"""The grid of sampling levels, their blocks, and the cost of sampling."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dblocks.blocks import Denoiser, DiffusionBlocks
from dblocks.sampling.steps import Sampler, Steps


def grid_of(
    model: Denoiser, num_steps: int | None, sigmas: Tensor | Sequence[float] | None
) -> Tensor | Sequence[float]:
    """The levels given by `num_steps` or `sigmas`; by default one step for each block.

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


def levels_of(sigmas: Tensor | Sequence[float]) -> Tensor:
    """The levels of the model calls, on the CPU, in the dtype of `sigmas`; float64 for numbers."""
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
        UserWarning: the levels skip a block; reported for the caller `stacklevel` frames up.
    """
    num_blocks = model.config.num_blocks
    blocks = model.config.noise_schedule.block_of(levels, num_blocks).tolist()
    skipped = sorted(set(range(num_blocks)) - set(blocks))
    if skipped:
        few = len(levels) < num_blocks
        advice = f"at least {num_blocks} steps" if few else "more steps or the equal_mass grid"
        warnings.warn(
            f"the {len(levels)} sampling steps have no level of blocks {skipped} of {num_blocks}; "
            f"use {advice}",
            UserWarning,
            stacklevel=stacklevel,
        )
    return blocks


class SamplingCost(NamedTuple):
    """The cost of sampling."""

    calls: tuple[int, ...]
    """Number of calls of each block's layers."""
    layer_evaluations: int
    """Number of layer calls for one sample."""


def sampling_cost(
    model: DiffusionBlocks,
    sigmas: Tensor | Sequence[float],
    *,
    guidance_scale: float = 1.0,
    sampler: Sampler = "euler",
) -> SamplingCost:
    """The cost of sampling with these levels; guidance doubles the calls.

    Args:
        model: the blocks.
        sigmas: descending levels, as in `sample_euler`.
        guidance_scale: 0 and 1 need one call of the network per call of the model, other values
            two.
        sampler: "euler" calls the model once at each level, "heun" twice at all but the first.
    """
    num_blocks, times = model.config.num_blocks, 1 if guidance_scale in (0, 1) else 2
    levels = levels_of(sigmas)
    owners = model.config.noise_schedule.block_of(levels, num_blocks)
    owners = owners[Steps(levels.tolist(), sampler).calls]
    calls = tuple(times * n for n in owners.bincount(minlength=num_blocks).tolist())
    ends = zip(calls, model.layer_ranges, strict=True)
    return SamplingCost(calls, sum(n * (last - first) for n, (first, last) in ends))
