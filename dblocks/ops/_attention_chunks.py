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

from dblocks.kernels import reference
from dblocks.ops import _attention_backends as backends
from dblocks.ops._attention_pieces import Options, Piece, Saved

CHUNK = 128  # positions, or the block size where that is more


class _Chunk(NamedTuple):
    """Rows of q, rows of k and v, and what is added to the scores."""

    q: list[slice]
    k: list[slice]
    bias: Tensor


def _chunks(piece: Piece, options: Options, like: Tensor) -> Iterator[_Chunk]:
    size = max(CHUNK // piece.block_size, 1) * piece.block_size
    reach = piece.length if options.window is None else options.window - 1
    starts = range(0, piece.length, size)
    biases = {}  # of a whole chunk that reaches back as far as any, and of the last one
    for start in reversed(starts):
        length = min(size, piece.length - start)
        back = min(start, reach)
        if length not in biases:
            biases[length] = _bias(length, back, piece, options, like)
        bias = biases[length]
        bias = bias[..., bias.shape[-1] - 2 * length - back :]
        rows = [piece.q_noisy] if piece.q_clean is None else [piece.q_clean, piece.q_noisy]
        yield _Chunk(
            [_part(r, start, start + length) for r in rows],
            [
                _part(piece.clean, start - back, start + length),
                _part(piece.noisy, start, start + length),
            ],
            bias,
        )


def _part(rows: slice, start: int, end: int) -> slice:
    return slice(rows.start + start, rows.start + end)


def _bias(length: int, back: int, piece: Piece, options: Options, like: Tensor) -> Tensor:
    """[rows, keys], or [N or 1, H, rows, keys] with slopes; -inf where a row does not see a key."""
    position = torch.arange(length)
    rows = position if piece.q_clean is None else position.repeat(2)
    noisy = torch.arange(len(rows)) >= len(rows) - length
    keys = torch.cat([torch.arange(-back, length), position])
    noisy_keys = torch.arange(len(keys)) >= back + length
    seen = reference.sees(
        (rows, noisy),
        (keys, noisy_keys),
        block_size=piece.block_size,
        clean_causal="block" if options.see_block else "token",
        window=options.window,
    )
    bias = like.new_zeros(seen.shape)
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.to(like.dtype)
        slopes = slopes[piece.samples] if slopes.ndim == 2 else slopes.unsqueeze(0)
        bias = -slopes[..., None, None] * (rows[:, None] - keys).abs()
    return bias.masked_fill_(~seen, -torch.inf)


def _join(x: Tensor, parts: list[slice]) -> Tensor:
    return x[:, :, parts[0]] if len(parts) == 1 else torch.cat([x[:, :, p] for p in parts], 2)


def forward(
    piece: Piece, options: Options, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> None:
    """Writes `o` and `lse` of the piece."""
    for chunk in _chunks(piece, options, q):
        inputs = _join(q, chunk.q), _join(k, chunk.k), _join(v, chunk.k)
        if options.softcap is None:
            part, part_lse = backends.forward(
                options.backend, *inputs, options.scale, bias=chunk.bias
            )
        else:
            part, part_lse = _capped(*inputs, options.scale, chunk.bias, options.softcap)
        _write(o, part, chunk.q)
        _write(lse, part_lse, chunk.q)


def backward(piece: Piece, options: Options, t: Saved) -> None:
    """Writes the gradients of the piece."""
    t.dk[:, :, piece.clean] = t.dv[:, :, piece.clean] = 0
    for chunk in _chunks(piece, options, t.q):
        grad, q, o, lse = (_join(x, chunk.q) for x in (t.grad, t.q, t.o, t.lse))
        inputs = grad, q, _join(t.k, chunk.k), _join(t.v, chunk.k), o, lse
        if options.softcap is None:
            grads = backends.backward(options.backend, *inputs, options.scale, bias=chunk.bias)
        else:
            grads = _capped_backward(*inputs, options.scale, chunk.bias, options.softcap)
        _write(t.dq, grads[0], chunk.q)
        clean, noisy = chunk.k
        for total, part in zip((t.dk, t.dv), grads[1:], strict=True):
            count = clean.stop - clean.start
            total[:, :, clean] += part[:, :, :count]
            total[:, :, noisy] = part[:, :, count:]


def _write(to: Tensor, x: Tensor, parts: list[slice]) -> None:
    for rows, part in zip(parts, x.split([p.stop - p.start for p in parts], 2), strict=True):
        to[:, :, rows] = part


def _fold(x: Tensor, heads: int) -> Tensor:
    """[N, H, rows, D] as [N, heads, H / heads * rows, D]."""
    return x.unflatten(1, (heads, -1)).flatten(2, 3)


def _bounded(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """tanh of the scores over their bound, `q` folded."""
    return (q @ k.mT).mul_(scale / softcap).tanh_()


def _scores(bounded: Tensor, bias: Tensor, heads: int, softcap: float) -> Tensor:
    """[N, Hkv, group, rows, keys]."""
    scores = (bounded * softcap).unflatten(2, (-1, bias.shape[-2]))
    return scores.add_(bias if bias.ndim == 2 else bias.unflatten(1, (heads, -1)))


def _capped(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    heads = k.shape[1]
    bounded = _bounded(_fold(q, heads), k, scale, softcap)
    scores = _scores(bounded, bias, heads, softcap)
    lse = scores.logsumexp(-1)
    p = scores.sub_(lse.unsqueeze(-1)).exp_().flatten(2, 3)
    o = (p @ v).unflatten(2, (-1, q.shape[2])).flatten(1, 2)
    return o, lse.flatten(1, 2)


def _capped_backward(
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
    delta = _fold((grad * o).sum(-1, keepdim=True), heads)
    q, grad = _fold(q, heads), _fold(grad, heads)
    bounded = _bounded(q, k, scale, softcap)
    scores = _scores(bounded, bias, heads, softcap)
    p = scores.sub_(lse.unflatten(1, (heads, -1)).unsqueeze(-1)).exp_().flatten(2, 3)
    dv = p.mT @ grad
    ds = (grad @ v.mT).sub_(delta).mul_(p).mul_(bounded.square_().neg_().add_(1)).mul_(scale)
    return (ds @ k).unflatten(2, (-1, rows)).flatten(1, 2), ds.mT @ q, dv
