"""Doubled attention of plain causal attentions, shifted by a block and merged by log-sum-exp.

Noisy row i, of offset r = i % block_size in its block, attends to the clean rows of earlier blocks,
j < i - r. A causal attention of the noisy rows from `block_size` on over the clean rows from 0 on
covers j <= i - block_size, and a local term the rest: the rows after offset r of the block before,
and the noisy rows of the own block. A clean row has a causal attention, and the later rows of its
own block as local term if it attends to them. At `block_size=1` what remains is the noisy row
itself. Every call of the backward gets the output and log-sum-exp of the whole softmax, so that the
gradients are sums of its parts. Memory is O(T * block_size).
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from dblocks.ops._attention import backends
from dblocks.ops._attention.local import (
    BlockTerm,
    SelfTerm,
    clean_blocks,
    from_blocks,
    noisy_blocks,
)
from dblocks.ops._attention.pieces import Options, Piece, Saved, wide


class _Half(NamedTuple):
    """One half of a piece: the rows of q, and those of k and v that it needs."""

    q: slice
    clean: slice
    noisy: slice | None  # the keys of the own half, of a noisy one
    block_size: int
    local: bool  # whether a local term takes part


def _halves(piece: Piece, options: Options) -> Iterator[_Half]:
    size = piece.block_size
    if piece.q_clean is not None:
        yield _Half(piece.q_clean, piece.clean, None, size, options.see_block and size > 1)
    yield _Half(piece.q_noisy, piece.clean, piece.noisy, size, True)


def _causal(half: _Half) -> tuple[slice, slice]:
    """The rows of q and of the clean keys that the causal attention is of; perhaps none."""
    shift = 0 if half.noisy is None else half.block_size
    return (
        slice(half.q.start + shift, half.q.stop),
        slice(half.clean.start, half.clean.stop - shift),
    )


def _term(half: _Half, q: Tensor, k: Tensor, v: Tensor, scale: float) -> SelfTerm | BlockTerm:
    dtype = wide(q.dtype)
    q = q[:, :, half.q].to(dtype)
    if half.noisy is not None:
        own_k, own_v = (x[:, :, half.noisy].to(dtype) for x in (k, v))
        if half.block_size == 1:
            return SelfTerm(q, own_k, own_v, scale)
        k, v = (x[:, :, half.clean].to(dtype) for x in (k, v))
        return noisy_blocks(q, k, v, own_k, own_v, half.block_size, scale)
    k, v = (x[:, :, half.clean].to(dtype) for x in (k, v))
    return clean_blocks(q, k, v, half.block_size, scale)


def forward(
    piece: Piece, options: Options, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> None:
    """Writes `o` and `lse` of the piece."""
    for half in _halves(piece, options):
        _attend(half, q, k, v, o[:, :, half.q], lse[:, :, half.q], options)


def _attend(
    half: _Half, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, options: Options
) -> None:
    """Writes `o` and `lse` of the half."""
    queries, keys = _causal(half)
    if keys.start < keys.stop:
        part, part_lse = backends.forward(
            options.backend, q[:, :, queries], k[:, :, keys], v[:, :, keys], options.scale
        )
    else:
        part, part_lse = o[:, :, :0], lse[:, :, :0]
    if half.local:
        _term(half, q, k, v, options.scale).merge(part, part_lse, o, lse)
    else:
        o.copy_(part)
        lse.copy_(part_lse)


def backward(piece: Piece, options: Options, t: Saved) -> None:
    """Writes the gradients of the piece."""
    if piece.q_clean is None:  # else clean rows write the gradients of clean keys first
        t.dk[:, :, piece.clean] = t.dv[:, :, piece.clean] = 0
    for half in _halves(piece, options):
        if half.noisy is None:
            _causal_backward(half, t, options)
            _local_backward(half, t, options.scale)
        else:
            _local_backward(half, t, options.scale)
            _causal_backward(half, t, options)


def _causal_backward(half: _Half, t: Saved, options: Options) -> None:
    """The gradients of the causal attention: of clean rows written, of noisy ones added."""
    at, keys = _causal(half)
    if keys.start == keys.stop:
        return
    grad, q, o, lse = (x[:, :, at] for x in (t.grad, t.q, t.o, t.lse))
    k, v = (x[:, :, keys] for x in (t.k, t.v))
    grads = backends.backward(options.backend, grad, q, k, v, o, lse, options.scale)
    for total, rows, part in zip((t.dq, t.dk, t.dv), (at, keys, keys), grads, strict=True):
        if half.noisy is None:
            total[:, :, rows] = part
        else:
            total[:, :, rows] += part


def _local_backward(half: _Half, t: Saved, scale: float) -> None:
    """The gradients of the local term: of noisy rows and keys written, of clean ones added."""
    if not half.local:
        return
    grad, o, lse, dq = (x[:, :, half.q].to(t.dq.dtype) for x in (t.grad, t.o, t.lse, t.dq))
    term = _term(half, t.q, t.k, t.v, scale)
    if isinstance(term, SelfTerm):
        own_dk, own_dv = (x[:, :, half.noisy] for x in (t.dk, t.dv))
        term.backward(grad, o, lse, dq, own_dk, own_dv)
        return
    part, *parts = term.backward(grad, o, lse)
    if half.noisy is None:
        dq += part
    else:
        dq.copy_(part)
    for total, part in zip((t.dk, t.dv), parts, strict=True):
        clean = total[:, :, half.clean]
        if half.noisy is None:
            clean += from_blocks(part, clean.shape[2])
        else:
            before, own = part.split(half.block_size, 3)
            before = before[:, :, 1:].flatten(2, 3)
            clean[:, :, : before.shape[2]] += before
            total[:, :, half.noisy] = from_blocks(own, clean.shape[2])
