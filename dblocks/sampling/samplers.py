"""Samplers of images, classes or any target: each call runs the block that owns its level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dblocks.blocks import BoundDenoiser, Denoiser, check_trained_at_top, unwrapped
from dblocks.sampling.levels import blocks_of, levels_of
from dblocks.sampling.steps import Callback, Sampler, Steps, check_sampler
from dblocks.schedules import EDMSchedule
from dblocks.schedules.noise import computed
from dblocks.schedules.random import draw_device


def initial_noise(
    shape: Sequence[int],
    schedule: EDMSchedule,
    *,
    noise: Literal["paper", "unit_variance"] = "paper",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The state from which sampling starts, at noise level sigma_max.

    Args:
        shape: shape of the target, [N, ...].
        schedule: the noise schedule, which has sigma_max.
        noise: "paper" is `sigma_max * N(0, I)`; "unit_variance" is
            `sqrt(1 + sigma_max^2) * N(0, I)`, as in the published code.
        generator: source of the draw; its device is the default of `device`.
        device: device of the draw.

    Returns:
        float32 of the given shape.

    Raises:
        ValueError: `noise` has another value.
    """
    if noise not in ("paper", "unit_variance"):
        raise ValueError(f"noise must be 'paper' or 'unit_variance', got {noise!r}")
    drawn_on = draw_device(generator)
    device = drawn_on if device is None else device
    variance = schedule.sigma_max**2 + (noise == "unit_variance")
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

    Each of the n levels is one model call, and the result is the last denoised estimate. A final 0,
    as appended by k-diffusion, is accepted and is not a call.

    Args:
        model: a `DiffusionBlocks`, or any `model(z, sigma, **cond) -> denoised`. If a
            `DiffusionBlocks` is wrapped by torch.compile or AveragedModel, the inner module is
            used; to sample with compiled code, compile its layers.
        z: state at the first level, [N, ...].
        sigmas: descending levels, [n]; on the CPU, so that nothing synchronises. The block of each
            level is chosen in the dtype of `sigmas`.
        callback: called after the first model call at each level with a dict of 'x', 'i', 'sigma',
            'sigma_hat' and 'denoised'.
        **cond: passed to the model; a `DiffusionBlocks` embeds it once, and also takes
            `guidance_scale`.

    Returns:
        denoised [N, ...].

    Warns:
        UserWarning: the levels skip a block.
    """
    return _sample("euler", model, z, sigmas, callback, cond)


@torch.no_grad()
def sample_heun(
    model: Callable[..., Tensor],
    z: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    callback: Callback | None = None,
    **cond: Any,
) -> Tensor:
    """Heun's method, of second order: Karras et al. 2022, algorithm 1 without churn.

        d = (z - denoised)/sigma,   z_next = z + (sigma_next - sigma) (d + d')/2

    where d' is computed at the result of Euler's step, by the block that owns sigma_next. n levels
    need 2n - 1 model calls: the step from the last level to 0 is an Euler step, whose result is
    `denoised`. Arguments, result and warnings are those of `sample_euler`.
    """
    return _sample("heun", model, z, sigmas, callback, cond)


def sampler_of(sampler: Sampler) -> Callable[..., Tensor]:
    """`sample_euler` or `sample_heun`.

    Raises:
        ValueError: there is no such sampler.
    """
    check_sampler(sampler)
    samplers: dict[Sampler, Callable[..., Tensor]] = {"euler": sample_euler, "heun": sample_heun}
    return samplers[sampler]


@torch.no_grad()
def sample_logits(
    model: Denoiser,
    z: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    sampler: Sampler = "euler",
    callback: Callback | None = None,
    **cond: Any,
) -> Tensor:
    """As `sample_euler` or `sample_heun`, but returns the logits of the last call.

    Arguments are those of `sample_euler`, and `sampler`, "euler" or "heun". The callback is called
    at every level but the last. With guidance, the steps combine denoised estimates and the result
    combines logits.

    Returns:
        Logits [N, ..., K].

    Raises:
        ValueError: there is no such sampler.
    """
    levels = levels_of(sigmas)
    steps = Steps(levels.tolist(), sampler)
    bound, owners = _bind(model, levels, steps, cond, stacklevel=5)
    z = steps.follow(_calls(bound, steps, owners), computed(z), callback)
    return bound.logits(z, _full(z, steps.grid[-1]), **owners[-1])


@torch.no_grad()
def product_logits(
    model: Denoiser, z: Tensor, *, guidance_scale: float = 1.0, **cond: Any
) -> Tensor:
    """The normalised geometric mean of all blocks' predictions at sigma_max: log-probabilities.

        mean over blocks of log_softmax(logits_b),   normalised

    for models of classes or tokens. At sigma_max the noisy input carries no information, so each
    block predicts from the condition alone. The cost is one call of each block.

    Args:
        model: a `DiffusionBlocks` whose blocks were all trained at sigma_max; see
            `BlocksConfig.top_share`.
        z: state at sigma_max, [N, ...].
        guidance_scale: see `BoundDenoiser`.
        **cond: the entries read by the model's `embed_condition`.

    Returns:
        float32 log-probabilities [N, ..., K].

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


def _sample(
    sampler: Sampler,
    model: Callable[..., Tensor],
    z: Tensor,
    sigmas: Tensor | Sequence[float],
    callback: Callback | None,
    cond: dict[str, Any],
) -> Tensor:
    levels = levels_of(sigmas)
    steps = Steps(levels.tolist(), sampler)
    bound, owners = _bind(model, levels, steps, cond, stacklevel=6)
    denoise, last = _calls(bound, steps, owners), len(steps.calls) - 1
    z = steps.follow(denoise, computed(z), callback)
    denoised = denoise(z, last)
    steps.report(callback, last, z, denoised)
    return denoised


def _bind(
    model: Any, levels: Tensor, steps: Steps, cond: dict[str, Any], *, stacklevel: int
) -> tuple[Any, list[dict[str, int]]]:
    """The model with its condition bound, and the keyword arguments of each call."""
    model = unwrapped(model)
    if not isinstance(model, Denoiser):
        return (lambda z, sigma: model(z, sigma, **cond)), [{} for _ in steps.calls]
    blocks = blocks_of(model, levels, stacklevel=stacklevel)
    bound: BoundDenoiser = model.bind(**cond)
    return bound, [{"block": blocks[i]} for i in steps.calls]


def _calls(
    bound: Any, steps: Steps, owners: list[dict[str, int]]
) -> Callable[[Tensor, int], Tensor]:
    return lambda z, call: bound(z, _full(z, steps.sigma(call)), **owners[call])


def _full(z: Tensor, sigma: float) -> Tensor:
    return torch.full((z.shape[0],), sigma, dtype=z.dtype, device=z.device)
