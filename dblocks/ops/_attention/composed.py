"""doubled_attention made of PyTorch's attention, or another library's.

Rows that do not see each other, the documents of a packed sequence or samples with padding, are
pieces that are computed apart: of shifted causal attentions, or, where a window, a bias or a bound
of the scores is more than these can do, in chunks.

Noisy row i, of offset r = i % block_size in its block, attends to the clean rows of earlier blocks,
j < i - r. A causal attention of the noisy rows from `block_size` on over the clean rows from 0 on
covers j <= i - block_size, and a local term the rest: the rows after offset r of the block before,
and the noisy rows of the own block. A clean row has a causal attention, and the later rows of its
own block as local term if it attends to them. At `block_size=1` what remains is the noisy row
itself. Every call of the backward gets the output and log-sum-exp of the whole softmax, so that the
gradients are sums of its parts. Memory is O(T * block_size).
"""

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dblocks.ops._attention import backends, blocks, chunks
from dblocks.ops._attention.pieces import Options, Piece, Saved


def _inner(q: Tensor) -> torch.dtype:
    """The dtype that the backend computes in, and in which o is kept for the backward.

    Matrix products of 16-bit numbers are slow on CPUs without instructions for them: there the
    backward in bfloat16 takes over ten times as long as in float32.
    """
    return torch.promote_types(q.dtype, torch.float32) if q.is_cpu else q.dtype


ALIGNMENT = 16  # bytes that GPU kernels of attention load at once


def _prepared(*tensors: Tensor) -> list[Tensor]:
    unit = [_unit_last(x.to(_inner(x))) for x in tensors]
    return [x if x.is_cpu else aligned(x) for x in unit]


def _unit_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def aligned(x: Tensor) -> Tensor:
    """x, or a copy where a row does not begin at a multiple of 16 bytes, as in some views.

    Kernels of other libraries load 16 bytes at once, and not all of them check the address. Rows
    whose size is no multiple of 16 bytes are left as they are: those kernels pad or refuse them.
    """
    size = x.element_size()
    if x.shape[-1] * size % ALIGNMENT or x.numel() == 0:
        return x
    starts = (x.data_ptr(), *(stride * size for stride in x.stride()[:-1]))
    if all(start % ALIGNMENT == 0 for start in starts):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _rows_layout(like: Tensor, dtype: torch.dtype, width: int | None = None) -> Tensor:
    """An empty [N, H, rows, width] that lies in memory as [N, rows, H, width]."""
    N, H, rows, own = like.shape
    size = (N, rows, H, own if width is None else width)
    return torch.empty(size, dtype=dtype, device=like.device).transpose(1, 2)


def _in_chunks(piece: Piece, options: Options, q: Tensor) -> bool:
    """Whether causal attentions cannot compute the piece, or are slower."""
    narrow = options.window is not None and options.window < piece.length
    if narrow or options.softcap is not None or options.alibi_slopes is not None:
        return True
    return q.is_cpu and piece.block_size > 1


def forward(q: Tensor, k: Tensor, v: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """o, in the dtype that it was computed in, and lse."""
    options = Options(*arguments)
    inner, dtype = _inner(q), torch.promote_types(q.dtype, torch.float32)
    q, k, v = _prepared(q, k, v)
    o = _rows_layout(q, dtype, v.shape[-1])
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    if options.valid is not None:
        o.zero_()
        lse.fill_(-torch.inf)
    with torch.autocast(q.device.type, enabled=False):
        for piece in _pieces(q, k, options):
            attend = chunks.forward if _in_chunks(piece, options, q) else _shifted
            attend(piece, options, *(x[piece.samples] for x in (q, k, v, o, lse)))
    return o.to(inner), lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *arguments
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk and dv, None where not needed; all of them are computed."""
    *arguments, (needs_q, needs_kv) = arguments
    options = Options(*arguments)
    dtype = q.dtype
    grad, q, k, v = _prepared(grad, q, k, v)
    grads = [_rows_layout(x, torch.promote_types(dtype, torch.float32)) for x in (q, k, v)]
    if options.valid is not None:
        for x in grads:
            x.zero_()
    saved = Saved(grad, q, k, v, o, lse, *grads)
    with torch.autocast(q.device.type, enabled=False):
        for piece in _pieces(q, k, options):
            add = chunks.backward if _in_chunks(piece, options, q) else _shifted_backward
            add(piece, options, Saved(*(x[piece.samples] for x in saved)))
    needs = (needs_q, needs_kv, needs_kv)
    dq, dk, dv = (x.to(dtype) if n else None for x, n in zip(grads, needs, strict=True))
    return dq, dk, dv


def forward_fake(q, k, v, *options):
    """Shapes and dtypes of the results of `forward`."""
    return (
        _rows_layout(q, _inner(q), v.shape[-1]),
        q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)),
    )


def _pieces(q: Tensor, k: Tensor, options: Options) -> Iterator[Piece]:
    """The pieces that are not empty."""
    N, T = q.shape[0], k.shape[2] // 2
    if q.numel() == 0:
        return
    first_clean, first_noisy = (T, 0) if options.noisy_first else (0, T)
    both = q.shape[2] == 2 * T
    for samples, start, end in _ranges(N, T, options):
        if start == end:
            continue
        clean, noisy = (slice(first + start, first + end) for first in (first_clean, first_noisy))
        own = slice(start, end)
        yield Piece(
            samples,
            start,
            end - start,
            clean if both else None,
            noisy if both else own,
            clean,
            noisy,
            min(options.block_size, end - start),
        )


def _ranges(N: int, T: int, options: Options) -> Iterator[tuple[slice, int, int]]:
    # With slopes, which terms are negligible must not depend on another sample.
    apart = options.alibi_slopes is not None
    if options.valid is not None:
        samples = enumerate(options.valid.tolist())
        for _, group in groupby(samples, lambda sample: (sample[1], apart and sample[0])):
            numbers, ((start, end), *_) = zip(*group, strict=True)
            yield slice(numbers[0], numbers[-1] + 1), start, end
        return
    ends = [0, T] if options.cu_seqlens is None else options.cu_seqlens.tolist()
    step = 1 if apart else N
    for first in range(0, N, step):
        for start, end in pairwise(ends):
            yield slice(first, first + step), start, end


# A local term is attention of a row to itself or to a part of its block, beside the causal one. It
# has the scores of its keys. `merge` combines it with the output `part` and log-sum-exp `part_lse`
# of the causal attention, which the last rows have; given the `lse` of the whole softmax,
# `backward` computes the gradients of the term. Tensors are float32 or float64.


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[N, H, ...] as [N, heads, H / heads, ...]."""
    return x.unflatten(1, (heads, -1))


class _SelfTerm:
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


def _term(
    half: _Half, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> _SelfTerm | blocks.BlockTerm:
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q[:, :, half.q].to(dtype)
    if half.noisy is not None:
        own_k, own_v = (x[:, :, half.noisy].to(dtype) for x in (k, v))
        if half.block_size == 1:
            return _SelfTerm(q, own_k, own_v, scale)
        k, v = (x[:, :, half.clean].to(dtype) for x in (k, v))
        return blocks.noisy_blocks(q, k, v, own_k, own_v, half.block_size, scale)
    k, v = (x[:, :, half.clean].to(dtype) for x in (k, v))
    return blocks.clean_blocks(q, k, v, half.block_size, scale)


def _shifted(
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


def _shifted_backward(piece: Piece, options: Options, t: Saved) -> None:
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
    if isinstance(term, _SelfTerm):
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
            clean += blocks.from_blocks(part, clean.shape[2])
        else:
            before, own = part.split(half.block_size, 3)
            before = before[:, :, 1:].flatten(2, 3)
            clean[:, :, : before.shape[2]] += before
            total[:, :, half.noisy] = blocks.from_blocks(own, clean.shape[2])
