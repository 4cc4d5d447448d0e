"""The options of `convert`, which a checkpoint stores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from dblocks.blocks.targets.classes import Head, check_head
from dblocks.config import check_count
from dblocks.integrations.convert.causal_lm import Rows


@dataclass(frozen=True)
class ConvertOptions:
    """How a model is converted; see `convert`."""

    clean_loss_weight: float = 0.0
    embed_scale: float = 1.0
    tokens_per_sigma: int | None = 1
    mask_token_id: int | None = None
    rows: Rows = "single"
    head: Head = "posterior"

    def __post_init__(self) -> None:
        for name in ("clean_loss_weight", "embed_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0 <= self.clean_loss_weight < math.inf:
            raise ValueError(
                f"clean_loss_weight must not be negative or infinite, got {self.clean_loss_weight}"
            )
        if not 0 < self.embed_scale < math.inf:
            raise ValueError(f"embed_scale must be positive and finite, got {self.embed_scale}")
        if self.tokens_per_sigma is not None:
            check_count("tokens_per_sigma", self.tokens_per_sigma)
        check_head(self.head)
        if self.rows not in get_args(Rows):
            raise ValueError(f"rows must be one of {get_args(Rows)}, got {self.rows!r}")
