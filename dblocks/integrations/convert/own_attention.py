"""Attention modules of transformers, run by their projections.

These modules do not look their function up by name, or do not take the arguments of converted rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks.blocks.changes import runs_more
from dblocks.integrations.convert.row_attention import CAUSAL, causal, doubled

Heads: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, each [N, heads, R, D]."""


class Projected(nn.Module, ABC):
    """An attention's own projections around one of the functions for converted rows.

    It has the parameters of the attention only, whose forward does not run.

    Args:
        attention: the model's own attention.
        name: `CAUSAL` or `DOUBLED`.

    Raises:
        ValueError: the attention has hooks; they would not run.
    """

    def __init__(self, attention: nn.Module, name: str) -> None:
        super().__init__()
        if runs_more(attention):
            raise ValueError(
                "an attention whose projections are called must have no hooks and no replaced "
                f"forward, got some on a {type(attention).__name__}; remove them, or "
                "put them on its projections"
            )
        self.attention = attention
        self.name = name

    def forward(
        self,
        h: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """Rows [N, R, D]; options are those of `causal` and `doubled`."""
        own: Any = self.attention
        query, key, value = self.project(own, h)
        if position_embeddings is not None:
            query, key = self.rotate(query, key, *position_embeddings)
        attend = causal if self.name == CAUSAL else doubled
        dropout = self.dropout(own) if own.training else 0.0
        o, _ = attend(
            own, query, key, value, attention_mask,
            scaling=self.scaling(own), dropout=dropout, **options,
        )  # fmt: skip
        return self.leave(own, o.flatten(2))

    @abstractmethod
    def project(self, own: Any, h: Tensor) -> Heads:
        """Queries, keys and values of rows [N, R, D]."""

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys, in attentions with rotary positions.

        Raises:
            ValueError: the attention has none.
        """
        raise ValueError(
            f"position_embeddings must be None for a {type(self.attention).__name__}, which "
            "rotates nothing, got some; leave them out"
        )

    def scaling(self, own: Any) -> float | None:
        """Factor of the products of queries and keys; by default that of their width."""
        return None

    @abstractmethod
    def dropout(self, own: Any) -> float:
        """Dropout rate of the attention's weights in training."""

    @abstractmethod
    def leave(self, own: Any, rows: Tensor) -> Tensor:
        """The attention's output from the results of all heads [N, R, H*D]."""


class BloomAttention(Projected):
    """Bloom's."""

    def project(self, own: Any, h: Tensor) -> Heads:
        """See `Projected`."""
        return own._reshape(own.query_key_value(h))

    def dropout(self, own: Any) -> float:
        """See `Projected`."""
        return own.attention_dropout.p

    def leave(self, own: Any, rows: Tensor) -> Tensor:
        """See `Projected`; the attention adds the residual itself."""
        return nnf.dropout(own.dense(rows), own.hidden_dropout, own.training)


class MptAttention(Projected):
    """MPT's."""

    def project(self, own: Any, h: Tensor) -> Heads:
        """See `Projected`."""
        mixed = own.Wqkv(h)
        if own.clip_qkv:
            mixed = mixed.clamp(-own.clip_qkv, own.clip_qkv)
        query, key, value = (
            part.unflatten(2, (own.n_heads, own.head_dim)).transpose(1, 2)
            for part in mixed.chunk(3, dim=2)
        )
        return query, key, value

    def scaling(self, own: Any) -> float | None:
        """See `Projected`."""
        return own.softmax_scale

    def dropout(self, own: Any) -> float:
        """See `Projected`."""
        return own.attn_dropout_p

    def leave(self, own: Any, rows: Tensor) -> Tensor:
        """See `Projected`."""
        return own.out_proj(rows)


class UMT5Attention(Projected):
    """UMT5's; its bias of the scores is an argument here."""

    def project(self, own: Any, h: Tensor) -> Heads:
        """See `Projected`."""
        shape = (own.n_heads, own.key_value_proj_dim)
        query, key, value = (
            linear(h).unflatten(2, shape).transpose(1, 2) for linear in (own.q, own.k, own.v)
        )
        return query, key, value

    def scaling(self, own: Any) -> float | None:
        """See `Projected`."""
        return 1.0

    def dropout(self, own: Any) -> float:
        """See `Projected`."""
        return own.dropout

    def leave(self, own: Any, rows: Tensor) -> Tensor:
        """See `Projected`."""
        return own.o(rows)


class FalconAttention(Projected):
    """Falcon's."""

    def project(self, own: Any, h: Tensor) -> Heads:
        """See `Projected`."""
        query, key, value = (x.transpose(1, 2) for x in own._split_heads(own.query_key_value(h)))
        return query, key, value

    def rotate(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """See `Projected`."""
        from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

        return apply_rotary_pos_emb(query, key, cos, sin)

    def dropout(self, own: Any) -> float:
        """See `Projected`; 0, as `FalconFamily` refuses attention dropout."""
        return 0.0

    def leave(self, own: Any, rows: Tensor) -> Tensor:
        """See `Projected`."""
        return own.dense(rows)
