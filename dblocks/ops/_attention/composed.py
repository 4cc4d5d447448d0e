"""doubled_attention out of other libraries' attention, or PyTorch's: schema, fake kernel, autograd.

Rows that do not see each other, the documents of a packed sequence or samples with padding, are
pieces that are computed apart: of shifted causal attentions, or, where a window, a bias or a bound
of the scores is more than these can do, in chunks.
"""

import torch
from torch import Tensor

from dblocks.ops import _dispatch
from dblocks.ops._attention import chunks, shifted
from dblocks.ops._attention.backends import choose
from dblocks.ops._attention.pieces import Options, Piece, Saved, pieces, wide
from dblocks.ops._dispatch import check_first_order, recorded
from dblocks.ops._library import define, library

_OPTIONS = (
    "int block_size, bool see_block, float scale, Tensor? cu_seqlens, bool noisy_first, "
    "Tensor? valid, int? window, float? softcap, Tensor? alibi_slopes, str backend"
)
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor o, Tensor lse)"
_BACKWARD = (
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)


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


def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments) -> tuple[Tensor, Tensor]:
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


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *arguments
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(*arguments)
    dtype = q.dtype
    grad, q, k, v = _prepared(grad.to(dtype), q, k, v)
    grads = [_rows_layout(x, wide(dtype)) for x in (q, k, v)]
    if options.valid is not None:
        for x in grads:
            x.zero_()
    saved = Saved(grad, q, k, v, o, lse, *grads)
    with torch.autocast(q.device.type, enabled=False):
        for piece in pieces(q, k, options):
            _way(piece, options, q).backward(piece, options, saved.of(piece.samples))
    dq, dk, dv = (x.to(dtype) for x in grads)
    return dq, dk, dv


def _forward_fake(q, k, v, *options):
    return (
        _rows_layout(q, _inner(q), v.shape[-1]),
        q.new_empty(q.shape[:3], dtype=wide(q.dtype)),
    )


def _backward_fake(grad, q, k, v, o, lse, *options):
    return tuple(_rows_layout(x, x.dtype) for x in (q, k, v))


_FWD = define("doubled_attention_fwd", _FORWARD, _forward_fake, ("composed",))["composed"]
_BWD = define("doubled_attention_bwd", _BACKWARD, _backward_fake, ("composed",))["composed"]
library.impl("doubled_attention_fwd_composed", _forward, "CompositeExplicitAutograd")
library.impl("doubled_attention_bwd_composed", _backward, "CompositeExplicitAutograd")


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *options):
        o, lse = _FWD(q, k, v, *options)()
        given = Options(*options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, o, lse, given.cu_seqlens, given.valid, given.alibi_slopes)
        ctx.options = given._replace(cu_seqlens=None, valid=None, alibi_slopes=None)
        return o.to(q.dtype)

    @staticmethod
    def backward(ctx, grad):
        check_first_order("doubled_attention")
        needs = ctx.needs_input_grad[:3]
        none = (None,) * len(ctx.options)
        if grad is None or not any(needs):
            return (None, None, None, *none)
        q, k, v, o, lse, cu_seqlens, valid, alibi_slopes = ctx.saved_tensors
        options = ctx.options._replace(
            cu_seqlens=cu_seqlens, valid=valid, alibi_slopes=alibi_slopes
        )
        grads = _BWD(grad, q, k, v, o, lse, *options)()
        return (*(g if n else None for g, n in zip(grads, needs, strict=True)), *none)


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    clean_causal: str,
    scale: float,
    cu_seqlens: Tensor | None,
    query: str,
    order: str,
    valid: Tensor | None,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    backend: str | None,
) -> Tensor:
    """o of doubled_attention, see there, out of the attention of `backend`."""
    backend = choose(
        backend, q, v, cu_seqlens=cu_seqlens, valid=valid, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    if scale <= 0:
        # Flash attention takes positive scales only: its maxima are those of the unscaled scores.
        q, scale = q * (-1.0 if scale else 0.0), -scale or 1.0
    options = Options(
        block_size, clean_causal == "block", scale, cu_seqlens, order == "noisy_clean", valid,
        window, softcap, alibi_slopes, backend,
    )  # fmt: skip
    if _dispatch.needs_autograd(q, k, v):
        return recorded(_Composed, q, k, v, *options)()
    return _FWD(q, k, v, *options)()[0].to(q.dtype)
