"""Checks of the tensors and numbers that ops are given: their types, shapes, dtypes and devices.

Nothing here looks at the values of a tensor, so no check synchronises with a GPU. An op first asks
whether its arguments fit, which is remembered for a layout; only where they do not, the checks run
that can say why.
"""

import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dblocks.ops._dispatch import FLOATS

MAX_TRITON_WIDTH = 16384  # of kernels/_common/launches.py, which is not imported before it is used
MAX_TRITON_ROWS = 2**31 - 2**22  # rows of a group have int32 numbers, and a chunk may pass the last


def type_name(value: object) -> str:
    """The type of `value` as a message calls it."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def check_tensor(**tensors: object) -> None:
    """Every argument is a dense tensor: the first check of an op, of those that it needs."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name} must be a tensor, got {type_name(tensor)}; use torch.as_tensor"
            )
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
            raise TypeError(f"{name} must be a dense tensor, got {kind}; convert it first")


def check_number(name: str, value: object) -> None:
    """`value` is a real number, a symbolic one of a graph included."""
    if type(value) is float:
        return
    if not isinstance(value, (numbers.Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a real number, got {type_name(value)}; convert it first")


def check_float(**tensors: Tensor | None) -> None:
    """Every given argument is a dense tensor of one of the four floating dtypes."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(**{name: tensor})
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}; "
                "convert it first"
            )


def check_device(like: Tensor, **tensors: Tensor | None) -> None:
    """Every given tensor is on the device of `like`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise RuntimeError(
                f"{name} must be on {like.device} as the other tensors are, "
                f"got {tensor.device}; move it there"
            )


_fitting: set[Any] = set()  # what arguments that fit looked like; emptied where it grows large
MAX_FITTING = 4096


def rows_fit(
    x: Tensor,
    rows: tuple[Tensor, ...],
    modulation: tuple[Tensor | None, ...],
    channels: tuple[Tensor | None, ...] = (),
) -> bool:
    """Whether all arguments are as the checks below want them, in a fraction of their time.

    It cannot say what is wrong: where it returns False the checks run, and raise.
    """
    kind = (len(rows), len(modulation))
    args = (x, rows, modulation, channels)
    return _fits(_rows_fit, args, kind, (x, *rows, *modulation, *channels))


def samples_fit(x: Tensor, *others: Tensor) -> bool:
    """As `rows_fit`, for tensors [N, ...] of one shape."""
    tensors = (x, *others)
    return _fits(_samples_fit, tensors, "samples", tensors)


def _fits(
    check: Callable[..., bool], args: tuple[Any, ...], kind: object, tensors: tuple[Any, ...]
) -> bool:
    """`check(*args)`, which is known where such `tensors` have passed as arguments of a `kind`."""
    if torch.compiler.is_compiling():
        return check(*args)
    try:
        seen = [t if t is None else (t.shape, t.dtype, t.device, t.layout) for t in tensors]
        key = (kind, *seen)
        if key in _fitting:
            return True
    except (AttributeError, TypeError, RuntimeError):  # no tensor; unknown or nested sizes
        return check(*args)
    if not check(*args):
        return False
    if len(_fitting) >= MAX_FITTING:
        _fitting.clear()
    _fitting.add(key)
    return True


def _rows_fit(
    x: Tensor,
    rows: tuple[Tensor, ...],
    modulation: tuple[Tensor | None, ...],
    channels: tuple[Tensor | None, ...],
) -> bool:
    if not isinstance(x, Tensor) or x.ndim != 3:
        return False
    shape, device = x.shape, x.device
    N, T, D = shape
    segments = None
    for tensor in (x, *rows):
        if not _is_plain(tensor, device) or tensor.shape != shape:
            return False
    for tensor in modulation:
        if tensor is None:
            continue
        if not _is_plain(tensor, device):
            return False
        size = tensor.shape
        S = size[1] if len(size) == 3 else 1
        if len(size) not in (2, 3) or size[0] != N or size[-1] != D:
            return False
        if S < 1 or T % S or (segments is not None and segments != S):
            return False
        segments = S
    return all(p is None or (_is_plain(p, device) and p.shape == (D,)) for p in channels)


def _samples_fit(x: Tensor, *others: Tensor) -> bool:
    if not isinstance(x, Tensor) or x.ndim == 0:
        return False
    shape, device = x.shape, x.device
    return all(_is_plain(tensor, device) and tensor.shape == shape for tensor in (x, *others))


def _is_plain(tensor: object, device: torch.device) -> bool:
    return (
        isinstance(tensor, Tensor)
        and tensor.dtype in FLOATS
        and tensor.device == device
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def check_tokens(name: str, x: Tensor) -> None:
    """`x` is [N, T, D]."""
    if x.ndim != 3:
        raise ValueError(
            f"{name} must have shape [N, T, D], got {list(x.shape)}; add or merge dimensions"
        )


def check_same_shape(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` has the shape of `like`."""
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of {like_name}, {list(like.shape)}, "
            f"got {list(tensor.shape)}"
        )


def check_modulation(x: Tensor, **modulation: Tensor | None) -> None:
    """Each modulation is [N, D] or [N, S, D] with S dividing T, and all have one S."""
    N, T, D = x.shape
    first: tuple[str, int] | None = None
    for name, m in modulation.items():
        if m is None:
            continue
        if m.ndim not in (2, 3) or m.shape[0] != N or m.shape[-1] != D:
            raise ValueError(
                f"{name} must have shape [N, D] = [{N}, {D}] or [N, S, D] = [{N}, S, {D}], "
                f"got {list(m.shape)}"
            )
        S = m.shape[1] if m.ndim == 3 else 1
        if T % S != 0 if S else T != 0:
            raise ValueError(
                f"{name} must have a number of segments S that divides T = {T}, got S = {S}"
            )
        if first is not None and first[1] != S:
            raise ValueError(
                f"{name} must have as many segments as {first[0]}, {first[1]}, got {S}; "
                "expand one of them"
            )
        first = first or (name, S)


def check_channels(x: Tensor, **parameters: Tensor | None) -> None:
    """Each parameter (weight, bias) is [D]."""
    D = x.shape[-1]
    for name, p in parameters.items():
        if p is not None and p.shape != (D,):
            raise ValueError(f"{name} must have shape [D] = [{D}], got {list(p.shape)}")


def check_norm(norm: str, eps: float) -> None:
    """`norm` is known and `eps` is a number that cannot make the root negative."""
    if norm not in ("layer", "rms"):
        raise ValueError(f"norm must be 'layer' or 'rms', got {norm!r}")
    check_number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must be a number >= 0, got {eps}")


def check_out_dtype(dtype: torch.dtype | None) -> None:
    """`dtype` is absent or one of the four floating dtypes."""
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(
            f"out_dtype must be float64, float32, bfloat16 or float16, got {dtype}; leave it out "
            "to keep the dtype of x"
        )


def check_size(x: Tensor, op: str, impl: str) -> None:
    """The Triton kernels hold a row in registers, which bounds its width, and count rows."""
    if impl != "triton":
        return
    rows = x.shape[0] * x.shape[1]
    if rows >= MAX_TRITON_ROWS:
        raise ValueError(
            f"{op}: impl='triton' takes N * T < {MAX_TRITON_ROWS}, got N * T = {rows}; "
            "split the samples, or use impl='reference'"
        )
    if x.shape[-1] > MAX_TRITON_WIDTH:
        raise ValueError(
            f"{op}: impl='triton' takes D <= {MAX_TRITON_WIDTH}, got D = {x.shape[-1]}; "
            "use impl='reference'"
        )
