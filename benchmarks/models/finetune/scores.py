"""Scores of a fine-tuned network on held-out text."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.finetune import pretrained
from benchmarks.models.finetune.arms import DENOISING_SEED, Settings
from dblocks.integrations.convert import ConvertedBlocks
from dblocks.recipes.data.text import Text
from dblocks.recipes.metrics.autoregressive import bits_per_character, bound_of

BOUND_WINDOWS = 16  # windows of a text for the bound, which takes two calls of every block


def scores(network: Any, settings: Settings, text: Text) -> dict[str, float]:
    """Bits per character of a text: for the plain model, for one call of the first block, for the
    product of all blocks, the bound over all blocks, and the denoising loss, a mean over blocks and
    over their levels."""
    context, windows = settings.pretraining.context, settings.windows
    if not isinstance(network, ConvertedBlocks):
        return {"plain": pretrained.plain_bits(network, text, context, windows)}
    found = {"plain": pretrained.plain_bits(network.base_model.model, text, context, windows)}
    found["block"] = bits_per_character(network, text, context, windows=windows)
    found["product"] = bits_per_character(network, text, context, windows=windows, product=True)
    found["bound"] = bound_of(network, text, context, windows=BOUND_WINDOWS)["bits"]
    tokens = pretrained.windows_of(text, settings.pretraining, 16, seed=DENOISING_SEED, step=0)
    found["denoising"] = denoising_bits(network, tokens)
    return found


@torch.no_grad()
def denoising_bits(blocks: ConvertedBlocks, tokens: Tensor) -> float:
    """The mean of the blocks' cross-entropies, each over its own levels, in bits."""
    generator = torch.Generator().manual_seed(DENOISING_SEED)
    weight, config = blocks.clean_loss_weight, blocks.config
    blocks.clean_loss_weight, blocks.config = 0.0, replace(config, top_share=0.0)
    losses = [
        blocks.loss({"tokens": tokens}, b, generator=generator).losses.mean().item()
        for b in range(blocks.config.num_blocks)
    ]
    blocks.clean_loss_weight, blocks.config = weight, config
    return statistics.fmean(losses) / math.log(2)
