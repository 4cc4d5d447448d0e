"""Accuracy, the loss of language models, and the mean and spread of repeated runs."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dblocks.blocks import DiffusionBlocks, unwrapped
from dblocks.models.causal_lm import CausalLM
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
    model: DiffusionBlocks | CausalLM,
    tokens: Tensor,
    *,
    num_steps: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What each token costs given those before it: -ln p, in nats.

    In blocks, every position takes its Euler steps from noise of its own, all positions in
    parallel, beside the true tokens. One step runs the top block at sigma_max, whose noise tells
    nothing: as exact a next-token predictor as the plain model. Bits per token are the mean over
    ln 2.

    Args:
        model: the blocks of a `CausalLM`, or a plain `CausalLM`, which takes no steps.
        tokens: int64 [N, T].
        num_steps: Euler steps on the equal-mass grid; the plain model takes 1 only.
        generator: source of the noise; by default that of the tokens' device.

    Returns:
        float32 [N, T - 1]: the first token of a sequence is given.
    """
    model = unwrapped(model)
    if isinstance(model, DiffusionBlocks):
        logits = _denoised_logits(model, tokens, num_steps, generator)[:, 1:]
    elif num_steps != 1:
        raise ValueError(f"num_steps must be 1 for a plain CausalLM, got {num_steps}")
    else:
        logits = model(tokens)[:, :-1]
    return nnf.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (divisor n-1; nan for a single value)."""
    if not values:
        raise ValueError("mean_std needs at least one value, got none")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _denoised_logits(
    model: DiffusionBlocks, tokens: Tensor, num_steps: int, generator: torch.Generator | None
) -> Tensor:
    schedule = model.config.schedule
    width = model.base_model.config.width  # pyright: ignore[reportAttributeAccessIssue]
    device = tokens.device if generator is None else generator.device
    z = initial_noise((*tokens.shape, width), schedule, generator=generator, device=device)
    z = z.to(tokens.device)
    if num_steps > 1:
        return sample_logits(model, z, schedule.steps(num_steps), tokens=tokens)
    # Not as a sampling grid: that warns of the blocks it skips.
    sigma = torch.full((len(tokens),), schedule.sigma_max, device=z.device)
    return model.logits(z, sigma, block=0, tokens=tokens)
