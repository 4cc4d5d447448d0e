"""Sizes common to all models of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dblocks.config import JsonConfig
from dblocks.nn import ConditioningKind, conditioning_of

MLP_MULTIPLE = 8  # a multiple that suits matrix units


@dataclass(frozen=True)
class TokenModelConfig(JsonConfig):
    """Sizes of a model of tokens; the defaults are a small one of characters or bytes."""

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
    """Width inside the MLP divided by D; the width is rounded up to a multiple of 8."""
    rope_theta: float = 10_000.0
    """Base of the rotary positions' frequencies."""
    conditioning: ConditioningKind = "dit"
    """Convention of conditioning on the level: dit, official, or none for plain Llama layers."""
    gate_init: float = 0.0
    """Initial value of the gates of conditioned layers: 0, as published, or 1, the plain layer."""
    tied: bool = True
    """Whether the output head uses the token embeddings; else it has a separate matrix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        conditioning_of(self.conditioning)
        for name in ("vocab_size", "context", "width", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.kv_heads is not None and self.kv_heads < 1:
            raise ValueError(f"kv_heads must be positive or None, got {self.kv_heads}")
        for name in ("mlp_ratio", "rope_theta"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.gate_init < math.inf:
            raise ValueError(f"gate_init must be a finite number >= 0, got {self.gate_init}")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(
                "width must be an even multiple of heads, which rotary positions need, "
                f"got {self.width} and {self.heads}"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(
                f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}"
            )

    @property
    def hidden_dim(self) -> int:
        """Width inside the MLP."""
        return MLP_MULTIPLE * math.ceil(self.width * self.mlp_ratio / MLP_MULTIPLE)
