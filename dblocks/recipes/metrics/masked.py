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
    """Its standard error over windows, due to both their text and their masks."""
    by_ratio: tuple[tuple[float, float], ...]
    """Pairs of a mask ratio and the bits per masked token at this ratio."""


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

    Windows are consecutive: each token is scored once, given tokens of its own window. The last
    window begins early enough to have full length; its overlap with the previous one is not scored.

    Args:
        model: see `bound_terms`.
        text: the text.
        context: tokens per window.
        windows: number of windows to score, evenly spaced in the text; by default all.
        points: number of points of the quadrature, see `bound_terms`.
        seed: seed of the masks.
        batch_size: windows per batch.
    """
    tokens, scored = consecutive_windows(text.tokens, context, windows)
    device = next(iter(model.parameters())).device
    terms = bound_terms(
        model, tokens.to(device),
        scored=scored.to(device), points=points, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    count = int(scored.sum())
    # A token may be more or less than a character.
    scale = len(text.tokens) / text.characters / math.log(2)
    nats = terms.nats.sum(1)
    mean, N = nats.sum().item() / count, len(nats)
    # Standard error of a ratio of sums: windows score different numbers of tokens.
    residuals = nats - mean * scored.sum(1)
    error = math.sqrt(N / (N - 1) * residuals.square().sum().item()) / count if N > 1 else math.nan
    by_ratio = zip(terms.shares.tolist(), (scale * terms.per_token(count)).tolist(), strict=True)
    return Bits(scale * mean, scale * error, tuple(by_ratio))
