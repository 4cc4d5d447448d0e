"""Where the rows of a batch of texts stand."""

from __future__ import annotations

import torch
from torch import Tensor

from dblocks.blocks.targets.padding import check_ids
from dblocks.blocks.targets.token_batch import TokenBatch


def placed(given: TokenBatch, context: int) -> TokenBatch:
    """The batch with "position_ids" checked and [N, T], where there are any."""
    ids = given.get("position_ids")
    if ids is None:
        return given
    if given.cu_seqlens is not None:
        raise ValueError(
            "position_ids must be None with cu_seqlens, as positions begin again in each document; "
            "leave them out"
        )
    ids = check_ids("position_ids", ids, tuple(given.tokens.shape), context)
    return TokenBatch({**given, "position_ids": ids})


def places_of(given: TokenBatch) -> Tensor:
    """The places at which tokens enter, int64 [T], or [N, T] where the batch says them."""
    ids = given.get("position_ids")
    return given.positions() if ids is None else ids


def before_each(places: Tensor, first: Tensor) -> Tensor:
    """The place of the token before each; its own where it is the first, `first` [T]."""
    return torch.where(first, places, places.roll(1, -1))


def element_size(weight: Tensor) -> float:
    """The size of an element of an embedding."""
    return 1.0 if weight.is_meta else weight.detach().float().square().mean().sqrt().item()


def document_mask(first: Tensor) -> Tensor:
    """Which rows of packed documents see which, bool [R, R], `first` [R] where a document begins.

    A row sees the earlier ones of its document, but not that of its first token, which no plain
    model has.
    """
    row, document = torch.arange(len(first), device=first.device), first.cumsum(0)
    seen = (row[:, None] >= row) & (document[:, None] == document)
    return seen & (~first | (row[:, None] == row))
