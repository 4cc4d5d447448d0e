"""Sizes common to all autoregressive language models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dblocks.blocks.targets.classes import Head, check_head
from dblocks.models.token_sizes import TokenModelConfig

ROWS = ("single", "doubled")


@dataclass(frozen=True)
class LanguageModelConfig(TokenModelConfig):
    """Sizes of any `LanguageModel`; the defaults are a small model of characters or bytes."""

    embed_scale: float = 1.0
    """Norm of a token's embedding."""
    logit_scale: float = 1.0
    """Initial value of the learned factor of the logits, an inverse temperature."""
    tokens_per_sigma: int | None = 1
    """Number of consecutive tokens that share a noise level; None: all of a sequence."""
    rows: Literal["single", "doubled"] = "single"
    """How noisy embeddings enter: "single", added to the rows of the tokens before, one row per
    token; or "doubled", as published, in separate rows next to clean ones."""
    head: Head = "posterior"
    """Form of the logits: "posterior", a prediction from the text plus the exact log-likelihood of
    the noisy embedding; or "learned", as published, an output head on the preconditioned row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_per_sigma is not None and self.tokens_per_sigma < 1:
            raise ValueError(
                f"tokens_per_sigma must be positive or None, got {self.tokens_per_sigma}"
            )
        check_head(self.head)
        if self.rows not in ROWS:
            raise ValueError(f"rows must be one of {ROWS}, got {self.rows!r}")
        for name in ("embed_scale", "logit_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
