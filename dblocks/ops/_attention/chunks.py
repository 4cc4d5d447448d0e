"""Doubled attention in chunks of positions: a dense mask for each, over the keys it can see.

impl="composed" uses it on a CPU where scores have a window, a bias or a bound. The rows of a
chunk's positions, clean and noisy, attend to the clean keys of as many positions back as the window
reaches, and to the noisy keys of the chunk, which ends where a block does. Chunks of one size share
one mask, as positions count from the chunk's first. Time is that of a dense mask over
T * (window + chunk) pairs, memory O(T * chunk).
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dblocks.ops._attention import backends
from dblocks.ops._attention.pieces import Options, Piece, Saved

CHUNK = 64  # positions, or the block size where that is more
STEP = 16  # of the number of keys before a chunk: matrix products take longer at odd sizes
NEGLIGIBLE = 40.0  # e^-40 is 4e-18, far below the rounding of float32
NORMAL = 64.0  # e^-64 times the probability of a row itself is a normal number of float32
KEPT_MASKS, KEPT_PAIRS = 16, 2**18  # at most 16 MiB of float32, and as much of distances


class _Chunk(NamedTuple):
    """Positions start..end-1 of the piece, those of clean keys from `first` on, and a bias."""

    start: int
    end: int
    first: int
    bias: Tensor


def _chunk_size(piece: Piece) -> int:
    return max(CHUNK // piece.block_size, 1) * piece.block_size


def _chunks(piece: Piece, options: Options, q: Tensor, k: Tensor) -> Iterator[_Chunk]:
    """The chunks from last to first, the order that `_Keys` needs."""
    size = _chunk_size(piece)
    reach = piece.length if options.window is None else -(-(options.window - 1) // STEP) * STEP
    least = _least_bias(piece, options, q, k)
    biases = {}  # of the last chunk, and of one of all others that reaches back as far as any
    for start in reversed(range(0, piece.length, size)):
        end = min(start + size, piece.length)
        length, back = end - start, min(start, reach)
        if length not in biases:
            biases[length] = _bias(length, back, piece, options, q.dtype, least)
        unused = biases[length].shape[-1] - 2 * length - back
        yield _Chunk(start, end, start - back, biases[length][..., unused:])


class _Rows:
    """The rows of a piece in q, or in a tensor with the rows of q; one half or both."""

    def __init__(self, x: Tensor, piece: Piece) -> None:
        halves = x.unflatten(2, (1 if piece.q_clean is None else 2, -1))
        self.rows = halves[:, :, :, piece.start : piece.start + piece.length]

    def read(self, chunk: _Chunk) -> Tensor:
        return self.rows[:, :, :, chunk.start : chunk.end].flatten(2, 3)

    def write(self, chunk: _Chunk, part: Tensor) -> None:
        rows = self.rows[:, :, :, chunk.start : chunk.end]
        rows.copy_(part.unflatten(2, rows.shape[2:4]))


class _Keys:
    """The rows of k or v that a chunk sees: clean ones, and behind them the noisy ones.

    These take the place of clean rows of later chunks, which are done.
    """

    def __init__(self, x: Tensor, piece: Piece) -> None:
        N, heads, _, width = x.shape
        self.noisy = x[:, :, piece.noisy]
        self.rows = x.new_empty(N, heads, piece.length + _chunk_size(piece), width)
        self.rows[:, :, : piece.length] = x[:, :, piece.clean]

    def read(self, chunk: _Chunk) -> Tensor:
        end = 2 * chunk.end - chunk.start
        self.rows[:, :, chunk.end : end] = self.noisy[:, :, chunk.start : chunk.end]
        return self.rows[:, :, chunk.first : end]


def forward(
    piece: Piece, options: Options, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> None:
    """Writes `o` and `lse` of the piece."""
    queries, keys, values = _Rows(q, piece), _Keys(k, piece), _Keys(v, piece)
    outs = _Rows(o, piece), _Rows(lse, piece)
    for chunk in _chunks(piece, options, q, k):
        inputs = queries.read(chunk), keys.read(chunk), values.read(chunk), options.scale
        if options.softcap is None:
            parts = backends.forward(options.backend, *inputs, bias=chunk.bias)
        else:
            parts = _plain(*inputs, chunk.bias, options.softcap)
        for out, part in zip(outs, parts, strict=True):
            out.write(chunk, part)


def backward(piece: Piece, options: Options, t: Saved) -> None:
    """Writes the gradients of the piece."""
    rows = [_Rows(x, piece) for x in (t.grad, t.q, t.o, t.lse)]
    queries, keys, values = _Rows(t.dq, piece), _Keys(t.k, piece), _Keys(t.v, piece)
    sums = [x[:, :, piece.clean].zero_() for x in (t.dk, t.dv)]
    noisy = [x[:, :, piece.noisy] for x in (t.dk, t.dv)]
    for chunk in _chunks(piece, options, t.q, t.k):
        grad, q, o, lse = (x.read(chunk) for x in rows)
        inputs, scale = (grad, q, keys.read(chunk), values.read(chunk), o), options.scale
        if options.softcap is None:
            dq, *grads = backends.backward(options.backend, *inputs, lse, scale, bias=chunk.bias)
        else:
            dq, *grads = _plain_backward(*inputs, scale, chunk.bias, options.softcap)
        queries.write(chunk, dq)
        for total, own, part in zip(sums, noisy, grads, strict=True):
            count = chunk.end - chunk.first
            total[:, :, chunk.first : chunk.end] += part[:, :, :count]
            own[:, :, chunk.start : chunk.end] = part[:, :, count:]


def _fold(x: Tensor, heads: int) -> Tensor:
    """[N, H, rows, D] as [N, heads, H / heads * rows, D]."""
    return x.unflatten(1, (heads, -1)).flatten(2, 3)


def _scores(
    q: Tensor, k: Tensor, scale: float, bias: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """Scores, and tanh(scores / bound); `q` is folded, and so are the results."""
    bounded = (q @ k.mT).mul_(scale / softcap).tanh_()
    heads, rows = k.shape[1], bias.shape[-2]
    bias = bias if bias.ndim == 2 else bias.unflatten(1, (heads, -1))
    unfolded = bounded.unflatten(2, (-1, rows))  # [N, Hkv, group, rows, keys]
    return torch.add(bias, unfolded, alpha=softcap).flatten(2, 3), bounded


def _plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    scores, _ = _scores(_fold(q, k.shape[1]), k, scale, bias, softcap)
    p = scores.softmax(-1)
    # The largest p is 1 / sum(exp(score - largest)). `logsumexp` is slow where scores are -inf.
    lse = scores.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()
    o, lse = (x.unflatten(2, (-1, q.shape[2])).flatten(1, 2) for x in (p @ v, lse))
    return o, lse.squeeze(-1)


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    scale: float,
    bias: Tensor,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, rows = k.shape[1], q.shape[2]
    delta = (grad * o).sum(-1, keepdim=True)
    q, grad, delta = (_fold(x, heads) for x in (q, grad, delta))
    scores, bounded = _scores(q, k, scale, bias, softcap)
    p = scores.softmax(-1)  # a chunk has all keys of its rows
    dv = p.mT @ grad
    ds = (grad @ v.mT).sub_(delta).mul_(p).mul_(bounded.square_().neg_().add_(1))
    dq = torch.mul(ds @ k, scale).unflatten(2, (-1, rows)).flatten(1, 2)
    return dq, (ds.mT @ q).mul_(scale), dv


def _slopes(piece: Piece, slopes: Tensor) -> Tensor:
    """[1 or N, H]"""
    return slopes[piece.samples] if slopes.ndim == 2 else slopes.unsqueeze(0)


def _least_bias(piece: Piece, options: Options, q: Tensor, k: Tensor) -> float:
    """Below this, a key's probability is less than e^-NEGLIGIBLE of that of the row itself.

    Products with numbers too small for float32's exponent take a hundred times as long as others.
    """
    if options.alibi_slopes is None or q.dtype == torch.float64:
        return -math.inf
    farthest = max(min(options.window or piece.length, piece.length), piece.block_size)
    if _slopes(piece, options.alibi_slopes).max().item() * farthest <= NORMAL:
        return -math.inf
    if options.softcap is not None:
        return -2 * options.softcap - NEGLIGIBLE
    largest = [
        torch.stack([x[:, :, rows].norm(dim=-1).amax() for rows in parts if rows is not None])
        for x, parts in ((q, (piece.q_clean, piece.q_noisy)), (k, (piece.clean, piece.noisy)))
    ]
    return (largest[0].amax() * largest[1].amax() * (-2 * options.scale) - NEGLIGIBLE).item()


def _bias(
    length: int, back: int, piece: Piece, options: Options, dtype: torch.dtype, least: float
) -> Tensor:
    """[rows, keys], or [1, H, rows, keys] with slopes; -inf where a row does not see a key."""
    both = piece.q_clean is not None
    pairs = (1 + both) * length * (back + 2 * length)
    make = _mask if pairs <= KEPT_PAIRS else _mask.__wrapped__
    mask, distance = make(
        length, back, both, piece.block_size, options.token, options.noisy_first,
        options.window, options.alibi_slopes is not None, dtype,
    )  # fmt: skip
    if options.alibi_slopes is None:
        return mask
    slopes = _slopes(piece, options.alibi_slopes).to(dtype)
    biased = torch.addcmul(mask, distance, -slopes[..., None, None])
    return torch.threshold_(biased, least, -torch.inf) if math.isfinite(least) else biased


@lru_cache(KEPT_MASKS)
def _mask(
    length: int,
    back: int,
    both: bool,
    block_size: int,
    token: bool,
    noisy_first: bool,
    window: int | None,
    with_distance: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """0 or -inf, and the distances of rows and keys if asked for; cached, so never written to."""
    positions = torch.arange(-back, length, device="cpu")
    clean, noisy = positions, positions[back:]
    rows = noisy.repeat(2) if both else noisy
    is_noisy = (torch.arange(len(rows), device="cpu") < length) == (noisy_first or not both)
    block = rows // block_size * block_size
    block_end = block + block_size
    first = rows - (back + length if window is None else window - 1)
    end = torch.where(is_noisy, block, rows + 1 if token else block_end)
    of_clean = _within(clean, first, end)
    of_noisy = _within(noisy, torch.maximum(first, block), block_end.where(is_noisy, -1))
    seen = torch.cat([of_clean, of_noisy], 1)
    mask = torch.zeros(seen.shape, dtype=dtype, device="cpu").masked_fill_(~seen, -torch.inf)
    if not with_distance:
        return mask, mask
    return mask, (rows[:, None] - torch.cat([clean, noisy])).abs_().to(dtype)


def _within(keys: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """Whether each key is in the range first..end-1 of each row."""
    return (keys >= first[:, None]) & (keys < end[:, None])
