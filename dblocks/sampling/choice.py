"""Chooses tokens from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dblocks.config import check_count


class Choice:
    """Chooses a token from logits.

    Args:
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: number of most likely tokens to keep.
        top_p: keep the fewest most likely tokens whose probabilities sum to at least this.
    """

    def __init__(
        self, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
    ) -> None:
        if not (_is_number(temperature) and 0 <= temperature < math.inf):
            raise ValueError(f"temperature must be a finite number >= 0, got {temperature!r}")
        if top_k is not None:
            top_k = check_count("top_k", top_k)
        if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
            raise ValueError(f"top_p must be in (0, 1], got {top_p!r}")
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self._failed: Tensor | None = None  # on a GPU: whether any logits were not finite so far

    def probabilities(self, logits: Tensor) -> Tensor:
        """The probabilities to sample from, float64 [N, V], from logits [N, V], temperature > 0."""
        # The largest logit becomes 0, so that a small temperature makes none infinite.
        logits = logits.double()
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k is not None:
            kth = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -math.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is None:
            return probabilities
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token is kept if the sum of the earlier ones is below top_p: the first always is.
        kept = ordered.cumsum(-1) - ordered < self.top_p
        return torch.zeros_like(ordered).scatter(-1, index, ordered * kept)

    def token(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """The tokens chosen by uniform random numbers in (0, 1), float64 [N]; returns int64 [N].

        Raises:
            FloatingPointError: logits are NaN, infinite, or -inf for every token. On a GPU, where
                the check would synchronise, `check` raises it later.
        """
        failed = ~logits.amax(-1).isfinite().all()
        if logits.device.type == "cpu":
            self._failed = failed
            self.check()
        else:
            self._failed = failed if self._failed is None else self._failed | failed
        if self.temperature == 0:
            return logits.argmax(-1)
        # By the cumulative distribution: unlike with torch.multinomial, rows are independent.
        cdf = self.probabilities(logits).cumsum(-1)
        found = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)[:, 0]
        return found.clamp_(max=logits.shape[-1] - 1)  # for NaN the index is out of range

    def check(self) -> None:
        """Checks that all logits so far were finite; synchronises with a GPU.

        Raises:
            FloatingPointError: some logits were not finite.
        """
        if self._failed is not None and self._failed:
            raise FloatingPointError(
                "logits must be finite to draw tokens from them, got NaN or infinite ones; the "
                "model's weights or inputs are not finite"
            )


class Repeats:
    """The repetition penalty: for tokens in the text, logits l > 0 become l/p, others p*l.

    It is applied to the model's logits before the temperature.

    Args:
        penalty: p; above 1 makes repetitions less likely.
        texts: tokens of each prompt, int64 [P], P >= 1.
        vocab_size: V.
        device: device of the logits.

    Raises:
        ValueError: `penalty` is not positive and finite.

    Source: Keskar et al. 2019 (CTRL), section 4.1, in the form used by transformers.
    """

    def __init__(
        self, penalty: float, texts: Sequence[Tensor], vocab_size: int, device: torch.device
    ) -> None:
        if not (_is_number(penalty) and 0 < penalty < math.inf):
            raise ValueError(f"repetition_penalty must be positive and finite, got {penalty!r}")
        self.penalty = penalty
        self.held = None
        if penalty != 1:
            held = torch.zeros(len(texts), vocab_size, dtype=torch.bool)
            for row, text in zip(held, texts, strict=True):
                row[text] = True
            self.held = held.to(device)

    def penalised(self, logits: Tensor) -> Tensor:
        """Logits [N, V] with the penalty for the tokens of each text."""
        if self.held is None:
            return logits
        less = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(self.held, less, logits)

    def add(self, token: Tensor) -> None:
        """Adds the next token of each text, int64 [N]."""
        if self.held is not None:
            self.held.scatter_(1, token[:, None], True)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
