"""doubled_attention out of plain causal attentions, merged by their log-sum-exp.

Noisy row i, of offset r = i % block_size in its block, attends to the clean rows of earlier blocks,
j < i - r. A causal attention of the noisy rows from `block_size` on over the clean rows from 0 on
covers j <= i - block_size, and a local term the rest: the rows after offset r of the block before,
and the noisy rows of the own block. A clean row has a causal attention, and the later rows of its
own block as local term if it attends to them. At `block_size=1` what remains is the noisy row
itself. Every call of the backward gets the output and log-sum-exp of the whole softmax, so that the
gradients are sums of its parts. Memory is O(T * block_size).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dblocks.ops import _common
from dblocks.ops._attention_backends import BACKENDS, choose
from dblocks.ops._attention_checks import refuse_options
from dblocks.ops._attention_local import (
    BlockTerm,
    SelfTerm,
    clean_blocks,
    from_blocks,
    noisy_blocks,
)
from dblocks.ops._library import define, library

_OPTIONS = "int block_size, bool see_block, float scale, Tensor? cu_seqlens, str backend"
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor o, Tensor lse)"
_BACKWARD = (
    f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and merges."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _inner(q: Tensor) -> torch.dtype:
    """The dtype that the backend computes in, and in which o is kept for the backward.

    Matrix products of 16-bit numbers are slow on CPUs without instructions for them: there the
    backward in bfloat16 takes over ten times as long as in float32.
    """
    return _wide(q.dtype) if q.is_cpu else q.dtype


def _prepared(*tensors: Tensor) -> list[Tensor]:
    return [_unit_last(x.to(_inner(x))) for x in tensors]


def _unit_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows_layout(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty [N, H, rows, Dh] that lies in memory as [N, rows, H, Dh]."""
    N, H, rows, width = like.shape
    return torch.empty((N, rows, H, width), dtype=dtype, device=like.device).transpose(1, 2)


class _Half(NamedTuple):
    """One half of one document: the rows of q, and those of k and v that it needs."""

    q: slice
    clean: slice
    noisy: slice | None  # the keys of the own half, of a noisy one
    block_size: int  # no longer than the document
    local: bool  # whether a local term takes part


def _halves(
    q: Tensor, k: Tensor, block_size: int, see_block: bool, cu_seqlens: Tensor | None
) -> Iterator[_Half]:
    if q.numel() == 0:
        return
    T = k.shape[2] // 2
    first_noisy = q.shape[2] - T  # 0 without clean rows
    ends = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    for start, end in pairwise(ends):
        size = min(block_size, end - start)
        if size == 0:
            continue
        clean = slice(start, end)
        if first_noisy:
            yield _Half(clean, clean, None, size, see_block and size > 1)
        rows = slice(first_noisy + start, first_noisy + end)
        yield _Half(rows, clean, slice(T + start, T + end), size, True)


def _causal(half: _Half) -> tuple[slice, slice]:
    """The rows of q and of the clean keys that the causal attention is of; perhaps none."""
    shift = 0 if half.noisy is None else half.block_size
    return (
        slice(half.q.start + shift, half.q.stop),
        slice(half.clean.start, half.clean.stop - shift),
    )


def _term(half: _Half, q: Tensor, k: Tensor, v: Tensor, scale: float) -> SelfTerm | BlockTerm:
    wide = _wide(q.dtype)
    q = q[:, :, half.q].to(wide)
    if half.noisy is not None:
        own_k, own_v = (x[:, :, half.noisy].to(wide) for x in (k, v))
        if half.block_size == 1:
            return SelfTerm(q, own_k, own_v, scale)
        k, v = (x[:, :, half.clean].to(wide) for x in (k, v))
        return noisy_blocks(q, k, v, own_k, own_v, half.block_size, scale)
    k, v = (x[:, :, half.clean].to(wide) for x in (k, v))
    return clean_blocks(q, k, v, half.block_size, scale)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    see_block: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    inner, wide = _inner(q), _wide(q.dtype)
    q, k, v = _prepared(q, k, v)
    o = _rows_layout(q, wide)
    lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for half in _halves(q, k, block_size, see_block, cu_seqlens):
            _attend(half, q, k, v, o[:, :, half.q], lse[:, :, half.q], scale, backend)
    return o.to(inner), lse


def _attend(
    half: _Half, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float, backend: str
) -> None:
    """Writes `o` and `lse` of the half."""
    queries, keys = _causal(half)
    if keys.start < keys.stop:
        part, part_lse = BACKENDS[backend].forward(
            q[:, :, queries], k[:, :, keys], v[:, :, keys], scale
        )
    else:
        part, part_lse = o[:, :, :0], lse[:, :, :0]
    if half.local:
        _term(half, q, k, v, scale).merge(part, part_lse, o, lse)
    else:
        o.copy_(part)
        lse.copy_(part_lse)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    block_size: int,
    see_block: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, wide = q.dtype, _wide(q.dtype)
    T = k.shape[2] // 2
    grad, q, k, v = _prepared(grad.to(dtype), q, k, v)
    dq, dk, dv = (_rows_layout(x, wide) for x in (q, k, v))
    if q.shape[2] == T:  # no clean rows, which would write the gradients of clean keys first
        dk[:, :, :T] = dv[:, :, :T] = 0
    tensors = _Tensors(grad, q, k, v, o, lse, dq, dk, dv)
    with torch.autocast(q.device.type, enabled=False):
        for half in _halves(q, k, block_size, see_block, cu_seqlens):
            if half.noisy is None:
                _causal_backward(half, tensors, scale, backend)
                _local_backward(half, tensors, scale)
            else:
                _local_backward(half, tensors, scale)
                _causal_backward(half, tensors, scale, backend)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


class _Tensors(NamedTuple):
    """What the backward reads, and the three gradients that it writes."""

    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def _causal_backward(half: _Half, t: _Tensors, scale: float, backend: str) -> None:
    """The gradients of the causal attention: of clean rows written, of noisy ones added."""
    at, keys = _causal(half)
    if keys.start == keys.stop:
        return
    grad, q, o, lse = (x[:, :, at] for x in (t.grad, t.q, t.o, t.lse))
    k, v = (x[:, :, keys] for x in (t.k, t.v))
    grads = BACKENDS[backend].backward(grad, q, k, v, o, lse, scale)
    for total, rows, part in zip((t.dq, t.dk, t.dv), (at, keys, keys), grads, strict=True):
        if half.noisy is None:
            total[:, :, rows] = part
        else:
            total[:, :, rows] += part


def _local_backward(half: _Half, t: _Tensors, scale: float) -> None:
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


def _forward_fake(q, k, v, block_size, see_block, scale, cu_seqlens, backend):
    return _rows_layout(q, _inner(q)), q.new_empty(q.shape[:3], dtype=_wide(q.dtype))


def _backward_fake(grad, q, k, v, o, lse, block_size, see_block, scale, cu_seqlens, backend):
    return tuple(_rows_layout(x, x.dtype) for x in (q, k, v))


_FWD = define("doubled_attention_fwd", _FORWARD, _forward_fake, ("composed",))["composed"]
_BWD = define("doubled_attention_bwd", _BACKWARD, _backward_fake, ("composed",))["composed"]
library.impl("doubled_attention_fwd_composed", _forward, "CompositeExplicitAutograd")
library.impl("doubled_attention_bwd_composed", _backward, "CompositeExplicitAutograd")


class _Composed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, block_size, see_block, scale, cu_seqlens, backend):
        o, lse = _FWD(q, k, v, block_size, see_block, scale, cu_seqlens, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens)
        ctx.options = block_size, see_block, scale, backend
        return o.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[:3]
        if grad is None or not any(needs):
            return (None,) * 8
        q, k, v, o, lse, cu_seqlens = ctx.saved_tensors
        block_size, see_block, scale, backend = ctx.options
        grads = _BWD(grad, q, k, v, o, lse, block_size, see_block, scale, cu_seqlens, backend)
        return (*(g if n else None for g, n in zip(grads, needs, strict=True)), *(None,) * 5)


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
    refuse_options(
        "impl='composed'", q, v, order=order, valid=valid, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    backend = choose(backend, q, cu_seqlens)
    options = (block_size, clean_causal == "block", scale, cu_seqlens, backend)
    if _common.needs_autograd(q, k, v):
        return _Composed.apply(q, k, v, *options)
    return _FWD(q, k, v, *options)[0].to(q.dtype)
