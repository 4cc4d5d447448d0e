"""Positions of the rows of a batch of texts."""

from __future__ import annotations

import torch
from torch import Tensor

from dblocks.blocks.targets.padding import check_ids
from dblocks.blocks.targets.token_batch import TokenBatch


def placed(given: TokenBatch, context: int) -> TokenBatch:
    """The batch with its "position_ids", if any, checked and expanded to [N, T]."""
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
    """The positions of tokens, int64 [T]; [N, T] if the batch gives them."""
    ids = given.get("position_ids")
    return given.positions() if ids is None else ids


def before_each(places: Tensor, first: Tensor) -> Tensor:
    """The position of the token before each; its own if it is the first, `first` [T]."""
    return torch.where(first, places, places.roll(1, -1))


def element_size(weight: Tensor) -> float:
    """The root mean square of an embedding's elements."""
    return 1.0 if weight.is_meta else weight.detach().float().square().mean().sqrt().item()


def document_mask(first: Tensor) -> Tensor:
    """The attention mask of packed documents, bool [R, R]; `first` [R] marks their first rows.

    A row sees the earlier rows of its document, but not the row of the first token, which the plain
    model does not have.
    """
    row, document = torch.arange(len(first), device=first.device), first.cumsum(0)
    seen = (row[:, None] >= row) & (document[:, None] == document)
    return seen & (~first | (row[:, None] == row))
