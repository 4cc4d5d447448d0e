"""Registers an op with PyTorch: one schema and fake kernel, and an op for each implementation.

A CPU key cannot serve both the C++ op and the interpreted Triton kernel, so each has its own op;
the public function chooses.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dblocks.ops import _flops
from dblocks.ops._dispatch import caller, planned

library = torch.library.Library("dblocks", "FRAGMENT")


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    **implementations: Callable[..., Any] | str | None,
) -> dict[str, Callable[..., Any]]:
    """Defines `dblocks::<name>_<impl>` for each implementation, and returns what to call for each.

    In plain eager mode, a function is called without PyTorch's dispatcher; an absent result is then
    None, and from the op a tensor without elements.

    Args:
        name: such as "adaln_fwd".
        schema: arguments and results, "(Tensor x) -> Tensor".
        fake: computes shapes and dtypes of the results.
        implementations: by name, a function of the op's arguments; or a module of dblocks.kernels
            whose function `name` plans its launches (see `planned`; a SymInt is no part of a
            layout), imported when it is first called; or None for C++, whose function
            csrc/library.cpp registers.
    """
    calls, flops = {}, _flops.FORMULAS.get(name)
    for impl, given in implementations.items():
        library.define(f"{name}_{impl}{schema}")
        torch.library.register_fake(f"dblocks::{name}_{impl}", fake, lib=library)
        # autograd.Function takes care of gradients; PyTorch's check of ops without any costs 3 us.
        library.impl(f"{name}_{impl}", torch.library.fallthrough_kernel, "Autograd")
        op = getattr(torch.ops.dblocks, f"{name}_{impl}").default
        if flops is not None:
            _flops.register(op, flops)
        function = _planned(given, name, schema) if isinstance(given, str) else given
        if function is not None:
            key = "CompositeExplicitAutograd"  # on GPUs and, interpreted, on CPUs
            library.impl(f"{name}_{impl}", _whole(op, function), key)
        calls[impl] = op if function is None and flops is None else caller(op, function)
    return calls


def _planned(module: str, name: str, schema: str) -> Callable[..., Any]:
    """An op planned by a function of dblocks.kernels, which is imported when it is first needed."""

    def make(*args: Any) -> Any:
        return getattr(importlib.import_module(f"dblocks.kernels.{module}"), name)(*args)

    arguments = schema.partition("->")[0].split(",")
    return planned(make, [i for i, argument in enumerate(arguments) if "SymInt" in argument])


def _whole(op: torch._ops.OpOverload, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with a tensor without elements in the place of an absent result.

    It has the dtype of the first argument that is always a tensor.
    """
    kinds = [str(argument.type) for argument in op._schema.arguments]
    like = kinds.index("Tensor")

    def whole(*args: Any) -> Any:
        results = function(*args)
        if isinstance(results, Tensor):
            return results
        # A separate tensor for each absent result: an op may not return one tensor twice.
        return tuple(args[like].new_empty(0) if r is None else r for r in results)

    return whole


# A copy that Inductor does not optimise away, as it does a clone.
library.define("keep(Tensor a) -> Tensor")


@torch.library.impl(library, "keep", "CompositeExplicitAutograd")
def _keep_any(a):
    return a.clone(memory_format=torch.contiguous_format)


@torch.library.register_fake("dblocks::keep", lib=library)
def _keep_fake(a):
    return a.new_empty(a.shape)
