"""Bits per character of a text under a next-token model."""

from __future__ import annotations

import math
from typing import Any

import torch

from dblocks.recipes.data.text import Text
from dblocks.recipes.data.windows import scored_windows
from dblocks.recipes.metrics import NOISE_SEED
from dblocks.sampling import denoising_bound, next_token_nll, product_nll


@torch.no_grad()
def bits_per_character(
    model: Any,
    text: Text,
    context: int,
    *,
    product: bool = False,
    num_steps: int | None = None,
    windows: int | None = None,
    batch_size: int = 32,
) -> float:
    """Bits per character of a text under a model, with at least half a window of context.

    Args:
        model: a `LanguageModel`, or its `DiffusionBlocks`, of which the first block predicts.
        text: the text, scored from its second token.
        context: tokens per window.
        product: whether to predict with the product of all blocks, see `product_nll`.
        num_steps: see `next_token_nll`.
        windows: number of windows to score, evenly spaced in the text; see `scored_windows`.
        batch_size: windows per batch.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(NOISE_SEED)
    nats, count = 0.0, 0
    for tokens, scored in scored_windows(text.tokens, context, batch_size, windows=windows):
        tokens = tokens.to(device)
        if product:
            losses = product_nll(model, tokens, generator=generator)
        else:
            losses = next_token_nll(model, tokens, num_steps=num_steps, generator=generator)
        nats += losses.cpu()[scored[:, 1:]].double().sum().item()
        count += int(scored[:, 1:].sum())
    return _bits(nats / count, text)


@torch.no_grad()
def bound_of(
    model: Any,
    text: Text,
    context: int,
    *,
    draws: int = 2,
    windows: int | None = None,
    batch_size: int = 32,
) -> dict[str, Any]:
    """The denoising bound over all blocks in bits per character, as JSON values.

    For the arguments see `bits_per_character`, and for `draws` `denoising_bound`.

    Returns:
        "bits"; "std_error", their standard error due to the draws; and "by_block", the contribution
        of each block.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(NOISE_SEED)
    nats, variance, count = 0.0, 0.0, 0
    by_block = torch.zeros(model.config.num_blocks, dtype=torch.float64)
    for tokens, scored in scored_windows(text.tokens, context, batch_size, windows=windows):
        found = denoising_bound(model, tokens.to(device), draws=draws, generator=generator)
        mask = scored[:, 1:].to(device)
        nats += found.nll[mask].double().sum().item()
        variance += found.variance[mask].double().sum().item()
        by_block += found.by_block[:, mask].double().sum(1).cpu()
        count += int(mask.sum())
    return {
        "bits": _bits(nats / count, text),
        "std_error": _bits(math.sqrt(variance) / count, text),
        "by_block": [_bits(value / count, text) for value in by_block.tolist()],
        "draws": draws,
    }


def _bits(nats_per_token: float, text: Text) -> float:
    return nats_per_token / math.log(2) * len(text.tokens) / text.characters
