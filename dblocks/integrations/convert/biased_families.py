"""Language models of transformers with ALiBi: positions enter as a bias of attention scores."""

from __future__ import annotations

import sys
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dblocks.integrations.convert.families import RotaryFamily, backbone, context_from_start
from dblocks.integrations.convert.own_attention import (
    BloomAttention,
    FalconAttention,
    MptAttention,
    Projected,
)
from dblocks.integrations.convert.row_attention import CAUSAL

UNBOUNDED = 2**20
"""Longest sequence where a model has no limit; so many rows of noise are set apart for a text."""


@dataclass(frozen=True)
class OwnAttentionFamily(RotaryFamily):
    """A model whose attention does not look its function up by name."""

    projected: ClassVar[type[Projected]]

    def attention(self, attention: nn.Module, name: str) -> nn.Module:
        """See `RotaryFamily`."""
        return self.projected(attention, name)

    def probed(self, attention: nn.Module) -> nn.Module | None:
        """See `RotaryFamily`."""
        return self.projected(attention, CAUSAL)


@dataclass(frozen=True)
class AlibiFamily(OwnAttentionFamily):
    """A bias per head, linear in the position of the key.

    The query's position would add a constant to all scores of a row, which changes no weight.
    """

    def reads(self, model: Any) -> tuple[str, ...]:
        """See `RotaryFamily`; the model counts positions itself."""
        return ()

    def context(
        self, model: Any, rows: Tensor, positions: Tensor, keys: Tensor | None = None
    ) -> dict[str, Any]:
        """See `CausalFamily`."""
        keys = positions if keys is None else keys
        # A batch may not give positions, so none exceeds the number of keys.
        table = self.table(model, rows, keys.shape[-1])[:, keys]
        bias = table.transpose(0, 1) if keys.ndim == 2 else table[None]
        return {"attention_mask": None, "position_bias": bias[:, :, None]}

    @abstractmethod
    def table(self, model: Any, rows: Tensor, length: int) -> Tensor:
        """The bias of keys at 0 to length - 1, [H, length], from the model's own function."""


@dataclass(frozen=True)
class BloomFamily(AlibiFamily):
    """Bloom."""

    projected = BloomAttention
    final_norm: str = "ln_f"
    refused: Any = field(
        default_factory=lambda: {
            "apply_residual_connection_post_layernorm": "sums with rows after the norm"
        }
    )

    def context_length(self, model: Any) -> int:
        """See `CausalFamily`."""
        return UNBOUNDED

    def enter(self, model: Any, rows: Tensor, positions: Tensor) -> Tensor:
        """See `CausalFamily`."""
        return backbone(model).word_embeddings_layernorm(rows)

    def table(self, model: Any, rows: Tensor, length: int) -> Tensor:
        """See `AlibiFamily`."""
        bloom, every = backbone(model), torch.ones(1, length, dtype=torch.long, device=rows.device)
        return bloom.build_alibi_tensor(every, bloom.num_heads, rows.dtype)[:, 0]

    def layer_context(self, model: Any, rows: Tensor) -> dict[str, Any]:
        """See `RotaryFamily`."""
        table = self.table(model, rows, rows.shape[1])
        return {"alibi": table[:, None], "attention_mask": hidden_from_later(rows)}


@dataclass(frozen=True)
class MptFamily(AlibiFamily):
    """MPT."""

    projected = MptAttention
    final_norm: str = "norm_f"

    def context_length(self, model: Any) -> int:
        """See `CausalFamily`."""
        return model.config.max_seq_len

    def enter(self, model: Any, rows: Tensor, positions: Tensor) -> Tensor:
        """See `CausalFamily`."""
        return rows

    def table(self, model: Any, rows: Tensor, length: int) -> Tensor:
        """See `AlibiFamily`."""
        mpt = backbone(model)
        return mpt.build_mpt_alibi_tensor(mpt.num_heads, length, device=rows.device)[:, 0]

    def layer_context(self, model: Any, rows: Tensor) -> dict[str, Any]:
        """See `RotaryFamily`."""
        table = self.table(model, rows, rows.shape[1])
        return {"position_bias": table[:, None], "attention_mask": hidden_from_later(rows) != 0}


@dataclass(frozen=True)
class FalconFamily(AlibiFamily):
    """Falcon, with rotary positions or ALiBi."""

    projected = FalconAttention
    final_norm: str = "ln_f"
    refused: Any = field(
        default_factory=lambda: {
            "hidden_dropout": "one dropout of the sum of both branches",
            "attention_dropout": "a dropout of some sums",
        }
    )

    def unsupported(self, model: Any) -> str | None:
        """See `RotaryFamily`."""
        if model.config.alibi and model.config._attn_implementation != "sdpa":
            return "alibi=True with an attention that is not 'sdpa' (another bias)"
        return super().unsupported(model)

    def reads(self, model: Any) -> tuple[str, ...]:
        """See `RotaryFamily`."""
        return () if model.config.alibi else RotaryFamily.reads(self, model)

    def context(
        self, model: Any, rows: Tensor, positions: Tensor, keys: Tensor | None = None
    ) -> dict[str, Any]:
        """See `CausalFamily`."""
        if model.config.alibi:
            return super().context(model, rows, positions, keys)
        return RotaryFamily.context(self, model, rows, positions, keys)

    def table(self, model: Any, rows: Tensor, length: int) -> Tensor:
        """See `AlibiFamily`; rounded and divided as in the model."""
        falcon = backbone(model)
        every = torch.ones(1, length, dtype=torch.long, device=rows.device)
        build = sys.modules[type(falcon).__module__].build_alibi_tensor
        width = model.config.hidden_size // falcon.num_heads
        return build(every, falcon.num_heads, rows.dtype)[:, 0] / width**0.5

    def layer_context(self, model: Any, rows: Tensor) -> dict[str, Any]:
        """See `RotaryFamily`."""
        if not model.config.alibi:
            return context_from_start(self, model, rows) | {"alibi": None}
        table = self.table(model, rows, rows.shape[1])[None, :, None]
        return {"alibi": table, "attention_mask": table + hidden_from_later(rows)}


def hidden_from_later(rows: Tensor) -> Tensor:
    """A causal mask [1, 1, T, T] to add to scores: 0, or a large negative number."""
    T = rows.shape[1]
    mask = rows.new_full((T, T), torch.finfo(rows.dtype).min).triu(1)
    return mask[None, None]
