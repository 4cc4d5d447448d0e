"""From an op's public function to an implementation: the choice, the registration, the gradient.

An op is registered with PyTorch once for each fused implementation, under one schema and one fake
kernel: a CPU key cannot serve both the C++ op and the interpreted Triton kernel. Nothing here looks
at the values of a tensor on an accelerator, so no call synchronises.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack, unwrap_if_dead
from torch.utils._python_dispatch import _get_current_dispatch_mode

from dblocks.kernels.reference import in_forward_mode
from dblocks.ops import _extension, _flops

Impl = Literal["auto", "reference", "triton", "cpp"]
Norm = Literal["layer", "rms"]

IMPLS = ("auto", "reference", "triton", "cpp")
FUSED = ("triton", "cpp")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
GPUS = ("cuda",)  # ROCm devices are called cuda too
PLAIN = (Tensor, torch.nn.Parameter)
KNOWN = {*PLAIN, type(None), bool, int, float, str, list, torch.dtype}  # none is watched

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


library = torch.library.Library("dblocks", "FRAGMENT")

_kernels: dict[str, Callable[..., Any]] = {}


def define(
    name: str, schema: str, fake: Callable[..., Any], impls: Sequence[str] = FUSED
) -> dict[str, Any]:
    """Defines `dblocks::<name>_<impl>` for each fused implementation; returns their calls by it.

    The C++ ops get their kernels from csrc/library.cpp. A Triton kernel is launched without a
    detour by PyTorch's library where nobody watches; a result that is absent is then None, and
    from the op a tensor without elements.

    Args:
        name: such as "adaln_fwd".
        schema: arguments and results, "(Tensor x) -> Tensor".
        fake: computes shapes and dtypes of the results.
        impls: those that the op has.
    """
    calls, flops = {}, _flops.FORMULAS.get(name)
    for impl in impls:
        library.define(f"{name}_{impl}{schema}")
        torch.library.register_fake(f"dblocks::{name}_{impl}", fake, lib=library)
        # autograd.Function takes care of gradients; PyTorch's check of ops without any costs 3 us.
        library.impl(f"{name}_{impl}", torch.library.fallthrough_kernel, "Autograd")
        op = getattr(torch.ops.dblocks, f"{name}_{impl}").default
        if flops is not None:
            _flops.register(op, flops)
        kernel = _kernels.get(f"{name}_{impl}")
        calls[impl] = op if not kernel and not flops else _call(op, kernel)
    return calls


def _call(op: Any, kernel: Callable[..., Any] | None) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if is_traced():
            _flops.watch()
            return op(*args)
        if kernel is None or not (KNOWN.issuperset(map(type, args)) or _plain(args)):
            return op(*args)
        return kernel(*args)

    return call


def _plain(args: tuple[Any, ...]) -> bool:
    return all(not isinstance(a, Tensor) or type(a) in PLAIN for a in args)


def triton_kernel(name: str, like: int = 0) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function the Triton implementation of the op `name`, on GPUs and, interpreted, CPUs.

    It imports its kernels when it is called, so that `import dblocks` needs no triton. A result
    that is None is, from the op, without elements and of the dtype of argument number `like`.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def whole(*args: Any) -> Any:
            results = kernel(*args)
            if isinstance(results, Tensor):
                return results
            # Each absent one is a tensor of its own: an op may not return one tensor twice.
            return tuple(args[like].new_empty(0) if r is None else r for r in results)

        torch.library.impl(library, f"{name}_triton", "CompositeExplicitAutograd")(whole)
        _kernels[f"{name}_triton"] = kernel
        return kernel

    return register


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, where a graph may get one tensor several times.

    torch.compile does not take an argument twice; a view is another tensor to it, and the gradients
    of all views add up.
    """
    if torch.compiler.is_compiling():
        return function.apply(*_distinct(args))
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    # What Function.apply does then, without some microseconds of what transforms need: tensors that
    # a transform has left behind are unwrapped, or their gradients would be lost.
    args = tuple([unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args])
    return super(torch.autograd.Function, function).apply(*args)  # pyright: ignore


def _distinct(args: tuple[Any, ...]) -> tuple[Any, ...]:
    result = []
    for arg in args:
        again = isinstance(arg, Tensor) and any(arg is other for other in result)
        result.append(arg.view_as(arg) if again else arg)
    return tuple(result)


def first_order(
    op: str | Callable[[Any], str], way_out: str = 'use impl="reference"'
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the backward of an op, which is not differentiable itself.

    What it computed would be a constant to autograd, and a penalty on gradients would add nothing:
    so it raises where autograd records the backward. PyTorch's `once_differentiable` raises later,
    and only where the upstream gradient itself needs one.

    Args:
        op: its name, or what tells it from ctx.
        way_out: what to do instead.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def checked(ctx: Any, *grads: Any) -> Any:
            # A graph's backward is traced with gradients enabled; that graph raises by itself.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                name = op if isinstance(op, str) else op(ctx)
                raise RuntimeError(
                    f"{name} has first derivatives only, got a backward that is to be "
                    f"differentiated again (create_graph=True); {way_out}"
                )
            return backward(ctx, *grads)

        return checked

    return decorate


def constant(tensor: Tensor) -> Tensor:
    """`tensor` without a gradient in backward(); in a transform it stays as it is.

    Forward-mode differentiation then has the true tangent.
    """
    return tensor.detach() if tensor.requires_grad and not in_transform() else tensor


library.define("keep(Tensor a) -> Tensor")


@torch.library.impl(library, "keep", "CompositeExplicitAutograd")
def _keep_any(a):
    return a.clone(memory_format=torch.contiguous_format)


@torch.library.register_fake("dblocks::keep", lib=library)
def _keep_fake(a):
    return a.new_empty(a.shape)


# A copy that Inductor cannot see through: it drops a clone.
keep = torch.ops.dblocks.keep.default


def kept(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The small `tensors` to save for backward, safe from changes in place by a compiled graph.

    Eager autograd notices such a change and raises; a graph would use the new values silently.
    """
    if not torch.compiler.is_compiling():
        return tensors
    return tuple(None if t is None else keep(t) for t in tensors)
