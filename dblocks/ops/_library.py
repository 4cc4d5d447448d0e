"""Registers an op with PyTorch: one schema and fake kernel, and an op for each implementation.

A CPU key cannot serve both the C++ op and the interpreted Triton kernel, so each has its own op;
the public function picks.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dblocks.ops import _flops
from dblocks.ops._dispatch import FUSED, picker

library = torch.library.Library("dblocks", "FRAGMENT")

_kernels: dict[str, Callable[..., Any]] = {}


def define(
    name: str, schema: str, fake: Callable[..., Any], impls: Sequence[str] = FUSED
) -> dict[str, Callable[..., Callable[[], Any]]]:
    """Defines `dblocks::<name>_<impl>` for each fused implementation.

    Returns for each a function from arguments to the call, which the op's own file makes: calls go
    one way.

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
        bare = kernel is None and flops is None
        calls[impl] = partial(partial, op) if bare else picker(op, kernel)
    return calls


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


# A copy that Inductor cannot see through: it drops a clone.
library.define("keep(Tensor a) -> Tensor")


@torch.library.impl(library, "keep", "CompositeExplicitAutograd")
def _keep_any(a):
    return a.clone(memory_format=torch.contiguous_format)


@torch.library.register_fake("dblocks::keep", lib=library)
def _keep_fake(a):
    return a.new_empty(a.shape)
