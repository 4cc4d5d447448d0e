"""doubled_attention in Triton: schema, fake kernel, autograd."""

import torch
from torch import Tensor

from dblocks.ops import _common
from dblocks.ops._attention_checks import refuse_options
from dblocks.ops._autograd import apply, first_order
from dblocks.ops._library import define, triton_kernel

MIN_WIDTH, MAX_WIDTH = 16, 256  # of a tile: matrix instructions, registers
WIDTH_STEP = 8  # 16 bytes of a 16-bit dtype
MAX_BLOCK_SIZE = 128
MAX_TOKENS = 2**30 - 2**8  # rows of both halves have int32 numbers, and a tile may pass the last

_OPTIONS = "int block_size, bool token, float scale, Tensor? cu_seqlens, bool noisy_only"
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor o, Tensor lse)"
_BACKWARD = (
    f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_OPTIONS}, bool[] needs)"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)


@triton_kernel("doubled_attention_fwd")
def _fwd_triton(q, k, v, block_size, token, scale, cu_seqlens, noisy_only):
    from dblocks.kernels.attention import doubled_attention_fwd

    return doubled_attention_fwd(q, k, v, block_size, token, scale, cu_seqlens, noisy_only)


@triton_kernel("doubled_attention_bwd")
def _bwd_triton(do, q, k, v, o, lse, block_size, token, scale, cu_seqlens, noisy_only, needs):
    from dblocks.kernels.attention_bwd import doubled_attention_bwd

    grads = doubled_attention_bwd(
        do, q, k, v, o, lse, block_size, token, scale, cu_seqlens, noisy_only, needs
    )
    return tuple(q.new_empty(0) if g is None else g for g in grads)


def _by_rows(x: Tensor) -> Tensor:
    """The layout of every result: [N, rows, heads, Dh] seen as [N, heads, rows, Dh]."""
    N, heads, rows, width = x.shape
    return x.new_empty((N, rows, heads, width)).transpose(1, 2)


def _fwd_fake(q, k, v, block_size, token, scale, cu_seqlens, noisy_only):
    return _by_rows(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _bwd_fake(do, q, k, v, o, lse, block_size, token, scale, cu_seqlens, noisy_only, needs):
    needs = (needs[0], needs[1], needs[1])
    return tuple(
        _by_rows(x) if n else q.new_empty(0) for x, n in zip((q, k, v), needs, strict=True)
    )


_FWD = define("doubled_attention_fwd", _FORWARD, _fwd_fake, ("triton",))["triton"]
_BWD = define("doubled_attention_bwd", _BACKWARD, _bwd_fake, ("triton",))["triton"]


class _DoubledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, block_size, token, scale, cu_seqlens, noisy_only):
        o, lse = _FWD(q, k, v, block_size, token, scale, cu_seqlens, noisy_only)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens)
        ctx.options = block_size, token, scale
        ctx.noisy_only = noisy_only
        return o

    @staticmethod
    @first_order("doubled_attention")
    def backward(ctx, do):
        q, k, v, o, lse, cu_seqlens = ctx.saved_tensors
        needs_q, *needs_kv = ctx.needs_input_grad[:3]
        grads = _BWD(
            do.to(q.dtype), q, k, v, o, lse, *ctx.options, cu_seqlens, ctx.noisy_only,
            [needs_q, any(needs_kv)],
        )  # fmt: skip
        needs = (needs_q, *needs_kv)
        grads = [g if n else None for g, n in zip(grads, needs, strict=True)]
        return (*grads, None, None, None, None, None)


def fused(
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
) -> Tensor:
    """o, laid out as [N, rows, H, Dh]; see the public function."""
    refuse_options(
        "impl='triton'", q, v, order=order, valid=valid, window=window, softcap=softcap,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    _check(q, k, block_size)
    options = (block_size, clean_causal == "token", scale, cu_seqlens, query == "noisy")
    if _common.needs_autograd(q, k, v):
        return apply(_DoubledAttention, q, k, v, *options)
    return _FWD(q, k, v, *options)[0]


def _check(q: Tensor, k: Tensor, block_size: int) -> None:
    way_out = "use impl='composed' or impl='reference'"
    width, T = q.shape[-1], k.shape[2] // 2
    if not MIN_WIDTH <= width <= MAX_WIDTH or width % WIDTH_STEP:
        raise ValueError(
            f"doubled_attention: impl='triton' takes Dh a multiple of {WIDTH_STEP} from "
            f"{MIN_WIDTH} to {MAX_WIDTH}, got {width}; {way_out}"
        )
    if block_size > MAX_BLOCK_SIZE:
        raise ValueError(
            f"doubled_attention: impl='triton' takes block_size <= {MAX_BLOCK_SIZE}, "
            f"got {block_size}; {way_out}"
        )
    if T > MAX_TOKENS:
        raise ValueError(
            f"doubled_attention: impl='triton' takes T <= {MAX_TOKENS}, got {T}; {way_out}"
        )
