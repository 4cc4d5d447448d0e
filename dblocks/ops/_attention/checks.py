"""Checks of the arguments of doubled_attention."""

from typing import Literal, get_args

import torch
from torch import Tensor

from dblocks.ops import _checks
from dblocks.ops._checks import values_known

CleanCausal = Literal["block", "token"]
Query = Literal["both", "noisy"]
Order = Literal["clean_noisy", "noisy_clean"]

MAX_COUNT = 2**31 - 1
# Beyond these, scores of float32 or what is divided by the bound leave its range.
MAX_SCALE, MIN_SOFTCAP, MAX_SOFTCAP = 1e30, 1e-18, 1e18


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    clean_causal: str,
    scale: float | None,
    cu_seqlens: Tensor | None,
    query: str,
    order: str,
    valid: Tensor | None,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> None:
    """Raises unless the arguments are valid; see the public function."""
    _check_tensors(q, k, v)
    for name, value, allowed in (
        ("query", query, get_args(Query)),
        ("clean_causal", clean_causal, get_args(CleanCausal)),
        ("order", order, get_args(Order)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    _check_count("block_size", block_size)
    if window is not None:
        _check_count("window", window)
    if scale is not None:
        _checks.check_number("scale", scale)
        if not abs(scale) <= MAX_SCALE:
            raise ValueError(f"scale must be from {-MAX_SCALE} to {MAX_SCALE}, got {scale}")
    if softcap is not None:
        _checks.check_number("softcap", softcap)
        if not MIN_SOFTCAP <= softcap <= MAX_SOFTCAP:
            raise ValueError(
                f"softcap must be from {MIN_SOFTCAP} to {MAX_SOFTCAP}, got {softcap}; "
                "None is no bound"
            )
    T = _check_shapes(q, k, v, query)
    if alibi_slopes is not None:
        _check_slopes(q, alibi_slopes)
    if cu_seqlens is not None and valid is not None:
        raise ValueError(
            "valid must be None with cu_seqlens: packed documents have no padding; pass one of them"
        )
    if cu_seqlens is not None:
        _check_documents(q, cu_seqlens, T)
    if valid is not None:
        _check_valid(q, valid, T)


def alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one dtype where autocast is on, as PyTorch's attention makes them.

    Under autocast norms and rotary positions give float32 and projections do not. Tensors that are
    of one dtype already stay as they are, more precise than autocast asks for. float64 is not cast,
    as in PyTorch, and is left to the checks, like whatever is no tensor.
    """
    given = (q, k, v)
    if not all(isinstance(x, Tensor) for x in given) or q.dtype == k.dtype == v.dtype:
        return given
    kind = q.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return given
    if any(not x.is_floating_point() or x.dtype == torch.float64 for x in given):
        return given
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    _checks.check_tensor(q=q, k=k, v=v)
    _checks.check_float(q=q, k=k, v=v)
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
    _checks.check_device(q, k=k, v=v)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {_checks.type_name(value)}; convert it first")
    if not 1 <= value <= MAX_COUNT:
        raise ValueError(f"{name} must be at least 1 and at most {MAX_COUNT}, got {value}")


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, query: str) -> int:
    """T."""
    N, H, rows, width = q.shape
    heads, keys = k.shape[1], k.shape[2]
    if k.shape != (N, heads, keys, width) or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"k and v must have shape [N, Hkv, 2T, Dk] = [{N}, Hkv, 2T, {width}] and "
            f"[N, Hkv, 2T, Dv], got {list(k.shape)} and {list(v.shape)}"
        )
    if keys % 2:
        raise ValueError(
            f"k must have 2T rows, as many clean ones as noisy ones, got the odd number {keys}; "
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
    for name, size in (("Dk", width), ("Dv", v.shape[3])):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    return T


def _check_slopes(q: Tensor, alibi_slopes: Tensor) -> None:
    _checks.check_tensor(alibi_slopes=alibi_slopes)
    _checks.check_device(q, alibi_slopes=alibi_slopes)
    if alibi_slopes.dtype != torch.float32:
        raise TypeError(f"alibi_slopes must be float32, got {alibi_slopes.dtype}; call .float()")
    N, H = q.shape[:2]
    if alibi_slopes.shape not in ((H,), (N, H)):
        raise ValueError(
            f"alibi_slopes must have shape [H] = [{H}] or [N, H] = [{N}, {H}], "
            f"got {list(alibi_slopes.shape)}"
        )
    if alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes must be constants, got a tensor with grad; detach it")


def _check_documents(q: Tensor, cu_seqlens: Tensor, T: int) -> None:
    _check_int32(q, cu_seqlens=cu_seqlens)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            "cu_seqlens must have shape [documents + 1] with at least one document, "
            f"got {list(cu_seqlens.shape)}"
        )
    if q.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens needs N = 1, got N = {q.shape[0]}; pack the samples into one sequence"
        )
    fits = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T) & (cu_seqlens.diff() >= 0).all()
    _assert(fits, cu_seqlens, f"cu_seqlens must start with 0, never decrease and end with T = {T}")


def _check_valid(q: Tensor, valid: Tensor, T: int) -> None:
    _check_int32(q, valid=valid)
    if valid.shape != (q.shape[0], 2):
        raise ValueError(
            f"valid must have shape [N, 2] = [{q.shape[0]}, 2], got {list(valid.shape)}"
        )
    start, end = valid.unbind(1)
    fits = ((start >= 0) & (start <= end) & (end <= T)).all()
    _assert(fits, valid, f"valid must have rows (start, end), 0 <= start <= end <= T = {T}")


def _check_int32(q: Tensor, **tensors: Tensor) -> None:
    _checks.check_tensor(**tensors)
    _checks.check_device(q, **tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {tensor.dtype}; call .int()")


def _assert(fits: Tensor, values: Tensor, message: str) -> None:
    """Raises, or asserts on the device or in a graph, where values are not known here."""
    if not values_known(values):
        torch.ops.aten._assert_async.msg(fits, message)
    elif not fits:
        raise ValueError(f"{message}, got {values.tolist()}")
