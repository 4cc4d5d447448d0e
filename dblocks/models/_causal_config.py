"""Sizes that all autoregressive language models have."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dblocks._config import JsonConfig
from dblocks.nn import ConditioningKind, conditioning_of

MLP_MULTIPLE = 8  # widths of matrix products that hardware likes


@dataclass(frozen=True)
class LanguageModelConfig(JsonConfig):
    """Sizes of any `LanguageModel`; the defaults are a small model of characters or bytes."""

    vocab_size: int = 256
    """Number of tokens V."""
    context: int = 128
    """Longest sequence or document."""
    width: int = 192
    """Width D of the rows."""
    heads: int = 3
    """Attention heads; a divisor of the width that leaves heads of even width."""
    kv_heads: int | None = None
    """Key/value heads, a divisor of heads; as many as heads by default."""
    mlp_ratio: float = 8 / 3
    """Width inside the MLP over D, rounded up to a multiple of 8."""
    rope_theta: float = 10_000.0
    """Base of the rotary positions' frequencies."""
    conditioning: ConditioningKind = "dit"
    """How noisy rows are conditioned on the noise: dit, official, or none for plain Llama."""
    gate_init: float = 0.0
    """What the gates of conditioned layers start at: 0, as published, or 1, the plain layer."""
    embed_scale: float = 1.0
    """Norm of a token's embedding."""
    tied: bool = True
    """Whether the readout uses the token embeddings; else it has a matrix of its own."""
    logit_scale: float = 1.0
    """What the learned factor of the logits, an inverse temperature, starts at."""
    tokens_per_sigma: int | None = 1
    """How many consecutive tokens share a noise level; None: all of a sequence."""

    def __post_init__(self) -> None:
        conditioning_of(self.conditioning)
        for name in ("vocab_size", "context", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("kv_heads", "tokens_per_sigma"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive or None, got {value}")
        for name in ("mlp_ratio", "rope_theta", "embed_scale", "logit_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.gate_init < math.inf:
            raise ValueError(f"gate_init must be a finite number >= 0, got {self.gate_init}")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(
                "width must be an even multiple of heads, which rotary positions need, "
                f"got {self.width} and {self.heads}"
            )

    @property
    def hidden_dim(self) -> int:
        """Width inside the MLP."""
        return MLP_MULTIPLE * math.ceil(self.width * self.mlp_ratio / MLP_MULTIPLE)
