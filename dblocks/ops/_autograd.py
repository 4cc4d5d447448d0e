"""What every op does around its `autograd.Function`: the call, and the end of differentiation."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from dblocks.ops import _common


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
    return tensor.detach() if tensor.requires_grad and not _common.in_transform() else tensor
