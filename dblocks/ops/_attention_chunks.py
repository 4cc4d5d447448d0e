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

NEGLIGIBLE = 40.0
CHUNK = 64  # positions, or the block size where that is more


class _Chunk(NamedTuple):
    """Rows of q, rows of k and v, and what is added to the scores."""

    q: list[slice]
    k: list[slice]
    bias: Tensor


def _chunks(piece: Piece, options: Options, q: Tensor, k: Tensor) -> Iterator[_Chunk]:
    size = max(CHUNK // piece.block_size, 1) * piece.block_size
    reach = piece.length if options.window is None else options.window - 1
    starts = range(0, piece.length, size)
    least = _least_bias(piece, options, q, k)
    biases = {}  # of a whole chunk that reaches back as far as any, and of the last one
    for start in reversed(starts):
        length = min(size, piece.length - start)
        back = min(start, reach)
        if length not in biases:
            biases[length] = _bias(length, back, piece, options, least)
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


def _least_bias(piece: Piece, options: Options, q: Tensor, k: Tensor) -> Tensor:
    """Below this, a key's probability is less than e^-NEGLIGIBLE of that of the row itself.

    Products with numbers too small for float32's exponent take a hundred times as long as others.
    """
    if options.alibi_slopes is None or q.dtype == torch.float64:
        return q.new_tensor(-torch.inf)
    largest = q.new_tensor(options.softcap or options.scale)
    if options.softcap is None:
        for x, parts in ((q, (piece.q_clean, piece.q_noisy)), (k, (piece.clean, piece.noisy))):
            norms = [x[:, :, rows].norm(dim=-1).amax() for rows in parts if rows is not None]
            largest = largest * torch.stack(norms).amax()
    return -2 * largest - NEGLIGIBLE


def _bias(length: int, back: int, piece: Piece, options: Options, least: Tensor) -> Tensor:
    """[rows, keys], or [1, H, rows, keys] with slopes; -inf where a row does not see a key."""
    clean, noisy = torch.arange(-back, length), torch.arange(length)
    rows = noisy if piece.q_clean is None else noisy.repeat(2)
    is_noisy = torch.arange(len(rows)) >= len(rows) - length
    block = rows // piece.block_size * piece.block_size
    block_end = block + piece.block_size
    first = rows - (back + length if options.window is None else options.window - 1)
    end = torch.where(is_noisy, block, block_end if options.see_block else rows + 1)
    of_clean = _within(clean, first, end)
    of_noisy = _within(noisy, torch.maximum(first, block), block_end.where(is_noisy, -1))
    seen = torch.cat([of_clean, of_noisy], 1)
    if options.alibi_slopes is None:
        return least.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    slopes = options.alibi_slopes.to(least.dtype)
    slopes = slopes[piece.samples] if slopes.ndim == 2 else slopes.unsqueeze(0)
    distance = (rows[:, None] - torch.cat([clean, noisy])).abs_().to(least.dtype)
    bias = distance * -slopes[..., None, None]
    return bias.masked_fill_(~seen | (bias < least), -torch.inf)


def _within(keys: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """Which keys are from each row's first on and before its end."""
    return (keys >= first[:, None]) & (keys < end[:, None])


def _join(x: Tensor, parts: list[slice]) -> Tensor:
    return x[:, :, parts[0]] if len(parts) == 1 else torch.cat([x[:, :, p] for p in parts], 2)


def forward(
    piece: Piece, options: Options, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> None:
    """Writes `o` and `lse` of the piece."""
    for chunk in _chunks(piece, options, q, k):
        inputs = _join(q, chunk.q), _join(k, chunk.k), _join(v, chunk.k)
        if options.softcap is None:
            part, part_lse = backends.forward(
                options.backend, *inputs, options.scale, bias=chunk.bias
            )
        else:
            part, part_lse = _plain(*inputs, options.scale, chunk.bias, options.softcap)
        _write(o, part, chunk.q)
        _write(lse, part_lse, chunk.q)


def backward(piece: Piece, options: Options, t: Saved) -> None:
    """Writes the gradients of the piece."""
    t.dk[:, :, piece.clean] = t.dv[:, :, piece.clean] = 0
    for chunk in _chunks(piece, options, t.q, t.k):
        grad, q, o, lse = (_join(x, chunk.q) for x in (t.grad, t.q, t.o, t.lse))
        inputs = grad, q, _join(t.k, chunk.k), _join(t.v, chunk.k), o, lse
        if options.softcap is None:
            grads = backends.backward(options.backend, *inputs, options.scale, bias=chunk.bias)
        else:
            grads = _plain_backward(*inputs, options.scale, chunk.bias, options.softcap)
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


def _probabilities(
    q: Tensor, k: Tensor, scale: float, bias: Tensor, softcap: float | None, lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Those, the log-sum-exp (that of more keys if given) and tanh of the scores over their bound.

    `q` is folded, and so are the results.
    """
    scores, bounded = q @ k.mT, None
    if softcap is not None:
        bounded = scores.mul_(scale / softcap).tanh_()
        scores, scale = bounded.clone(), softcap
    heads, rows = k.shape[1], bias.shape[-2]
    bias = bias if bias.ndim == 2 else bias.unflatten(1, (heads, -1))
    unfolded = scores.unflatten(2, (-1, rows))  # [N, Hkv, group, rows, keys]
    torch.add(bias, unfolded, alpha=scale, out=unfolded)
    lse = scores.logsumexp(-1, keepdim=True) if lse is None else lse
    return scores.sub_(lse).exp_(), lse, bounded


def _plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor, softcap: float | None
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
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, rows = k.shape[1], q.shape[2]
    delta = (grad * o).sum(-1, keepdim=True)
    q, grad, delta, lse = (_fold(x, heads) for x in (q, grad, delta, lse.unsqueeze(-1)))
    p, _, bounded = _probabilities(q, k, scale, bias, softcap, lse)
    dv = p.mT @ grad
    ds = (grad @ v.mT).sub_(delta).mul_(p)
    if bounded is not None:
        ds.mul_(bounded.square_().neg_().add_(1))
    dq = torch.mul(ds @ k, scale).unflatten(2, (-1, rows)).flatten(1, 2)
    return dq, (ds.mT @ q).mul_(scale), dv
