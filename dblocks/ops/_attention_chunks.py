"""Doubled attention in chunks of positions: a dense mask for each, over the keys it can see.

What impl="composed" does on a CPU where scores have a window, a bias or a bound. The rows of a
chunk's positions, clean and noisy, attend to the clean keys of as many positions back as the window
reaches, and to the noisy keys of the chunk, which ends where a block does. Chunks of one size share
one mask, as positions count from the chunk's first. Time is that of a dense mask over
T * (window + chunk) pairs, memory O(T * chunk).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dblocks.ops import _attention_backends as backends
from dblocks.ops._attention_pieces import Options, Piece, Saved

NEGLIGIBLE = 40.0  # e^-40 is 4e-18, far below the rounding of float32
CHUNK = 64  # positions, or the block size where that is more


class _Chunk(NamedTuple):
    """Positions start..end-1 of the piece, those of clean keys from `first` on, and a bias."""

    start: int
    end: int
    first: int
    bias: Tensor


def _chunk_size(piece: Piece) -> int:
    return max(CHUNK // piece.block_size, 1) * piece.block_size


def _chunks(piece: Piece, options: Options, q: Tensor, k: Tensor) -> Iterator[_Chunk]:
    """From the last to the first, as `_Keys` wants them."""
    size = _chunk_size(piece)
    reach = piece.length if options.window is None else options.window - 1
    least = _least_bias(piece, options, q, k)
    biases = {}  # of the last chunk, and of one of all others that reaches back as far as any
    for start in reversed(range(0, piece.length, size)):
        end = min(start + size, piece.length)
        length, back = end - start, min(start, reach)
        if length not in biases:
            both = piece.q_clean is not None
            biases[length] = _bias(length, back, both, piece, options, least)
        bias = biases[length]
        bias = bias[..., bias.shape[-1] - 2 * length - back :]
        yield _Chunk(start, end, start - back, bias)


def _least_bias(piece: Piece, options: Options, q: Tensor, k: Tensor) -> Tensor:
    """Below this, a key's probability is less than e^-NEGLIGIBLE of that of the row itself.

    Products with numbers too small for float32's exponent take a hundred times as long as others.
    """
    least = q.new_tensor(-torch.inf)
    if options.alibi_slopes is None or q.dtype == torch.float64:
        return least
    if options.softcap is not None:
        return q.new_tensor(-2 * options.softcap - NEGLIGIBLE)
    largest = [
        torch.stack(
            [x[:, :, rows].norm(dim=-1).amax() for rows in parts if rows is not None]
        ).amax()
        for x, parts in ((q, (piece.q_clean, piece.q_noisy)), (k, (piece.clean, piece.noisy)))
    ]
    return largest[0] * largest[1] * (-2 * options.scale) - NEGLIGIBLE


def _bias(
    length: int, back: int, both: bool, piece: Piece, options: Options, least: Tensor
) -> Tensor:
    """[rows, keys], or [1, H, rows, keys] with slopes; -inf where a row does not see a key."""
    clean, noisy = torch.arange(-back, length), torch.arange(length)
    rows = noisy.repeat(2) if both else noisy
    is_noisy = (torch.arange(len(rows)) < length) == (options.noisy_first or not both)
    block = rows // piece.block_size * piece.block_size
    block_end = block + piece.block_size
    first = rows - (back + length if options.window is None else options.window - 1)
    end = torch.where(is_noisy, block, block_end if options.see_block else rows + 1)
    of_clean = _within(clean, first, end)
    of_noisy = _within(noisy, torch.maximum(first, block), block_end.where(is_noisy, -1))
    seen = torch.cat([of_clean, of_noisy], 1)
    mask = least.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    if options.alibi_slopes is None:
        return mask
    slopes = options.alibi_slopes.to(least.dtype)
    slopes = slopes[piece.samples] if slopes.ndim == 2 else slopes.unsqueeze(0)
    distance = (rows[:, None] - torch.cat([clean, noisy])).abs_().to(least.dtype)
    bias = torch.addcmul(mask, distance, -slopes[..., None, None])
    return torch.threshold_(bias, least.item(), -torch.inf) if least.isfinite() else bias


def _within(keys: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """Which keys are from each row's first on and before its end."""
    return (keys >= first[:, None]) & (keys < end[:, None])


class _Rows:
    """The rows of a piece in q and what is like it, in the halves it has."""

    def __init__(self, piece: Piece) -> None:
        self.start, self.halves = piece.start, 1 if piece.q_clean is None else 2

    def _view(self, x: Tensor, chunk: _Chunk) -> Tensor:
        rows = slice(self.start + chunk.start, self.start + chunk.end)
        return x.unflatten(2, (self.halves, -1))[:, :, :, rows]

    def read(self, x: Tensor, chunk: _Chunk) -> Tensor:
        return self._view(x, chunk).flatten(2, 3)

    def write(self, x: Tensor, chunk: _Chunk, part: Tensor) -> None:
        self._view(x, chunk).copy_(part.unflatten(2, (self.halves, -1)))


class _Keys:
    """The rows of k or v that a chunk sees: clean ones, and behind them the noisy ones.

    These take the place of clean rows of later chunks, which have had their turn.
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
    rows, keys, values = _Rows(piece), _Keys(k, piece), _Keys(v, piece)
    for chunk in _chunks(piece, options, q, k):
        inputs = rows.read(q, chunk), keys.read(chunk), values.read(chunk), options.scale
        if options.softcap is None:
            part, part_lse = backends.forward(options.backend, *inputs, bias=chunk.bias)
        else:
            part, part_lse = _plain(*inputs, chunk.bias, options.softcap)
        rows.write(o, chunk, part)
        rows.write(lse, chunk, part_lse)


def backward(piece: Piece, options: Options, t: Saved) -> None:
    """Writes the gradients of the piece."""
    rows, keys, values = _Rows(piece), _Keys(t.k, piece), _Keys(t.v, piece)
    sums = [x[:, :, piece.clean].zero_() for x in (t.dk, t.dv)]
    noisy = [x[:, :, piece.noisy] for x in (t.dk, t.dv)]
    for chunk in _chunks(piece, options, t.q, t.k):
        grad, q, o, lse = (rows.read(x, chunk) for x in (t.grad, t.q, t.o, t.lse))
        inputs = grad, q, keys.read(chunk), values.read(chunk), o, lse, options.scale
        if options.softcap is None:
            dq, *grads = backends.backward(options.backend, *inputs, bias=chunk.bias)
        else:
            dq, *grads = _plain_backward(*inputs, chunk.bias, options.softcap)
        rows.write(t.dq, chunk, dq)
        for total, own, part in zip(sums, noisy, grads, strict=True):
            count = chunk.end - chunk.first
            total[:, :, chunk.first : chunk.end] += part[:, :, :count]
            own[:, :, chunk.start : chunk.end] = part[:, :, count:]


def _fold(x: Tensor, heads: int) -> Tensor:
    """[N, H, rows, D] as [N, heads, H / heads * rows, D]."""
    return x.unflatten(1, (heads, -1)).flatten(2, 3)


def _probabilities(
    q: Tensor, k: Tensor, scale: float, bias: Tensor, softcap: float, lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Those, the log-sum-exp unless it is given, and tanh of the scores over their bound.

    `q` is folded, and so are the results.
    """
    bounded = (q @ k.mT).mul_(scale / softcap).tanh_()
    heads, rows = k.shape[1], bias.shape[-2]
    bias = bias if bias.ndim == 2 else bias.unflatten(1, (heads, -1))
    unfolded = bounded.unflatten(2, (-1, rows))  # [N, Hkv, group, rows, keys]
    scores = torch.add(bias, unfolded, alpha=softcap).flatten(2, 3)
    lse = scores.logsumexp(-1, keepdim=True) if lse is None else lse
    return scores.sub_(lse).exp_(), lse, bounded


def _plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    heads = k.shape[1]
    p, lse, _ = _probabilities(_fold(q, heads), k, scale, bias, softcap, None)
    o, lse = (x.unflatten(2, (-1, q.shape[2])).flatten(1, 2) for x in (p @ v, lse))
    return o, lse.squeeze(-1)


def _plain_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, rows = k.shape[1], q.shape[2]
    delta = (grad * o).sum(-1, keepdim=True)
    q, grad, delta, lse = (_fold(x, heads) for x in (q, grad, delta, lse.unsqueeze(-1)))
    p, _, bounded = _probabilities(q, k, scale, bias, softcap, lse)
    dv = p.mT @ grad
    ds = (grad @ v.mT).sub_(delta).mul_(p).mul_(bounded.square_().neg_().add_(1))
    dq = torch.mul(ds @ k, scale).unflatten(2, (-1, rows)).flatten(1, 2)
    return dq, (ds.mT @ q).mul_(scale), dv
