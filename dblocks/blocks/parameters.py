"""Checks that blocks do not share parameters of their layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn

from dblocks.blocks.model import BlockModel, Divisible
from dblocks.nn import Modulation

WEIGHTS = (nn.Linear, nn.modules.conv._ConvNd)


def check_apart(model: BlockModel, ranges: Sequence[tuple[int, int]]) -> None:
    """Raises if a step on one block would change parameters that another block uses.

    Args:
        model: the network.
        ranges: the layers [first, last) of each block.

    Raises:
        ValueError: a parameter is in the layers of two blocks, or both in a layer and outside the
            layers.
    """
    found: dict[int, tuple[int, str]] = {}
    for block, (first, last) in enumerate(ranges):
        for i in range(first, last):
            for path, parameter in _named(model, i):
                owner, other = found.setdefault(id(parameter), (block, path))
                if owner != block:
                    raise ValueError(
                        "the layers of different blocks must not share a parameter, since a step "
                        f"on one block would move the other, got one tensor as {other} in block "
                        f"{owner} and {path} in block {block}; untie them (copy.deepcopy one), or "
                        "put these layers into one block by layers_per_block="
                    )
    for path, parameter in _named_outside(model):
        if id(parameter) in found:
            owner, other = found[id(parameter)]
            raise ValueError(
                "a layer must not share a parameter with what all blocks use, since a step on its "
                f"block would move the others, got one tensor as {other} in block {owner} and "
                f"{path} outside the layers; untie them (copy.deepcopy one)"
            )


def warn_of_frozen_zeros(model: BlockModel, *, stacklevel: int) -> None:
    """Warns about frozen weights outside the layers that are all zero.

    No gradient passes an output head that is zero, so no layer would train. Modulations may be
    zero.
    """
    inside = {id(m) for m in model.layers.modules()}
    zero = [
        path
        for path, module in _modules_outside(model, inside)
        if isinstance(module, WEIGHTS) and _all_zero(module.weight)
    ]
    if zero:
        warnings.warn(
            "shared='frozen' keeps what is outside the layers as it is, which suits a trained "
            f"network, got weights that are all zero: {', '.join(zero)}; where this is the output "
            "head, no gradient passes it and nothing trains: load trained weights, or set "
            "shared='train'",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def _named(model: BlockModel, index: int) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a layer by their paths, including duplicates."""
    prefix, own = f"layers.{index}", ""
    if isinstance(model, Divisible):
        prefix, own = model.names[index], "layer."
    for name, parameter in model.layers[index].named_parameters(remove_duplicate=False):
        yield f"{prefix}.{name.removeprefix(own)}", parameter


def _named_outside(model: BlockModel) -> Iterator[tuple[str, nn.Parameter]]:
    inside = {id(m) for m in model.layers.modules()}
    for path, module in cast(nn.Module, model).named_modules():
        if id(module) not in inside:
            yield from module.named_parameters(path, recurse=False)


def _modules_outside(model: BlockModel, inside: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The modules outside the layers by their paths, without modulations."""
    pending = [("", cast(nn.Module, model))]
    while pending:
        path, module = pending.pop(0)
        if id(module) in inside or isinstance(module, Modulation):
            continue
        yield path, module
        pending += [(f"{path}.{n}".removeprefix("."), m) for n, m in module.named_children()]


def _all_zero(weight: object) -> bool:
    from torch._subclasses import FakeTensor

    if not isinstance(weight, nn.Parameter) or weight.is_meta or not weight.numel():
        return False
    return not isinstance(weight, FakeTensor) and not weight.detach().any().item()
