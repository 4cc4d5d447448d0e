"""Registers an op with PyTorch: one schema and fake kernel, and an op for each implementation.

A CPU key cannot serve both the C++ op and the interpreted Triton kernel, so each has its own op;
the public function chooses.
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

    The C++ ops get their kernels from csrc/library.cpp. In plain eager mode, a Triton kernel is
    launched without PyTorch's dispatcher; an absent result is then None, and a tensor without
    elements from the op.

    Args:
        name: such as "adaln_fwd".
        schema: arguments and results, "(Tensor x) -> Tensor".
        fake: computes shapes and dtypes of the results.
        impls: the implementations of the op.
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

    It must import its kernels when it is called, so that `import dblocks` does not need triton. The
    op returns a tensor without elements for a result of None, with the dtype of argument number
    `like`.
    """

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def whole(*args: Any) -> Any:
            results = kernel(*args)
            if isinstance(results, Tensor):
                return results
            # A separate tensor for each absent result: an op may not return one tensor twice.
            return tuple(args[like].new_empty(0) if r is None else r for r in results)

        torch.library.impl(library, f"{name}_triton", "CompositeExplicitAutograd")(whole)
        _kernels[f"{name}_triton"] = kernel
        return kernel

    return register


# A copy that Inductor does not optimise away, as it does a clone.
library.define("keep(Tensor a) -> Tensor")


@torch.library.impl(library, "keep", "CompositeExplicitAutograd")
def _keep_any(a):
    return a.clone(memory_format=torch.contiguous_format)


@torch.library.register_fake("dblocks::keep", lib=library)
def _keep_fake(a):
    return a.new_empty(a.shape)
