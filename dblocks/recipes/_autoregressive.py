"""What is measured of a model that predicts the next token, and what it writes."""

from __future__ import annotations

import math
from abc import ABC
from typing import Any

import torch
from torch import nn

from dblocks.generate import generate
from dblocks.metrics import next_token_nll
from dblocks.recipes._text import NOISE_SEED, PROMPT, TextLearner, continuations
from dblocks.text import Text, scored_windows

POINT_WINDOWS = 32  # windows of the held-out text that a point of the curve looks at


class AutoregressiveLearner(TextLearner, ABC):
    """A model in training that predicts the next token; arguments as of `TextLearner`."""

    def counted(self) -> list[nn.Module]:
        """The MLPs: a layer calls its own once for clean rows and once for noisy ones."""
        return [layer.mlp for layer in self.network.layers]

    def measure(self) -> dict[str, Any]:
        """Bits per character of some of the held-out text, by the first block alone in blocks."""
        return {"bits": self.bits(windows=POINT_WINDOWS)}

    def bits(self, **options: Any) -> float:
        """Bits per character of the held-out text; options as of `bits_per_character`."""
        return bits_per_character(self.trained, self.corpus.evaluated, self.text.context, **options)

    def samples(self, **options: Any) -> list[str]:
        """Continuations of places spread over the held-out text, at temperature 1.

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
    num_steps: int | None = None,
    draws: int = 1,
    windows: int | None = None,
    batch_size: int = 32,
) -> float:
    """Bits per character of a text under a model, every token with half a window before it.

    In blocks with one step the first block, from noise at sigma_max, is a next-token predictor, and
    this is its cross-entropy. With more steps the tokens' probabilities are those of the last
    call, on the way from noise that does not know the token, so that it is an upper bound; the mean
    of probabilities over several draws of noise is a tighter one.

    Args:
        model: a `LanguageModel` or its `DiffusionBlocks`.
        text: what to score; all but its first token.
        context: tokens in a window.
        num_steps: as of `next_token_nll`.
        draws: as of `next_token_nll`.
        windows: score the tokens of the first so many windows only.
        batch_size: windows at a time.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(NOISE_SEED)
    nats, count, seen = 0.0, 0, 0
    for tokens, scored in scored_windows(text.tokens, context, batch_size):
        if windows is not None and seen >= windows:
            break
        seen += len(tokens)
        losses = next_token_nll(
            model, tokens.to(device), num_steps=num_steps, draws=draws, generator=generator
        ).cpu()
        nats += losses[scored[:, 1:]].double().sum().item()
        count += int(scored[:, 1:].sum())
    return nats / count / math.log(2) * len(text.tokens) / text.characters
