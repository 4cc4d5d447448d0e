"""Padding of texts: checks of the attention mask, and moving padding behind the texts.

Under causal attention no row of a text sees padding after it. So padding before a text is moved
behind it: then positions, pooling and attention are those of the text alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dblocks.ops._checks import values_known


def check_attention_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The mask as bool [N, T], true at the tokens of each text, which must be contiguous.

    On a GPU the values are checked by an assertion on the device, without synchronisation.

    Args:
        mask: 0 and 1 in any dtype.
        shape: of the tokens.

    Raises:
        TypeError: it is not a tensor of numbers.
        ValueError: it has another shape or other values, holes, or a row without tokens.
    """
    if not isinstance(mask, Tensor) or mask.is_complex():
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"attention_mask must be a tensor of 0 and 1, got {got}; give the mask of the "
            "tokenizer, 1 at tokens and 0 at padding, with return_tensors='pt'"
        )
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask must have the shape of the tokens, {list(shape)}, got "
            f"{list(mask.shape)}; give each text a row of its own, 1 at tokens and 0 at padding, "
            "and no mask of pairs of tokens"
        )
    shown = mask != 0
    before = torch.nn.functional.pad(shown[:, :-1], (1, 0))
    runs = (shown & ~before).sum(1)
    valid = (runs == 1) & ((mask == 0) | (mask == 1)).all(1)
    fits = valid.all()
    message = (
        "attention_mask must be 0 or 1, with ones at one token or more of each row that follow one "
        "another: no holes and no row of padding alone"
    )
    if not values_known(mask):
        torch.ops.aten._assert_async.msg(fits, message)
    elif not fits:
        raise ValueError(f"{message}, got {_wrong(mask, valid)}")
    return shown


def check_text_blocks(shown: Tensor, block_size: int) -> None:
    """Raises unless texts consist of whole blocks of tokens, which share a level.

    On other devices than a CPU, values are checked on the device, without synchronisation.

    Args:
        shown: a checked mask, bool [N, T].
        block_size: how many tokens are predicted at once.

    Raises:
        ValueError: a text begins or ends within a block.
    """
    starts = shown.int().argmax(1)
    ends = starts + shown.sum(1)
    fits = (starts % block_size == 0).all() & (ends % block_size == 0).all()
    message = f"texts must begin and end at multiples of tokens_per_block={block_size}"
    if not values_known(shown):
        torch.ops.aten._assert_async.msg(fits, message)
    elif not fits:
        raise ValueError(
            f"{message}, got {starts.tolist()} to {ends.tolist()} in the attention_mask; pad each "
            "text to such a length with tokens that a loss_mask leaves out"
        )


def check_ids(name: str, ids: Tensor, shape: tuple[int, ...], count: int) -> Tensor:
    """Indices of tokens as int64 [N, T], in 0..count - 1; values are checked on the CPU only.

    Args:
        name: the name of the entry.
        ids: integers [N, T]; or [1, T] or [T] for the same indices in all texts.
        shape: of the tokens.
        count: the number of valid indices.

    Raises:
        TypeError: they are not a tensor of integers.
        ValueError: they have another shape or other values.
    """
    given = isinstance(ids, Tensor)
    if not given or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        got = ids.dtype if given else type(ids).__name__
        raise TypeError(
            f"{name} must be a tensor of integers, got {got}; give torch.int64 [N, T], a number "
            "for each token"
        )
    if ids.shape not in (shape, (1, *shape[1:]), shape[1:]):
        raise ValueError(
            f"{name} must have the shape of the tokens, {list(shape)}, or {list(shape[1:])} for "
            f"all texts alike, got {list(ids.shape)}; give a number for each token"
        )
    ids = ids.long().expand(shape)
    if values_known(ids) and ids.numel():
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"{name} must be in 0..{count - 1}, got {low}..{high}")
    return ids


def starts_of(mask: Tensor | None) -> Tensor | None:
    """The index of each text's first token, int64 [N], from a checked mask; None without a mask."""
    return None if mask is None else mask.int().argmax(1)


def texts_of(tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """The texts of padded tokens [N, T], without their padding, on the CPU.

    Raises:
        TypeError: the tokens are not a tensor, or the mask has a wrong type.
        ValueError: they are not [N, T], or the mask is invalid.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(
            "attention_mask needs prompts in one tensor [N, P], got a "
            f"{type(tokens).__name__}; rows of their own lengths need none"
        )
    if tokens.ndim != 2:
        raise ValueError(
            f"attention_mask needs prompts of shape [N, P], got {list(tokens.shape)}; reshape them"
        )
    if isinstance(mask, Tensor):
        mask = mask.cpu()
    shown = check_attention_mask(mask, tuple(tokens.shape))
    return [row[kept] for row, kept in zip(tokens.cpu(), shown, strict=True)]


def to_front(x: Tensor, starts: Tensor | None) -> Tensor:
    """Rows [N, T, ...] rotated so that those at `starts` [N] come first; None: unchanged."""
    return x if starts is None else _turned(x, starts)


def from_front(x: Tensor, starts: Tensor | None) -> Tensor:
    """Undoes `to_front`."""
    return x if starts is None else _turned(x, -starts)


def _turned(x: Tensor, by: Tensor) -> Tensor:
    N, T = x.shape[:2]
    place = (torch.arange(T, device=x.device) + by[:, None]) % T
    # Each row is read once, so that the sums in the backward repeat bit for bit.
    index = place.view(N, T, *(1 for _ in x.shape[2:])).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def _wrong(mask: Tensor, valid: Tensor) -> str:
    row = int(valid.int().argmin())
    return f"{mask[row].tolist()} in row {row}"
