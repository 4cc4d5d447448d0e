"""Registers an op with PyTorch: one schema and fake kernel, and an op for each implementation.

A CPU key cannot serve both the C++ op and the interpreted Triton kernel, so each has its own op;
the public function picks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

FUSED = ("triton", "cpp")

library = torch.library.Library("dblocks", "FRAGMENT")


def define(
    name: str, schema: str, fake: Callable[..., Any], impls: Sequence[str] = FUSED
) -> dict[str, Any]:
    """Defines `dblocks::<name>_<impl>` for each fused implementation; returns the ops by it.

    The C++ ops get their kernels from csrc/library.cpp.

    Args:
        name: such as "adaln_fwd".
        schema: arguments and results, "(Tensor x) -> Tensor".
        fake: computes shapes and dtypes of the results.
        impls: those that the op has.
    """
    for impl in impls:
        library.define(f"{name}_{impl}{schema}")
        torch.library.register_fake(f"dblocks::{name}_{impl}", fake, lib=library)
        # autograd.Function takes care of gradients; PyTorch's check of ops without any costs 3 us.
        library.impl(f"{name}_{impl}", torch.library.fallthrough_kernel, "Autograd")
    return {impl: getattr(torch.ops.dblocks, f"{name}_{impl}").default for impl in impls}


def triton_kernel(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function the Triton implementation of the op `name`, on GPUs and, interpreted, CPUs.

    It imports its kernels when it is called, so that `import dblocks` needs no triton.
    """
    return torch.library.impl(library, f"{name}_triton", "CompositeExplicitAutograd")
