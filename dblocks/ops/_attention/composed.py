"""doubled_attention out of other libraries' attention, or PyTorch's.

Rows that do not see each other, the documents of a packed sequence or samples with padding, are
pieces that are computed apart: of shifted causal attentions, or, where a window, a bias or a bound
of the scores is more than these can do, in chunks.
"""

import torch
from torch import Tensor

from dblocks.ops._attention import chunks, shifted
from dblocks.ops._attention.pieces import Options, Piece, Saved, pieces, wide


def _inner(q: Tensor) -> torch.dtype:
    """The dtype that the backend computes in, and in which o is kept for the backward.

    Matrix products of 16-bit numbers are slow on CPUs without instructions for them: there the
    backward in bfloat16 takes over ten times as long as in float32.
    """
    return wide(q.dtype) if q.is_cpu else q.dtype


def _prepared(*tensors: Tensor) -> list[Tensor]:
    return [_unit_last(x.to(_inner(x))) for x in tensors]


def _unit_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_layout(like: Tensor, dtype: torch.dtype, width: int | None = None) -> Tensor:
    """An empty [N, H, rows, width] that lies in memory as [N, rows, H, width]."""
    N, H, rows, own = like.shape
    size = (N, rows, H, own if width is None else width)
    return torch.empty(size, dtype=dtype, device=like.device).transpose(1, 2)


def _way(piece: Piece, options: Options, q: Tensor):
    """The module that computes the piece."""
    narrow = options.window is not None and options.window < piece.length
    if narrow or options.softcap is not None or options.alibi_slopes is not None:
        return chunks
    return chunks if q.is_cpu and piece.block_size > 1 else shifted


def forward(q: Tensor, k: Tensor, v: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """o, in the dtype that it was computed in, and lse."""
    options = Options(*arguments)
    inner, dtype = _inner(q), wide(q.dtype)
    q, k, v = _prepared(q, k, v)
    o = _rows_layout(q, dtype, v.shape[-1])
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    if options.valid is not None:
        o.zero_()
        lse.fill_(-torch.inf)
    with torch.autocast(q.device.type, enabled=False):
        for piece in pieces(q, k, options):
            tensors = (x[piece.samples] for x in (q, k, v, o, lse))
            _way(piece, options, q).forward(piece, options, *tensors)
    return o.to(inner), lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *arguments
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk and dv, None where not needed; all of them are computed."""
    *arguments, (needs_q, needs_kv) = arguments
    options = Options(*arguments)
    dtype = q.dtype
    grad, q, k, v = _prepared(grad, q, k, v)
    grads = [_rows_layout(x, wide(dtype)) for x in (q, k, v)]
    if options.valid is not None:
        for x in grads:
            x.zero_()
    saved = Saved(grad, q, k, v, o, lse, *grads)
    with torch.autocast(q.device.type, enabled=False):
        for piece in pieces(q, k, options):
            _way(piece, options, q).backward(piece, options, saved.of(piece.samples))
    needs = (needs_q, needs_kv, needs_kv)
    dq, dk, dv = (x.to(dtype) if n else None for x, n in zip(grads, needs, strict=True))
    return dq, dk, dv


def forward_fake(q, k, v, *options):
    """Shapes and dtypes of the results of `forward`."""
    return (
        _rows_layout(q, _inner(q), v.shape[-1]),
        q.new_empty(q.shape[:3], dtype=wide(q.dtype)),
    )
