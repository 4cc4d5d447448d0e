"""How a token is chosen from logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dblocks.config import check_count


class Choice:
    """How a token is chosen from logits.

    Args:
        temperature: what logits are divided by; 0 takes the most likely token.
        top_k: how many tokens are kept.
        top_p: probability that the tokens that are kept must reach.
    """

    def __init__(
        self, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
    ) -> None:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
        if top_k is not None:
            top_k = check_count("top_k", top_k)
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {top_p}")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from, float64 [N, V], of logits [N, V]; temperature is not 0."""
        logits = logits.double() / self.temperature
        if self.top_k is not None:
            kth = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -math.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is None:
            return probabilities
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token is kept if those before it do not reach top_p: the first always is.
        kept = ordered.cumsum(-1) - ordered < self.top_p
        return torch.zeros_like(ordered).scatter(-1, index, ordered * kept)

    def token(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """The token that each uniform number in (0, 1), float64 [N], picks; int64 [N]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        # Of the cumulative distribution: unlike torch.multinomial, a row at a time.
        cdf = self.probabilities(logits).cumsum(-1)
        return torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
