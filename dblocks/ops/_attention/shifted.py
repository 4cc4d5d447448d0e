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

import torch
import torch.nn.functional as F
from torch import Tensor

from dblocks.ops._attention import backends
from dblocks.ops._attention.pieces import Options, Piece, Saved, wide

# Attention of a row to itself or to a part of its block, in addition to a causal attention.
# A term has the scores of its keys. `merge` combines it with the output `part` and log-sum-exp
# `part_lse` of the causal attention, which the last rows have; given the `lse` of the whole
# softmax, `backward` computes the gradients of the term. Tensors are float32 or float64.


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[N, H, ...] as [N, heads, H / heads, ...]."""
    return x.unflatten(1, (heads, -1))


class SelfTerm:
    """A row of q and the one row of k and v of the same position."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        self.heads, self.scale = k.shape[1], scale
        self.q = _grouped(q, self.heads)
        self.k, self.v = k.unsqueeze(2), v.unsqueeze(2)
        self.scores = (self.q * self.k).sum(-1).mul_(scale)  # [N, Hkv, group, L]

    def merge(self, part: Tensor, part_lse: Tensor, o: Tensor, lse: Tensor) -> None:
        """Writes `o` and `lse`, where all rows but the first have a part."""
        o, lse = _grouped(o, self.heads), _grouped(lse, self.heads)
        part, part_lse = _grouped(part, self.heads), _grouped(part_lse, self.heads)
        lse[:, :, :, 0] = self.scores[:, :, :, 0]
        o[:, :, :, 0] = self.v[:, :, :, 0]
        later = self.scores[:, :, :, 1:]
        torch.logaddexp(later, part_lse, out=lse[:, :, :, 1:])
        p = torch.sub(later, part_lse).sigmoid_().unsqueeze(-1)
        torch.lerp(part.to(p.dtype), self.v[:, :, :, 1:], p, out=o[:, :, :, 1:])

    def backward(
        self, grad: Tensor, o: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        """Writes the gradients of q, k and v."""
        grad, o, dq, lse = (_grouped(x, self.heads) for x in (grad, o, dq, lse))
        p = (self.scores - lse).exp_()
        ds = (self.v - o).mul_(grad).sum(-1).mul_(p).mul_(self.scale).unsqueeze(-1)
        torch.mul(ds, self.k, out=dq)
        for total, weight, x in ((dk, ds, self.q), (dv, p.unsqueeze(-1), grad)):
            if x.shape[2] == 1:
                torch.mul(weight, x, out=total.unsqueeze(2))
            else:
                torch.sum(weight * x, 2, out=total)


class BlockTerm:
    """Rows of q in blocks of `block_size`, and for each block some keys of its own.

    `k` and `v` are [N, Hkv, blocks, keys, Dh]; `mask` [blocks or 1, block_size, keys] says which of
    its block's keys a row attends to.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_size: int, scale: float
    ) -> None:
        self.k, self.v, self.scale = k, v, scale
        self.rows, self.block_size = q.shape[2], block_size
        self.q = self._fold(q)
        scores = (self.q @ k.mT).mul_(scale)  # [N, Hkv, blocks, group * block_size, keys]
        scores.unflatten(3, (-1, block_size)).masked_fill_(~mask.unsqueeze(1), -torch.inf)
        self.scores = scores

    def _fold(self, x: Tensor) -> Tensor:
        """[N, H, L, D] as [N, Hkv, blocks, group * block_size, D], padded with zeros."""
        blocks = _grouped(into_blocks(x, self.block_size), self.k.shape[1])
        return blocks.transpose(2, 3).flatten(3, 4)

    def _unfold(self, x: Tensor) -> Tensor:
        """The inverse of `_fold`."""
        grouped = x.unflatten(3, (-1, self.block_size)).transpose(2, 3)
        return grouped.flatten(3, 4).flatten(1, 2)[:, :, : self.rows]

    def _p(self, lse: Tensor) -> Tensor:
        return (self.scores - self._fold(lse.unsqueeze(-1))).exp_()

    def merge(self, part: Tensor, part_lse: Tensor, o: Tensor, lse: Tensor) -> None:
        """Writes `o` and `lse`; a row without any key of its own has a part."""
        first = self.rows - part.shape[2]
        lse.copy_(self._unfold(self.scores.logsumexp(-1, keepdim=True)).squeeze(-1))
        later = lse[:, :, first:]
        torch.logaddexp(later, part_lse, out=later)
        o.copy_(self._unfold(self._p(lse) @ self.v))
        o[:, :, first:] += part * (part_lse - later).exp_().unsqueeze(-1)

    def backward(self, grad: Tensor, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, and of k and v as given, in blocks."""
        p = self._p(lse)
        delta = self._fold((grad * o).sum(-1, keepdim=True))
        grad = self._fold(grad)
        dv = p.mT @ grad
        ds = (grad @ self.v.mT).sub_(delta).mul_(p).mul_(self.scale)
        return self._unfold(ds @ self.k), ds.mT @ self.q, dv


def into_blocks(x: Tensor, block_size: int) -> Tensor:
    """[N, H, L, D] as [N, H, blocks, block_size, D], the last block padded with zeros."""
    missing = -x.shape[2] % block_size
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (-1, block_size))


def from_blocks(x: Tensor, rows: int) -> Tensor:
    """The inverse of `into_blocks`."""
    return x.flatten(2, 3)[:, :, :rows]


def clean_blocks(q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float) -> BlockTerm:
    """Clean rows, and the later clean rows of their own block."""
    keys, values = into_blocks(k, block_size), into_blocks(v, block_size)
    mask = _is_later(block_size, q) & _is_real(q.shape[2], block_size, q)
    return BlockTerm(q, keys, values, mask, block_size, scale)


def noisy_blocks(
    q: Tensor,
    k_clean: Tensor,
    v_clean: Tensor,
    k_noisy: Tensor,
    v_noisy: Tensor,
    block_size: int,
    scale: float,
) -> BlockTerm:
    """Noisy rows; the clean rows of a later offset in the block before, and the own noisy block."""

    def keys(clean: Tensor, noisy: Tensor) -> Tensor:
        before = F.pad(into_blocks(clean, block_size), (0, 0, 0, 0, 1, 0))[:, :, :-1]
        return torch.cat([before, into_blocks(noisy, block_size)], 3)

    own = _is_real(q.shape[2], block_size, q).expand(-1, block_size, -1)
    before = _is_later(block_size, q).repeat(len(own), 1, 1)
    before[0] = False
    mask = torch.cat([before, own], 2)
    return BlockTerm(q, keys(k_clean, k_noisy), keys(v_clean, v_noisy), mask, block_size, scale)


def _is_later(block_size: int, like: Tensor) -> Tensor:
    """Whether a key's offset in its block is later than the row's: [1, block_size, block_size]."""
    ones = torch.ones(1, block_size, block_size, dtype=torch.bool, device=like.device)
    return ones.triu(1)


def _is_real(rows: int, block_size: int, like: Tensor) -> Tensor:
    """Whether a key is none of the padding: [blocks, 1, block_size]."""
    blocks = -(-rows // block_size)
    return torch.arange(blocks * block_size, device=like.device).view(blocks, 1, block_size) < rows


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
        yield _Half(piece.q_clean, piece.clean, None, size, not options.token and size > 1)
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
