"""What is measured of a model that predicts the next token, and what it writes."""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from dblocks.blocks import BlocksConfig, Weighting
from dblocks.nn import ConditioningKind
from dblocks.recipes.data.text import Text, scored_windows
from dblocks.recipes.text_run import NOISE_SEED, PROMPT, TextLearner, TextRun, continuations
from dblocks.sampling import denoising_bound, generate, next_token_nll, product_nll
from dblocks.schedules import NoiseSchedule

POINT_WINDOWS = 32  # of the held-out text, spread evenly, that a point of the curve looks at


@dataclass(frozen=True, kw_only=True)
class AutoregressiveRun(TextRun, ABC):
    """Everything that decides the outcome of a run of a model that predicts the next token."""

    batch_size: int = 4
    """Windows of `context` tokens in a batch."""
    kv_heads: int | None = None
    """Key/value heads; as many as heads by default."""
    rows: Literal["single", "doubled"] = "single"
    """How noisy embeddings enter the blocks; see `LanguageModelConfig`."""
    head: Literal["posterior", "learned"] = "posterior"
    """What the blocks' logits are; see `LanguageModelConfig`."""
    top_share: float = 0.6
    """Share of every block's draws that are at sigma_max."""
    conditioning: ConditioningKind = "none"
    """AdaLN of the blocks; the network trained end to end has none."""
    gate_init: float = 1.0
    """Of AdaLN's gates: layers start as the plain ones of the network trained end to end."""
    embed_scale: float = 1.0
    """Norm of a token's embedding."""
    weighting: Weighting = "none"
    """Weight of a noise level's loss in blocks."""
    p_mean: float
    """Mean of the logarithm of the noise levels."""
    p_std: float = 2.0
    """Standard deviation of it."""
    sigma_data: float = 0.5
    """Of the preconditioning; an element of an embedding deviates by embed_scale/sqrt(width)."""
    overlap: float = 0.1
    """Of the blocks' noise levels."""

    def sizes(self, vocab_size: int) -> dict[str, Any]:
        """What the configs of the models have in common.

        The network is plain end to end.
        """
        plain = self.end_to_end
        return {
            "vocab_size": vocab_size,
            "context": self.context,
            "width": self.width,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "conditioning": "none" if plain else self.conditioning,
            "gate_init": 0.0 if plain or self.conditioning == "none" else self.gate_init,
            "embed_scale": self.embed_scale,
            "rows": "doubled" if plain else self.rows,
            "head": "learned" if plain else self.head,
        }

    def blocks_config(self) -> BlocksConfig:
        """How the network is cut, and its noise levels."""
        return BlocksConfig(
            num_blocks=self.blocks,
            schedule=NoiseSchedule(
                p_mean=self.p_mean, p_std=self.p_std, sigma_data=self.sigma_data
            ),
            overlap=self.overlap,
            top_share=self.top_share,
            weighting=self.weighting,
        )


class AutoregressiveLearner(TextLearner, ABC):
    """A model in training that predicts the next token; arguments as of `TextLearner`."""

    def counted(self) -> list[nn.Module]:
        """The MLPs: a layer calls its own once for clean rows and once for noisy ones."""
        return [layer.mlp for layer in self.network.layers]

    def measure(self) -> dict[str, Any]:
        """Bits per character of some of the held-out text, by the first block alone in blocks."""
        return {"bits": self.bits(windows=POINT_WINDOWS), "windows": POINT_WINDOWS}

    def bits(self, **options: Any) -> float:
        """Bits per character of the held-out text; options as of `bits_per_character`."""
        return bits_per_character(self.trained, self.corpus.evaluated, self.text.context, **options)

    def samples(self, **options: Any) -> list[str]:
        """Continuations of places spread over the held-out text, at temperature 1 by default.

        Options are those of `generate`, such as `num_steps=`.
        """
        prompts, _ = continuations(self.corpus.evaluated, self.text.context)
        written = generate(
            self.trained,
            prompts,
            max_new_tokens=self.text.context - PROMPT,
            generator=torch.Generator().manual_seed(NOISE_SEED),
            **options,
        )
        return [self.corpus.tokenizer.decode(tokens.tolist()) for tokens in written]


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
    """Bits per character of a text under a model, every token with half a window before it.

    Args:
        model: a `LanguageModel` or its `DiffusionBlocks`, of which the first block predicts.
        text: what to score; all but its first token.
        context: tokens in a window.
        product: all blocks together predict, see `product_nll`.
        num_steps: as of `next_token_nll`.
        windows: score the tokens of so many windows only, spread evenly over the text; see
            `scored_windows`.
        batch_size: windows at a time.
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
    """The bound of all blocks in bits per character, as JSON values.

    Arguments are those of `bits_per_character`, and `draws` that of `denoising_bound`.

    Returns:
        "bits", their "std_error" by the draws, and what the denoising of each block adds to them,
        "by_block".
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
