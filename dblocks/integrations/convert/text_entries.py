"""What a batch holds beside its tokens, for encoders of text."""

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
    """Those of `TEXT` in a batch, checked, with padding behind the texts; and where these began.

    Args:
        model: of transformers, whose config says which ids there are.
        batch: holds tokens, or not where these are a state.
        shape: of the tokens; by default that of the entries, of which ids may be [1, T].

    Raises:
        TypeError: for an entry of another dtype.
        ValueError: for an entry of another shape or value.
    """
    given = {name: batch[name] for name in TEXT if batch.get(name) is not None}
    if not given:
        return {}, None
    if shape is None:
        # Of a call, whose tokens come later; ids for all texts alike have no N of their own.
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
    """A batch with its text entries checked, and all of them with padding behind the texts."""
    tokens = batch["tokens"]
    entries, starts = text_entries(model, batch, tuple(tokens.shape))
    return {**batch, **entries, "tokens": to_front(tokens, starts)}


def ids_of(batch: Batch) -> dict[str, Tensor]:
    """Those of `IDS` that are there, as keyword arguments."""
    return {name: batch[name] for name in IDS if batch.get(name) is not None}


def entries_of(batch: Batch) -> dict[str, Tensor]:
    """Those of `TEXT` that are there, as keyword arguments."""
    return {name: batch[name] for name in TEXT if batch.get(name) is not None}
