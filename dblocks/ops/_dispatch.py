"""Dispatch of a call from an op's public function to an implementation, and its autograd.

Layouts of arguments that passed the checks of _checks.py and _levels.py are remembered here, as are
the plans of Triton's launches: both run for a new layout only, and the checks raise the errors.
Nothing here reads the values of a tensor on an accelerator, so no call synchronises.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dblocks.config import HIGHEST_LEVEL, LOWEST_LEVEL
from dblocks.ops import _extension, _flops

Impl = Literal["auto", "reference", "triton", "cpp"]
Norm = Literal["layer", "rms"]

IMPLS = ("auto", "reference", "triton", "cpp")
FUSED = ("triton", "cpp")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GPUS = ("cuda",)  # ROCm devices are called cuda too
NORMS = ("layer", "rms")
# As in kernels/_common/launches.py, which is not imported before it is used.
MAX_TRITON_WIDTH = 16384
MAX_TRITON_ROWS = 2**31 - 2**22  # rows of a group have int32 indices, and a chunk may pass the last
SEED_RANGE = COUNT_RANGE = 2**63
FEW = 64  # longest list of noise levels that is checked in Python
PLAIN = (Tensor, torch.nn.Parameter)
VALUES = {type(None), bool, int, str, torch.dtype}
KNOWN = {*PLAIN, *VALUES, float, list}  # none is watched

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Read when dblocks is imported, as triton itself reads it when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def resolve_impl(impl: str, x: Tensor, op: str) -> Impl:
    """The implementation that `op` uses for the tensor `x`; a named one that cannot run raises."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    refuse_sharded(impl, x, op)
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


def refuse_sharded(impl: str, x: Any, op: str) -> None:
    """Raises for a DTensor, of which a kernel would see only this device's part."""
    if type(x) not in PLAIN and type(x).__name__ == "DTensor" and impl != "reference":
        raise TypeError(
            f"{op} must have tensors that are whole on this device, got a DTensor with "
            f"{x.placements}; give x.to_local() where samples are divided, x.full_tensor() "
            'elsewhere, or impl="reference"'
        )


def _auto(x: Tensor) -> Impl:
    if x.dtype == torch.float64 or in_transform():
        return "reference"
    if x.is_cpu:
        return "reference" if _extension.MISSING else "cpp"
    return "triton" if x.device.type in GPUS else "reference"


def in_transform() -> bool:
    """Whether a torch.func transform or forward mode is active; only the reference has them."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


# As in_forward_mode of kernels/reference/_adaln.py, this is evaluated when a graph is traced.
in_transform._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def check_transform(impl: str, op: str) -> None:
    """Raises if a named implementation is used in a transform, whose derivatives it would drop."""
    if impl != "reference" and in_transform():
        raise RuntimeError(
            f"{op}: impl={impl!r} has no part in torch.func transforms and forward-mode "
            "differentiation; use impl='reference' or impl='auto'"
        )


def is_traced() -> bool:
    """Whether values may be unknown: in a graph, trace, transform or dispatch mode (make_fx)."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return True
    return torch._C._get_tracing_state() is not None or in_transform()


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
    """Raises if the Triton kernels of `op` cannot run on `x`."""
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


def check_triton_rows(x: Tensor, op: str) -> None:
    """Raises if `x` has too many or too wide rows for kernels that hold a row in registers."""
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


def needs_autograd(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors may need a gradient; if not, autograd is skipped.

    One that a torch.func transform left behind says that it needs none, even if what it holds does.
    """
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    left = is_functorch_wrapped_tensor
    given = [t for t in tensors if t is not None]
    return torch.is_grad_enabled() and any(t.requires_grad or left(t) for t in given)


_fitting: set[Any] = set()  # layouts of valid arguments; cleared when it grows large
MAX_FITTING = 4096


def seen(kind: object, tensors: Sequence[Any]) -> bool:
    """Whether tensors of these layouts have passed the checks of a `kind` of arguments.

    If not, call the checks, which may raise, and then `remember`.
    """
    if torch.compiler.is_compiling():
        return False
    try:
        return _layout(kind, tensors) in _fitting
    except (AttributeError, TypeError, RuntimeError):  # no tensor; unknown or nested sizes
        return False


def remember(kind: object, tensors: Sequence[Any]) -> None:
    """Records that tensors of these layouts have passed."""
    if torch.compiler.is_compiling():
        return
    if len(_fitting) >= MAX_FITTING:
        _fitting.clear()
    with suppress(TypeError):  # unknown sizes
        _fitting.add(_layout(kind, tensors))


def _layout(kind: object, tensors: Sequence[Any]) -> object:
    return kind, *[t if t is None else (t.shape, t.dtype, t.device, t.layout) for t in tensors]


def rows_fit(
    x: Tensor,
    rows: tuple[Tensor, ...],
    modulation: tuple[Tensor | None, ...],
    channels: tuple[Tensor | None, ...] = (),
    norm: str = "layer",
    eps: float = 0.0,
) -> bool:
    """Whether `_checks.check_rows` is known to pass; if False, call it, and it may raise."""
    if norm not in NORMS or type(eps) is not float or not eps >= 0:
        return False
    return seen((len(rows), len(modulation)), (x, *rows, *modulation, *channels))


def noised_fit(tensors: tuple[Tensor, ...], sigma: Tensor, sigma_data: float) -> bool:
    """Whether `_levels.check_noised` is known to pass; if False, call it, and it may raise."""
    fits = seen("samples", tensors) and type(sigma_data) is float
    fits = fits and LOWEST_LEVEL <= sigma_data <= HIGHEST_LEVEL
    return fits and sigma_fits(sigma, tensors[0])


def known_seed(seed: Any, offset: object, x: Tensor) -> tuple[Tensor | None, int] | None:
    """The result of `_levels.split_seed`, if known; if None, call it, and it may raise."""
    if type(offset) is not int or torch.compiler.is_compiling():
        return None
    if not 0 <= offset <= COUNT_RANGE - max(x.numel(), 1):
        return None
    if type(seed) is int:
        return (None, seed) if -SEED_RANGE <= seed < SEED_RANGE else None
    fits = type(seed) is Tensor and seed.ndim == 0 and seed.dtype == torch.int64
    return (seed, 0) if fits and seed.device == x.device else None


def sigma_fits(sigma: Any, x: Tensor) -> bool:
    """Whether `sigma` is known to be valid, outside graphs; on a CPU, also that it is positive.

    A short list is checked in Python, in a fraction of PyTorch's time.
    """
    if type(sigma) is not Tensor or sigma.device != x.device or sigma.dtype not in FLOATS:
        return False
    size, rows = sigma.shape, x.shape  # len() of a tensor takes a microsecond
    if sigma.layout is not torch.strided or is_traced():
        return False
    if len(size) == 2:
        if len(rows) != 3 or size[0] != rows[0] or size[1] < 1 or rows[1] % size[1]:
            return False
    elif len(size) > 1 or (len(size) == 1 and size[0] != rows[0]):
        return False
    if not sigma.is_cpu:
        return True
    if len(size) == 1 and size[0] <= FEW:
        return _are_levels(sigma.tolist())
    return sigma.numel() > 0 and _are_levels([bound.item() for bound in sigma.detach().aminmax()])


def _are_levels(values: list[float]) -> bool:
    for value in values:  # noqa: SIM110 (a generator takes twice as long)
        if not 0 < value <= HIGHEST_LEVEL:
            return False
    return True


def widest(*tensors: Tensor) -> Tensor:
    """The first float64 tensor, which decides the arithmetic, or else the first tensor."""
    return next((t for t in tensors if t.dtype == torch.float64), tensors[0])


def caller(op: Any, kernel: Callable[..., Any] | None) -> Callable[..., Any]:
    """`op`, with its flop formula where one counts; in plain eager mode its `kernel` directly."""

    def call(*args: Any) -> Any:
        traced = is_traced()
        if traced and not torch.compiler.is_compiling():
            _flops.watch()
        if traced or kernel is None:
            return op(*args)
        plain = KNOWN.issuperset(map(type, args)) or not any(
            isinstance(a, Tensor) and type(a) not in PLAIN for a in args
        )
        for a in args:
            if type(a) in PLAIN and a.is_neg():  # PyTorch gives such tensors their sign
                plain = False
        return kernel(*args) if plain else op(*args)

    return call


# Copies and a function by kernel and layout; all dropped when there are many, a bound for programs
# whose shapes never repeat. Threads may make the same plan twice: both are equal.
_plans: dict[Any, tuple[Sequence[int], torch.device | None, Callable[..., Any]]] = {}
MAX_PLANS = 1024


def planned(make: Callable[..., Any], changing: Sequence[int] = ()) -> Callable[..., Any]:
    """An op of which all that follows from the layout of its arguments is done once.

    `make` takes the arguments of a new layout. It returns which tensors are to be made contiguous,
    and a function of the same arguments, which every call of this layout calls. Not part of a
    layout are the values of tensors, of floats, and of the ints at the positions `changing`.
    """

    def call(*args: Any) -> Any:
        layout: list[Any] = [
            a if type(a) in VALUES
            else (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() & 15)
            if isinstance(a, Tensor)
            else float if isinstance(a, float)
            else tuple(a) if type(a) is list
            else a
            for a in args
        ]  # fmt: skip
        for i in changing:
            layout[i] = None
        key = (make, *layout)
        plan = _plans.get(key)
        if plan is None:
            copies, run = make(*args)
            device = next(a.device for a in args if isinstance(a, Tensor))
            plan = copies, device if device.type in GPUS else None, run
            if len(_plans) >= MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
        copies, device, run = plan
        if copies:
            args = tuple(a.contiguous() if i in copies else a for i, a in enumerate(args))
        if device is None:
            return run(*args)
        with torch.cuda.device(device):
            return run(*args)

    return call


def distinct(*args: Any) -> tuple[Any, ...]:
    """The arguments for the `apply` of an autograd function.

    torch.compile does not accept the same argument twice; a view counts as another tensor, and the
    gradients of all views add up.
    """
    if not torch.compiler.is_compiling():
        return args
    again = [any(arg is other for other in args[:i]) for i, arg in enumerate(args)]
    pairs = zip(args, again, strict=True)
    return tuple(a.view_as(a) if r and isinstance(a, Tensor) else a for a, r in pairs)


def check_first_order(op: str, way_out: str = 'use impl="reference"') -> None:
    """Raises in the backward of an op, which is not differentiable, if autograd records it.

    Its result would be a constant to autograd, and a gradient penalty would have no effect.
    PyTorch's `once_differentiable` raises later, and only if the upstream gradient itself requires
    a gradient.
    """
    # A graph's backward is traced with gradients enabled; that graph raises by itself.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op} has first derivatives only, got a backward that is to be differentiated again "
            f"(create_graph=True); {way_out}"
        )


def constant(tensor: Tensor) -> Tensor:
    """`tensor` without a gradient in backward(); unchanged in a transform, for its tangent."""
    return tensor.detach() if tensor.requires_grad and not in_transform() else tensor


def kept(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The small `tensors` to save for backward, safe from changes in place by a compiled graph.

    Eager autograd notices such a change and raises; a graph would use the new values silently.
    """
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(None if t is None else torch.ops.dblocks.keep.default(t) for t in tensors)
