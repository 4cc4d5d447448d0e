"""Bits per character of a text under a masked diffusion model."""

from __future__ import annotations

import math
from typing import NamedTuple

from dblocks.blocks import Denoiser
from dblocks.recipes.data.text import Text
from dblocks.recipes.data.windows import consecutive_windows
from dblocks.sampling import bound_terms
from dblocks.sampling.masked_likelihood import POINTS


class Bits(NamedTuple):
    """Bits per character of a text."""

    bits: float
    """An estimate of the bound."""
    error: float
    """Its standard error over windows: of which text they hold, and of how it was masked."""
    by_ratio: tuple[tuple[float, float], ...]
    """Pairs of a mask ratio and the bits that a masked token costs there."""


def bits_per_character(
    model: Denoiser,
    text: Text,
    context: int,
    *,
    windows: int | None = None,
    points: int = POINTS,
    seed: int = 0,
    batch_size: int = 32,
) -> Bits:
    """The bound of a text under a model, in bits per character.

    Windows follow one another, so that each token is scored once, beside those of its own window;
    the last one begins early enough to be whole, and what it shares with the one before is given.

    Args:
        model: as for `bound_terms`.
        text: what to score.
        context: tokens in a window.
        windows: so many windows only, spread evenly over the text.
        points: of the quadrature, see `bound_terms`.
        seed: of the masks.
        batch_size: windows at a time.
    """
    tokens, scored = consecutive_windows(text.tokens, context, windows)
    device = next(iter(model.parameters())).device
    terms = bound_terms(
        model, tokens.to(device),
        scored=scored.to(device), points=points, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    count = int(scored.sum())
    # A character may be less or more than a token.
    scale = len(text.tokens) / text.characters / math.log(2)
    nats = terms.nats.sum(1)
    mean, N = nats.sum().item() / count, len(nats)
    # Of a ratio of sums: windows differ in how many tokens they score.
    residuals = nats - mean * scored.sum(1)
    error = math.sqrt(N / (N - 1) * residuals.square().sum().item()) / count if N > 1 else math.nan
    by_ratio = zip(terms.shares.tolist(), (scale * terms.per_token(count)).tolist(), strict=True)
    return Bits(scale * mean, scale * error, tuple(by_ratio))
