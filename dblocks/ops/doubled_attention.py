"""doubled_attention: attention of a clean and a noisy copy of one sequence, side by side.

The implementation that impl="auto" uses:

| tensors | implementation |
|---|---|
| float64, or in a torch.func transform or forward-mode differentiation | reference |
| on a CPU, T < 32 | reference: fewer operations, which are all overhead at such sizes |
| on a CPU, T >= 32 | composed: as fast at 32, two to three times as fast at 128 |
| on a GPU, block_size 1, T of COMPOSED_TOKENS, a backend as fast as FlashAttention 3 | composed |
| on a GPU, else, of sizes that the Triton kernels take | triton: one launch, and no merge |
| on a GPU, else, where a backend takes them | composed |
| elsewhere | reference |

The rows for GPUs, and COMPOSED_TOKENS, follow from the designs and are not measured: for few tokens
the launches and the merge cost more than faster matrix products save. Options that a backend does
not take leave the tensors to the next row. A given `backend` means composed.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from dblocks.kernels import reference
from dblocks.ops import _checks, _dispatch
from dblocks.ops._attention import backends, composed
from dblocks.ops._attention.checks import CleanCausal, Order, Query, alike, check
from dblocks.ops._dispatch import check_first_order, distinct
from dblocks.ops._library import define

AttentionImpl = Literal["auto", "reference", "triton", "composed"]
Backend = Literal["sdpa", "cudnn", "flash_attn_3", "flash_attn", "xformers"]

OP = "doubled_attention"
IMPLS = ("auto", "reference", "triton", "composed")
MIN_COMPOSED_TOKENS = 32  # on a CPU
# From which T on, by the widest head; not measured.
COMPOSED_TOKENS = {64: 4096, 128: 2048, 256: 2048}
BACKENDS = tuple(backends.BACKENDS)
# What the Triton kernels take.
MIN_WIDTH, MAX_WIDTH = 16, 256  # of a tile: matrix instructions, registers
WIDTH_STEP = 8  # 16 bytes of a 16-bit dtype
MAX_BLOCK_SIZE = 128
MAX_TOKENS = 2**30 - 2**8  # rows of both halves have int32 numbers, and a tile may pass the last

_OPTIONS = (
    "int block_size, bool token, float scale, Tensor? cu_seqlens, bool noisy_only, "
    "bool noisy_first, Tensor? valid, int? window, float? softcap, Tensor? alibi_slopes, "
    "str? backend"
)
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor o, Tensor lse)"
_BACKWARD = (
    f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_OPTIONS}, bool[] needs)"
    " -> (Tensor dq, Tensor dk, Tensor dv)"
)


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


_FWD = {
    **define("doubled_attention_fwd", _FORWARD, _fwd_fake, triton="attention.forward"),
    **define("doubled_attention_fwd", _FORWARD, composed.forward_fake, composed=composed.forward),
}
_BWD = define(
    "doubled_attention_bwd", _BACKWARD, _bwd_fake,
    triton="attention.backward", composed=composed.backward,
)  # fmt: skip


class _DoubledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, q, k, v, *options):
        o, lse = _FWD[impl](q, k, v, *options)
        ctx.set_materialize_grads(False)
        ctx.tensors = [isinstance(x, Tensor) for x in options]
        given = (x for x in options if isinstance(x, Tensor))
        ctx.save_for_backward(q, k, v, o, lse, *given)
        ctx.options = [None if isinstance(x, Tensor) else x for x in options]
        ctx.impl = impl
        return o.to(q.dtype)

    @staticmethod
    def backward(ctx, do):
        check_first_order(OP)
        none = len(ctx.options) * [None]
        needs_q, *needs_kv = needs = ctx.needs_input_grad[1:4]
        if do is None or not any(needs):
            return (None, None, None, None, *none)
        q, k, v, o, lse, *given = ctx.saved_tensors
        options = list(ctx.options)
        for i in (i for i, tensor in enumerate(ctx.tensors) if tensor):
            options[i] = given.pop(0)
        grads = _BWD[ctx.impl](do.to(q.dtype), q, k, v, o, lse, *options, [needs_q, any(needs_kv)])
        grads = [g if n else None for g, n in zip(grads, needs, strict=True)]
        return (None, *grads, *none)


def doubled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int = 1,
    clean_causal: CleanCausal = "block",
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    query: Query = "both",
    order: Order = "clean_noisy",
    valid: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    impl: AttentionImpl = "auto",
    backend: Backend | None = None,
) -> Tensor:
    """Attention over the doubled sequence `[clean 0..T-1 | noisy 0..T-1]`.

    With positions in blocks of `block_size` consecutive tokens:

        clean i attends to clean j   where block(j) <= block(i)   (clean_causal="token": j <= i)
        noisy i attends to clean j   where block(j) <  block(i)
        noisy i attends to noisy j   where block(j) == block(i)
        clean i attends to no noisy row
        window: and to no j          where i - j >= window

        s_ij = scale * q_i . k_j                    softcap: softcap * tanh(s_ij / softcap)
                                                    alibi_slopes: s_ij - slope * |i - j|
        o_i  = sum_j softmax_j(s_ij) v_j            over the j that i attends to

    where i and j are positions, 0..T-1 in both halves. Every row has at least itself. At
    `block_size=1` these are `T*(T+1)` pairs, half of what one causal attention over both halves
    computes and a quarter of a dense mask.

    Args:
        q: `[N, H, 2T, Dk]`, halves in `order`; `[N, H, T, Dk]` with `query="noisy"`. Any strides of
            the first three dimensions are taken without a copy; a last stride other than 1 costs
            one copy. On GPUs other libraries' kernels get a copy of tensors whose rows do not begin
            at multiples of 16 bytes.
        k: `[N, Hkv, 2T, Dk]`; H is a multiple of Hkv, and each key/value head serves H/Hkv query
            heads that follow one another.
        v: `[N, Hkv, 2T, Dv]`.
        block_size: tokens in a block, >= 1; T need not be a multiple of it.
        clean_causal: whether clean rows see all of their own block ("block") or no later token
            ("token"); the same at `block_size=1`.
        scale: of the scores, any number of a size up to 1e30; `Dk**-0.5` by default.
        cu_seqlens: int32 `[documents + 1]`, on the device of `q`: the first row of each document in
            one half and, last, T. Needs N = 1. Each half holds all documents; positions and blocks
            start again in each document, and no row sees another document: even NaN and infinity
            stay in their document, forward and backward. Documents may be empty. On a GPU the
            values are checked on the device, without synchronisation.
        query: "both" halves, or "noisy" rows only, with the same result for these: enough for the
            last layer of a block.
        order: of the halves in q, k, v and o: "clean_noisy" or "noisy_clean". No copy is made.
        valid: int32 `[N, 2]`, on the device of `q`: the range start..end-1 of each sample's
            positions that are not padding, `0 <= start <= end <= T`, in both halves. No row attends
            to rows outside the range; their o and gradients are 0, whatever they hold. Positions
            and blocks count from each sample's start. Checked like `cu_seqlens`; the two exclude
            each other.
        window: how many positions back a row sees, its own included, >= 1; None for all.
        softcap: bound of the scores' size, from 1e-18 to 1e18; None for none.
        alibi_slopes: float32 `[H]` or `[N, H]`, constants; None for none.
        impl: "reference" (dense mask in plain PyTorch, memory O(T^2): any device and dtype, any
            transform; where `cu_seqlens` cannot be read, on a GPU or in a graph, it computes all
            rows once for each document), "triton" (GPU; Dk and Dv a multiple of 8 from 16 to 256;
            block_size up to 128; not float64), "composed" (plain attentions of PyTorch or another
            library, merged; memory O(T * block_size); on a GPU float16 and bfloat16, neither
            `cu_seqlens` nor `valid`, and of `window`, `softcap` and `alibi_slopes` what its backend
            has), or "auto", see the table in `dblocks.ops.doubled_attention`.
        backend: the attention that "composed" uses: "sdpa" (PyTorch's flash kernels; the only one
            on CPUs; FlashAttention 3 or 4 after its `activate_flash_attention_impl`), "cudnn",
            "flash_attn_3", "flash_attn" or "xformers"; by default the first that can run, those as
            fast as FlashAttention 3 before others.

    Returns:
        o `[N, H, rows of q, Dv]`, of the dtype of `q`. Under autocast, where q, k and v have
        several dtypes and none is float64, all are cast to that of autocast first. Arithmetic is
        float32 (float64 for float64 inputs), matrix products take inputs of the dtype of `q`, on
        CPUs of float32. Gradients have their input's dtype and repeat bit for bit (on a GPU those
        of "composed" as its backend's do: PyTorch's under `torch.use_deterministic_algorithms`);
        first-order autograd only, but for the reference.

    Raises:
        ValueError: for an invalid shape or value.
        TypeError: for an invalid dtype.
        RuntimeError: for tensors on several devices, or an `impl` or `backend` that cannot run.
        ImportError: for an `impl` or `backend` whose package is not installed.

    Source: Arriola et al. 2025 (block diffusion), training mask; Shing et al. 2026; `softcap` of
    Gemma Team 2024; `alibi_slopes` of Press et al. 2022.
    """
    q, k, v = alike(q, k, v)
    numbers = (block_size, clean_causal, scale, query, order, window, softcap)
    kind = (OP, *numbers, *map(type, numbers))
    # The values of these are checked in every call.
    watched = cu_seqlens is not None or valid is not None or alibi_slopes is not None
    if watched or not _dispatch.seen(kind, (q, k, v)):
        check(
            q, k, v, block_size, clean_causal, scale, cu_seqlens, query, order, valid, window,
            softcap, alibi_slopes,
        )  # fmt: skip
        _dispatch.remember(kind, (q, k, v))
    if not (scale is None or type(scale) is float):
        scale = _checks.plain_number(scale)
    if not (softcap is None or type(softcap) is float):
        softcap = _checks.plain_number(softcap)
    options = {
        "block_size": block_size,
        "clean_causal": clean_causal,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "cu_seqlens": cu_seqlens,
        "query": query,
        "order": order,
        "valid": valid,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }
    chosen = resolve(impl, backend, q, k, v, options)
    if chosen == "reference":
        return reference.doubled_attention(q, k, v, **options)[0]
    made_of = None
    if chosen == "triton":
        if reason := _obstacle(q, k, v, block_size):
            raise ValueError(
                f"{OP}: impl='triton' takes {reason}; use impl='composed' or impl='reference'"
            )
    else:
        made_of = backends.choose(backend, q, v, **_hindering(options))
        q, options["scale"] = _of_positive_scale(q, options["scale"])
    given = (
        block_size, clean_causal == "token", options["scale"], cu_seqlens, query == "noisy",
        order == "noisy_clean", valid, window, softcap, alibi_slopes, made_of,
    )  # fmt: skip
    if _dispatch.needs_autograd(q, k, v):
        return _DoubledAttention.apply(*distinct(chosen, q, k, v, *given))
    return _FWD[chosen](q, k, v, *given)[0].to(q.dtype)


def _of_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """q and a scale > 0 of the same scores.

    Flash attention takes no other: its maxima are those of the unscaled scores.
    """
    return (q, scale) if scale > 0 else (q * (-1.0 if scale else 0.0), -scale or 1.0)


def _hindering(options: dict[str, Any]) -> dict[str, Any]:
    """The options that some backend does not take."""
    names = ("cu_seqlens", "valid", "window", "softcap", "alibi_slopes")
    return {name: options.get(name) for name in names}


def resolve(
    impl: str, backend: str | None, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
) -> str:
    """The implementation for these tensors; a named one that cannot run raises."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        if impl not in ("auto", "composed"):
            raise ValueError(
                f"backend must be None with impl={impl!r}, got {backend!r}; "
                "it says what impl='composed' is made of"
            )
        impl = "composed"
    _dispatch.refuse_sharded(impl, q, OP)
    if impl == "auto":
        return explained(q, k, v, **options)[0]
    _dispatch.check_transform(impl, OP)
    if impl == "triton":
        _dispatch.check_triton(q, OP)
    return impl


def explained(
    q: Tensor, k: Tensor, v: Tensor, *, block_size: int = 1, **options: Any
) -> tuple[str, str]:
    """The choice of impl="auto" and the reason; options are those of doubled_attention."""
    if q.dtype == torch.float64:
        return "reference", "plain PyTorch: the tensors are float64"
    if _dispatch.in_transform():
        return "reference", "plain PyTorch: only it takes part in transforms"
    if q.is_cpu:
        if k.shape[2] // 2 < MIN_COMPOSED_TOKENS:
            return "reference", f"plain PyTorch: a CPU, and T < {MIN_COMPOSED_TOKENS}"
        return "composed", "the tensors are on a CPU: PyTorch's flash attention, twice, merged"
    if q.device.type in _dispatch.GPUS:
        hindering = _hindering(options)
        able = [name for name in BACKENDS if backends.obstacle(name, q, v, **hindering) is None]
        fast = [name for name in able if backends.is_fast(name, q)]
        if fast and block_size == 1 and k.shape[2] // 2 >= _composed_tokens(q, v):
            return "composed", f"a GPU with fast attention, and many tokens: {fast[0]}, merged"
        if _dispatch.HAS_TRITON and _obstacle(q, k, v, block_size) is None:
            return "triton", "the tensors are on a GPU"
        if able:
            name = (fast or able)[0]
            return "composed", f"a GPU, but no Triton or not its sizes: {name}, twice, merged"
    return "reference", "plain PyTorch: no other implementation serves these tensors"


def _obstacle(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> str | None:
    """What the Triton kernels take instead of these sizes; None where they take them."""
    for name, width in {"Dh": q.shape[-1], "Dv": v.shape[-1]}.items():
        if not MIN_WIDTH <= width <= MAX_WIDTH or width % WIDTH_STEP:
            return f"{name} a multiple of {WIDTH_STEP} from {MIN_WIDTH} to {MAX_WIDTH}, got {width}"
    if block_size > MAX_BLOCK_SIZE:
        return f"block_size <= {MAX_BLOCK_SIZE}, got {block_size}"
    if (T := k.shape[2] // 2) > MAX_TOKENS:
        return f"T <= {MAX_TOKENS}, got {T}"
    return None


def _composed_tokens(q: Tensor, v: Tensor) -> float:
    widest = max(q.shape[-1], v.shape[-1])
    return next((T for width, T in COMPOSED_TOKENS.items() if widest <= width), float("inf"))
