"""Runs layers on the doubled sequence: clean and noisy rows that interact in the attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from dblocks import functional as F
from dblocks.blocks.sharding import within
from dblocks.nn import Attend, Rotary, TransformerLayer


def attend_doubled(cu_seqlens: Tensor | None, block_size: int = 1) -> Attend:
    """The attention of doubled rows, for `run_doubled`; queries may be of noisy rows only."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        query = "both" if q.shape[2] == k.shape[2] else "noisy"
        return F.doubled_attention(
            q, k, v, cu_seqlens=cu_seqlens, query=query, block_size=block_size
        )

    return attend


def run_doubled(
    layers: Sequence[nn.Module],
    clean: Tensor,
    noisy: Tensor,
    cond: Tensor | None,
    rotary: Rotary,
    attends: Iterable[Attend | None],
    *,
    last: nn.Module,
) -> tuple[Tensor, Tensor]:
    """Runs layers on clean rows [N, C, D], C >= 0, beside noisy rows [N, R, D].

    Args:
        layers: `TransformerLayer`s.
        clean: clean rows.
        noisy: noisy rows.
        cond: conditioning of the noisy rows.
        rotary: rotary embeddings of all C + R rows, clean ones first.
        attends: the attention of each layer.
        last: the last layer, which computes only keys and values of the clean rows.

    Returns:
        The clean and the noisy rows.
    """
    for layer, attend in zip(layers, attends, strict=True):
        layer = cast(TransformerLayer, layer)
        if clean.shape[1] == 0:
            noisy = layer(noisy, cond, rotary=rotary, attend=attend)
        else:
            doubled = within(layer, layer.doubled)
            clean, noisy = doubled(
                clean, noisy, cond,
                rotary=rotary, attend=cast(Attend, attend), keys_only=layer is last,
            )  # fmt: skip
    return clean, noisy
