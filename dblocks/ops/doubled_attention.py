"""doubled_attention: attention of a clean and a noisy copy of one sequence, side by side."""

from typing import Literal, get_args

import torch
from torch import Tensor

from dblocks.kernels import reference
from dblocks.ops import _attention_choice, _common

AttentionImpl = Literal["auto", "reference", "triton", "composed"]
Backend = Literal["sdpa", "cudnn", "flash_attn", "xformers"]
CleanCausal = Literal["block", "token"]
Query = Literal["both", "noisy"]


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
    impl: AttentionImpl = "auto",
    backend: Backend | None = None,
) -> Tensor:
    """Attention over the doubled sequence `[clean 0..T-1 | noisy 0..T-1]`.

    With positions in blocks of `block_size` consecutive tokens:

        clean i attends to clean j   where block(j) <= block(i)   (clean_causal="token": j <= i)
        noisy i attends to clean j   where block(j) <  block(i)
        noisy i attends to noisy j   where block(j) == block(i)
        clean i attends to no noisy row

    so `o_i = sum_j softmax_j(scale * q_i . k_j) v_j` over the allowed j. Every row has at least
    itself. At `block_size=1` these are `T*(T+1)` pairs, half of what one causal attention over both
    halves computes and a quarter of a dense mask.

    Args:
        q: `[N, H, 2T, Dh]`, clean rows first; `[N, H, T, Dh]` with `query="noisy"`. Any strides of
            the first three dimensions are taken without a copy; a last stride other than 1 costs
            one copy.
        k: `[N, Hkv, 2T, Dh]`; H is a multiple of Hkv, and each key/value head serves H/Hkv query
            heads that follow one another.
        v: as `k`.
        block_size: tokens in a block, >= 1; T need not be a multiple of it.
        clean_causal: whether clean rows see all of their own block ("block") or no later token
            ("token"); the same at `block_size=1`.
        scale: of the scores; `Dh**-0.5` by default.
        cu_seqlens: int32 `[documents + 1]`, on the device of `q`: the first row of each document of
            one half and, last, T. Needs N = 1. The rows are `[all clean documents | all noisy
            ones]`; positions and blocks start again in each document, and no row sees another
            document. Documents may be empty. On a GPU its values are checked there, without
            waiting for them.
        query: "both" halves, or "noisy" rows only, which then equal rows T..2T-1 of the full
            result: what the last layer of a block needs.
        impl: "reference" (dense mask in plain PyTorch, memory O(T^2): any device and dtype, any
            transform), "triton" (GPU; Dh a multiple of 8 from 16 to 256; block_size up to 128; not
            float64), "composed" (plain causal attentions of PyTorch or another library, merged;
            memory O(T * block_size); on a GPU float16 and bfloat16, and no `cu_seqlens`), or
            "auto", see `dblocks.ops._attention_choice`.
        backend: which attention "composed" is made of: "sdpa" (PyTorch's flash kernels; the only
            one on CPUs), "cudnn", "flash_attn" or "xformers"; by default the first that can run.

    Returns:
        o, of the shape and dtype of `q`. Arithmetic is float32 (float64 for float64 inputs), matrix
        products take inputs of the dtype of `q`, on CPUs of float32. Gradients have their input's
        dtype and repeat bit for bit (on a GPU those of "composed" as its backend's do: PyTorch's
        under `torch.use_deterministic_algorithms`); first-order autograd only, but for the
        reference.

    Raises:
        ValueError: for a shape or value that does not fit.
        TypeError: for a dtype that does not fit.
        RuntimeError: for tensors on several devices, or an `impl` or `backend` that cannot run.
        ImportError: for an `impl` or `backend` whose package is not installed.

    Source: Arriola et al. 2025 (block diffusion), training mask; Shing et al. 2026.
    """
    _check(q, k, v, block_size, clean_causal, scale, cu_seqlens, query)
    options = {
        "block_size": block_size,
        "clean_causal": clean_causal,
        "scale": q.shape[-1] ** -0.5 if scale is None else scale,
        "cu_seqlens": cu_seqlens,
        "query": query,
    }
    chosen = _attention_choice.resolve(impl, backend, q, k, options)
    if chosen == "reference":
        return reference.doubled_attention(q, k, v, **options)[0]
    if chosen == "triton":
        from dblocks.ops._attention_op import fused

        return fused(q, k, v, **options)
    from dblocks.ops._composed_attention import composed

    return composed(q, k, v, **options, backend=backend)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    clean_causal: str,
    scale: float | None,
    cu_seqlens: Tensor | None,
    query: str,
) -> None:
    _common.check_tensor(q=q, k=k, v=v)
    _common.check_float(q=q, k=k, v=v)
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must have shape [N, heads, rows, Dh], got {list(tensor.shape)}; "
                "add or merge dimensions"
            )
        if tensor.dtype != q.dtype:
            raise TypeError(
                f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}; convert one"
            )
    _common.check_device(q, k=k, v=v)
    if query not in get_args(Query):
        raise ValueError(f"query must be one of {get_args(Query)}, got {query!r}")
    if clean_causal not in get_args(CleanCausal):
        raise ValueError(
            f"clean_causal must be one of {get_args(CleanCausal)}, got {clean_causal!r}"
        )
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(
            f"block_size must be an int, got {_common.type_name(block_size)}; convert it first"
        )
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if scale is not None:
        _common.check_number("scale", scale)
    N, H, rows, width = q.shape
    heads, keys = k.shape[1], k.shape[2]
    if k.shape != (N, heads, keys, width) or v.shape != k.shape:
        raise ValueError(
            f"k and v must have shape [N, Hkv, 2T, Dh] = [{N}, Hkv, 2T, {width}] both, "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    if keys % 2:
        raise ValueError(
            f"k must have 2T rows, clean ones first, got the odd number {keys}; "
            "give both halves as many"
        )
    T = keys // 2
    expected = T if query == "noisy" else keys
    if rows != expected:
        raise ValueError(
            f"q must have {expected} rows where k has {keys} and query={query!r}, got {rows}; "
            "query='noisy' takes the noisy half of the rows only"
        )
    if H < 1 or heads < 1 or H % heads:
        raise ValueError(
            f"the heads of q must be a multiple of those of k, got {H} and {heads}; "
            "each key/value head serves as many query heads"
        )
    if width < 1:
        raise ValueError(f"Dh must be at least 1, got {width}")
    if cu_seqlens is not None:
        _check_documents(q, cu_seqlens, T)


def _check_documents(q: Tensor, cu_seqlens: Tensor, T: int) -> None:
    _common.check_tensor(cu_seqlens=cu_seqlens)
    _common.check_device(q, cu_seqlens=cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}; call .int()")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            "cu_seqlens must have shape [documents + 1] with at least one document, "
            f"got {list(cu_seqlens.shape)}"
        )
    if q.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens needs N = 1, got N = {q.shape[0]}; pack the samples into one sequence"
        )
    valid = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T) & (cu_seqlens.diff() >= 0).all()
    if torch.compiler.is_compiling() or not cu_seqlens.is_cpu:
        message = f"cu_seqlens must start with 0, never decrease and end with T = {T}"
        torch.ops.aten._assert_async.msg(valid, message)
    elif not valid:
        raise ValueError(
            f"cu_seqlens must start with 0, never decrease and end with T = {T}, "
            f"got {cu_seqlens.tolist()}"
        )
