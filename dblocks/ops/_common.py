"""What the ops share: the choice of an implementation and the checks of arguments.

Nothing here looks at the values of a tensor on an accelerator, so no check synchronises.
"""

import importlib.util
import numbers
import os
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dblocks.kernels.reference import in_forward_mode
from dblocks.ops import _extension

Impl = Literal["auto", "reference", "triton", "cpp"]
Norm = Literal["layer", "rms"]

IMPLS = ("auto", "reference", "triton", "cpp")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GPUS = ("cuda",)  # ROCm devices are called cuda too

MAX_TRITON_WIDTH = 16384  # kernels/_launch.py; that module needs no triton but is not imported here
MAX_TRITON_ROWS = 2**31 - 2**22  # rows of a group have int32 numbers, and a chunk may pass the last

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Read when dblocks is imported, as triton itself reads it when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def resolve_impl(impl: str, x: Tensor, op: str) -> Impl:
    """The implementation that `op` uses for the tensor `x`; a named one that cannot run raises."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        impl = _auto(x)
        if impl != "triton":
            return impl
    else:
        check_transform(impl, op)
    if impl == "triton":
        check_triton(x, op)
    if impl == "cpp":
        _check_cpp(x, op)
    return cast(Impl, impl)


def _auto(x: Tensor) -> Impl:
    if x.dtype == torch.float64 or in_transform():
        return "reference"
    if x.is_cpu:
        return "reference" if _extension.MISSING else "cpp"
    return "triton" if x.device.type in GPUS else "reference"


def in_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active.

    Only the reference can take part in one.
    """
    return peek_interpreter_stack() is not None or in_forward_mode()


# As of in_forward_mode: the answer is that of the moment when a graph is traced.
in_transform._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def check_transform(impl: str, op: str) -> None:
    """Raises where a named implementation meets a transform, whose derivatives it would drop."""
    if impl != "reference" and in_transform():
        raise RuntimeError(
            f"{op}: impl={impl!r} has no part in torch.func transforms and forward-mode "
            "differentiation; use impl='reference' or impl='auto'"
        )


def is_traced() -> bool:
    """Whether values may be unknown: in a graph, trace, transform or dispatch mode (make_fx)."""
    if torch.compiler.is_compiling():
        return True
    if _get_current_dispatch_mode() is not None or torch._C._get_tracing_state() is not None:
        return True
    return in_transform()


def _check_cpp(x: Tensor, op: str) -> None:
    if x.device.type != "cpu":
        raise RuntimeError(
            f"{op}: impl='cpp' needs tensors on the CPU, got device {x.device}; move them, or use "
            "impl='auto'"
        )
    if x.dtype == torch.float64:
        raise TypeError(
            f"{op}: impl='cpp' takes float32, bfloat16 and float16, got float64; "
            "use impl='reference'"
        )
    if _extension.MISSING:
        raise RuntimeError(
            f"{op}: impl='cpp' needs the C++ ops, which are {_extension.MISSING}; install with a "
            "compiler and torch at hand (pip install --no-build-isolation), or use "
            "impl='reference'"
        )


def check_triton(x: Tensor, op: str) -> None:
    """Raises where the Triton kernels of `op` cannot run on `x`."""
    if not HAS_TRITON:
        raise ImportError(
            f"{op}: impl='triton' needs the package triton, which is not installed; "
            "`pip install triton` (Linux), or pass impl='reference'"
        )
    if x.dtype == torch.float64:
        raise TypeError(
            f"{op}: impl='triton' takes float32, bfloat16 and float16, got float64; "
            "use impl='reference'"
        )
    if x.device.type not in GPUS and not INTERPRETED:
        raise RuntimeError(
            f"{op}: impl='triton' needs tensors on a GPU, got device {x.device}; move them, use "
            "impl='reference', or set TRITON_INTERPRET=1 before the import to run interpreted"
        )


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked of one of the tensors; without, the op is called bare."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
