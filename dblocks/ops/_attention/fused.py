"""doubled_attention in Triton: schema, fake kernel, autograd."""

import torch
from torch import Tensor

from dblocks.ops import _dispatch
from dblocks.ops._dispatch import check_first_order, recorded
from dblocks.ops._library import define, triton_kernel

MIN_WIDTH, MAX_WIDTH = 16, 256  # of a tile: matrix instructions, registers
WIDTH_STEP = 8  # 16 bytes of a 16-bit dtype
MAX_BLOCK_SIZE = 128
MAX_TOKENS = 2**30 - 2**8  # rows of both halves have int32 numbers, and a tile may pass the last

_OPTIONS = (
    "int block_size, bool token, float scale, Tensor? cu_seqlens, bool noisy_only,"
    " bool noisy_first, Tensor? valid, int? window, float? softcap, Tensor? alibi_slopes"
)
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor o, Tensor lse)"
_BACKWARD = (
    f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_OPTIONS}, bool[] needs)"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)


@triton_kernel("doubled_attention_fwd")
def _fwd_triton(q, k, v, *options):
    from dblocks.kernels.attention.forward import doubled_attention_fwd
    from dblocks.kernels.attention.layout import Options

    return doubled_attention_fwd(q, k, v, Options(*options))


@triton_kernel("doubled_attention_bwd")
def _bwd_triton(do, q, k, v, o, lse, *options_and_needs):
    from dblocks.kernels.attention.backward import doubled_attention_bwd
    from dblocks.kernels.attention.layout import Options

    *options, needs = options_and_needs
    grads = doubled_attention_bwd(do, q, k, v, o, lse, Options(*options), needs)
    return tuple(q.new_empty(0) if g is None else g for g in grads)


def _by_rows(x: Tensor, like: Tensor) -> Tensor:
    """A result for the rows of `x` as wide as `like`: [N, rows, heads, width], transposed."""
    (N, heads, rows, _), width = x.shape, like.shape[3]
    return x.new_empty((N, rows, heads, width)).transpose(1, 2)


def _fwd_fake(q, k, v, *options):
    return _by_rows(q, v), q.new_empty(q.shape[:3], dtype=torch.float32)


def _bwd_fake(do, q, k, v, o, lse, *options_and_needs):
    *_, (needs_q, needs_kv) = options_and_needs
    needs = (needs_q, needs_kv, needs_kv)
    return tuple(
        _by_rows(x, x) if n else q.new_empty(0) for x, n in zip((q, k, v), needs, strict=True)
    )


_FWD = define("doubled_attention_fwd", _FORWARD, _fwd_fake, ("triton",))["triton"]
_BWD = define("doubled_attention_bwd", _BACKWARD, _bwd_fake, ("triton",))["triton"]


class _DoubledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, *options):
        o, lse = _FWD(q, k, v, *options)()
        ctx.tensors = [isinstance(x, Tensor) for x in options]
        given = (x for x in options if isinstance(x, Tensor))
        ctx.save_for_backward(q, k, v, o, lse, *given)
        ctx.options = [None if isinstance(x, Tensor) else x for x in options]
        return o

    @staticmethod
    def backward(ctx, do):
        check_first_order("doubled_attention")
        q, k, v, o, lse, *given = ctx.saved_tensors
        options = list(ctx.options)
        for i in (i for i, tensor in enumerate(ctx.tensors) if tensor):
            options[i] = given.pop(0)
        needs_q, *needs_kv = ctx.needs_input_grad[:3]
        grads = _BWD(do.to(q.dtype), q, k, v, o, lse, *options, [needs_q, any(needs_kv)])()
        needs = (needs_q, *needs_kv)
        grads = [g if n else None for g, n in zip(grads, needs, strict=True)]
        return (*grads, *len(options) * [None])


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
    """o, laid out as [N, rows, H, Dv]; see the public function."""
    if reason := obstacle(q, k, v, block_size):
        raise ValueError(
            f"doubled_attention: impl='triton' takes {reason}; "
            "use impl='composed' or impl='reference'"
        )
    options = (
        block_size, clean_causal == "token", scale, cu_seqlens, query == "noisy",
        order == "noisy_clean", valid, window, softcap, alibi_slopes,
    )  # fmt: skip
    if _dispatch.needs_autograd(q, k, v):
        return recorded(_DoubledAttention, q, k, v, *options)()
    return _FWD(q, k, v, *options)()[0]


def obstacle(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> str | None:
    """What the kernels take instead of these sizes; None where they take them."""
    for name, width in {"Dh": q.shape[-1], "Dv": v.shape[-1]}.items():
        if not MIN_WIDTH <= width <= MAX_WIDTH or width % WIDTH_STEP:
            return f"{name} a multiple of {WIDTH_STEP} from {MIN_WIDTH} to {MAX_WIDTH}, got {width}"
    if block_size > MAX_BLOCK_SIZE:
        return f"block_size <= {MAX_BLOCK_SIZE}, got {block_size}"
    if (T := k.shape[2] // 2) > MAX_TOKENS:
        return f"T <= {MAX_TOKENS}, got {T}"
    return None
