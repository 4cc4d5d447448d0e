"""Entries of a batch in addition to tokens, for text encoders."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dblocks.blocks import Batch
from dblocks.blocks.targets.padding import (
    check_attention_mask,
    check_ids,
    starts_of,
    to_front,
)

IDS = ("position_ids", "token_type_ids")
TEXT = ("attention_mask", *IDS)


def text_entries(
    model: Any, batch: Batch, shape: tuple[int, ...] | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The entries of `TEXT` in a batch, checked, with padding after the texts; and former starts.

    Args:
        model: a model of transformers, whose config has the ranges of ids.
        batch: the batch; it has no tokens if these are a state.
        shape: the shape of the tokens; by default that of the entries (ids may be [1, T]).

    Raises:
        TypeError: for an entry of another dtype.
        ValueError: for an entry of another shape or value.
    """
    given = {name: batch[name] for name in TEXT if batch.get(name) is not None}
    if not given:
        return {}, None
    if shape is None:
        # In a call, tokens come later; ids that all texts share have no dimension N.
        tensors = [value for value in given.values() if isinstance(value, Tensor) and value.ndim]
        shapes = [(1, *value.shape) if value.ndim == 1 else tuple(value.shape) for value in tensors]
        shape = max(shapes, default=(1, 0))
    counts = {
        "position_ids": model.config.max_position_embeddings,
        "token_type_ids": getattr(model.config, "type_vocab_size", 0),
    }
    if "attention_mask" in given:
        given["attention_mask"] = check_attention_mask(given["attention_mask"], shape)
    for name in IDS:
        if name in given:
            given[name] = check_ids(name, given[name], shape, counts[name])
    starts = starts_of(given.get("attention_mask"))
    return {name: to_front(value, starts) for name, value in given.items()}, starts


def whole_text(model: Any, batch: Batch) -> dict[str, Any]:
    """A batch with its text entries checked and padding moved behind the texts."""
    tokens = batch["tokens"]
    entries, starts = text_entries(model, batch, tuple(tokens.shape))
    return {**batch, **entries, "tokens": to_front(tokens, starts)}


def ids_of(batch: Batch) -> dict[str, Tensor]:
    """The entries of `IDS` in a batch, as keyword arguments."""
    return {name: batch[name] for name in IDS if batch.get(name) is not None}


def entries_of(batch: Batch) -> dict[str, Tensor]:
    """The entries of `TEXT` in a batch, as keyword arguments."""
    return {name: batch[name] for name in TEXT if batch.get(name) is not None}
