"""Accuracy, the loss of language models, and the mean and spread of repeated runs."""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dblocks._numbers import check_count
from dblocks.blocks import DiffusionBlocks, unwrapped
from dblocks.models._causal import LanguageModel
from dblocks.sample import initial_noise, sample_logits


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of rows whose largest logit is the label's, in [0, 1].

    Args:
        logits: [N, classes].
        labels: int64 [N].
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must have shape [N, classes] and labels [N], got {list(logits.shape)} "
            f"and {list(labels.shape)}"
        )
    if len(labels) == 0:
        raise ValueError("accuracy needs at least one sample, got none")
    return (logits.argmax(-1) == labels).double().mean().item()


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, batch_size: int = 256
) -> float:
    """The accuracy of `predict`, images [n, C, H, W] -> logits [n, classes], batch by batch."""
    logits = [predict(chunk) for chunk in images.split(batch_size)]
    return accuracy(torch.cat(logits), labels)


@torch.no_grad()
def next_token_nll(
    model: DiffusionBlocks | LanguageModel,
    tokens: Tensor,
    *,
    num_steps: int | None = None,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What each token costs given those before it: -ln p, in nats.

    In blocks, every position takes its Euler steps from noise of its own, all positions in
    parallel, beside the true tokens. One step runs the top block at sigma_max, whose noise tells
    nothing: as exact a next-token predictor as the plain model. With more steps p depends on the
    noise, and the price of the mean of p over noise is at most the mean price: p is the mean over
    `draws` of it, whose price is, in expectation, the lower the more there are. Bits per token are
    the mean over ln 2.

    Args:
        model: the blocks of a `CausalLM` or a `RecurrentLM`, or one of these as plain model.
        tokens: int64 [N, T].
        num_steps: Euler steps on the equal-mass grid, by default 1; of a plain `RecurrentLM` its
            recurrences, by default their mean in training; a plain `CausalLM` has 1 only.
        draws: how often noise is drawn.
        generator: source of the noise; by default that of the tokens' device. For a plain
            `RecurrentLM` on the CPU.

    Returns:
        float32 [N, T - 1]: the first token of a sequence is given.

    Raises:
        TypeError: `model` is none of these.
    """
    draws = check_count("draws", draws)
    model = unwrapped(model)
    if not isinstance(model, (DiffusionBlocks, LanguageModel)):
        raise TypeError(
            "model must be a CausalLM, a RecurrentLM or the DiffusionBlocks of one, "
            f"got {type(model).__name__}; see dblocks.models"
        )
    targets, nll = tokens[:, 1:], []
    for _ in range(draws):
        logits = _next_logits(model, tokens, num_steps, generator)
        nll.append(nnf.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
    if draws == 1:
        return nll[0]
    return math.log(draws) - (-torch.stack(nll)).logsumexp(0)


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (divisor n-1; nan for a single value)."""
    if not values:
        raise ValueError("mean_std needs at least one value, got none")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _next_logits(
    model: DiffusionBlocks | LanguageModel,
    tokens: Tensor,
    num_steps: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Logits [N, T - 1, V] of all tokens but the first."""
    if isinstance(model, DiffusionBlocks):
        steps = 1 if num_steps is None else num_steps
        return _denoised_logits(model, tokens, steps, generator)[:, 1:]
    steps = model.plain_steps(num_steps)
    return model.next_token_logits(tokens, num_steps=steps, generator=generator)[:, :-1]


def _denoised_logits(
    model: DiffusionBlocks, tokens: Tensor, num_steps: int, generator: torch.Generator | None
) -> Tensor:
    schedule = model.config.noise_schedule
    width = cast(Any, model.base_model).width
    device = tokens.device if generator is None else generator.device
    z = initial_noise((*tokens.shape, width), schedule, generator=generator, device=device)
    z = z.to(tokens.device)
    if num_steps > 1:
        return sample_logits(model, z, schedule.steps(num_steps), tokens=tokens)
    # Not as a sampling grid: that warns of the blocks it skips.
    sigma = torch.full((len(tokens),), schedule.sigma_max, device=z.device)
    return model.logits(z, sigma, block=0, tokens=tokens)
