"""Which tensors travel with which block, which stay on the device, and which cannot do either."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dblocks.blocks import BlockOptimizers, DiffusionBlocks
from dblocks.scale.layout import Held, Item, State

Named = tuple[str, nn.Module, dict[str, Any], str]  # the path, the module, its dictionary, the key


class Owned(NamedTuple):
    """The parameters and buffers of a network by what they belong to."""

    blocks: list[list[Named]]
    """Of each block."""
    shared: list[Named]
    """Of all."""


def owned(model: DiffusionBlocks) -> Owned:
    """Whose the parameters and buffers of a network are; buffers are a block's inside its layers.

    Raises:
        TypeError: a parameter is no plain tensor.
        ValueError: a parameter is in no block and not shared, or has no data, or lies in the memory
            of another.
    """
    count = model.config.num_blocks
    owner = {id(p): b for b in range(count) for p in model.block_parameters(b)}
    layers = [list(model.base_model.layers)[first:last] for first, last in model.layer_ranges]
    inside = {id(m): b for b, held in enumerate(layers) for lay in held for m in lay.modules()}
    stays = {id(p) for p in model.shared_parameters()}
    # The target embedding is common to all blocks, though a private network holds a copy of it.
    stays |= {id(p) for copied in model.copies for p in cast(Any, copied).target.parameters()}
    places: dict[int, set[int | None]] = {}
    first: dict[int, Named] = {}
    for path, module in _modules(model, layers):
        for values in (module._parameters, module._buffers):
            for name, tensor in values.items():
                if tensor is None:
                    continue
                named = (f"{path}.{name}".removeprefix("."), module, values, name)
                parameter = values is module._parameters
                block = owner.get(id(tensor)) if parameter else inside.get(id(module))
                if parameter and block is None and id(tensor) not in stays:
                    raise ValueError(
                        "model must have each parameter in a block or among what all blocks use, "
                        f"got {named[0]} in neither; put it into a layer or into the network"
                    )
                places.setdefault(id(tensor), set()).add(block)
                first.setdefault(id(tensor), named)
    found = Owned([[] for _ in range(count)], [])
    for key, named in first.items():
        _check(named[0], named[2][named[3]])
        blocks = places[key]
        # A buffer of several blocks stays.
        block = blocks.pop() if len(blocks) == 1 else None
        (found.shared if block is None else found.blocks[block]).append(named)
    _check_apart(named for group in (*found.blocks, found.shared) for named in group)
    return found


def check_optimizers(optimizers: BlockOptimizers, blocks: list[set[int]], shared: set[int]) -> None:
    """Raises unless each optimizer has parameters of its block only, and keeps plain state.

    Args:
        optimizers: those of the network.
        blocks: the ids of the parameters of each block.
        shared: of those that stay on the device.

    Raises:
        TypeError: one is of a kind whose state belongs to all parameters together.
        ValueError: the number of blocks or an optimizer's parameters differ.
    """
    if len(optimizers.blocks) != len(blocks):
        raise ValueError(
            f"optimizers must be of {len(blocks)} blocks, got {len(optimizers.blocks)}; "
            "make them by make_optimizers(model, factory)"
        )
    for which, ids in (*enumerate(blocks), ("shared", shared)):
        held = optimizers.shared if which == "shared" else optimizers.blocks[cast(int, which)]
        for optimizer in several(held):
            if isinstance(optimizer, torch.optim.LBFGS):
                raise TypeError(
                    "an optimizer of a resident model must keep its state for each parameter, got "
                    "LBFGS, which keeps one for all; take another, or no residency"
                )
            if any(id(p) not in ids for group in optimizer.param_groups for p in group["params"]):
                part = "what blocks share" if which == "shared" else f"block {which}"
                raise ValueError(
                    f"the optimizer of {part} must have parameters of {part} only, got others; "
                    "make it by make_optimizers(model, factory)"
                )


def several(held: Any) -> tuple[Optimizer, ...]:
    """Optimizers, of which there may be none or one."""
    return (held,) if isinstance(held, Optimizer) else tuple(held or ())


def held_items(named: Iterable[Named], expected: dict[str, int]) -> list[Item]:
    """Parameters and buffers as they are now.

    Raises:
        RuntimeError: a parameter is another object than `expected`, ids by path, says.
    """
    items: list[Item] = []
    for path, _, values, name in named:
        tensor = values.get(name)
        if tensor is None or id(tensor) != expected.get(path, id(tensor)):
            raise RuntimeError(
                f"a resident model must keep its parameters, got another one as {path}, which its "
                "optimizer does not know; call close() before you replace it"
            )
        items.append(Held(path, tensor))
    return items


def state_items(optimizers: Iterable[Optimizer], parameters: Iterable[Item]) -> list[Item]:
    """The tensors of optimizer state held for parameters, without those that are 0-d.

    Raises:
        TypeError: some are inside lists or dictionaries, or no plain tensors.
    """
    items: list[Item] = []
    optimizers = tuple(optimizers)
    for held in parameters:
        parameter = cast(Held, held).tensor
        for i, optimizer in enumerate(optimizers):
            values = optimizer.state.get(parameter) or {}
            for key, value in values.items():
                if _holds_tensors(value) or (isinstance(value, Tensor) and not _is_plain(value)):
                    raise TypeError(
                        "an optimizer of a resident model must keep plain tensors in its state, "
                        f"got {type(value).__name__} as {key!r} of {type(optimizer).__name__}; "
                        "take another, or no residency"
                    )
                if isinstance(value, Tensor) and value.ndim:
                    items.append(State(f"{held.name} {i} {key}", values, key))
    return items


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value)


def _modules(model: nn.Module, layers: list[list[nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """All modules by their paths, those of layers that are registered nowhere too."""
    seen: set[int] = set()
    flat = [layer for held in layers for layer in held]
    roots = [("", model), *((f"layers.{i}", layer) for i, layer in enumerate(flat))]
    for prefix, root in roots:
        for path, module in root.named_modules(prefix=prefix):
            if id(module) not in seen:
                seen.add(id(module))
                yield path, module


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor.detach()) is Tensor and tensor.layout == torch.strided


def _check(path: str, tensor: Tensor) -> None:
    if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
        raise ValueError(
            f"model must have its data, got {path} without; load or initialise the weights first"
        )
    if not _is_plain(tensor):
        raise TypeError(
            "a resident model must hold plain strided tensors, "
            f"got {type(tensor).__name__} ({tensor.layout}) as {path}; do not shard or quantise it"
        )


def _check_apart(named: Iterable[Named]) -> None:
    """Raises where two tensors lie in the same memory, which would part when they travel."""
    spans = []
    for path, _, values, name in named:
        tensor = values[name]
        if tensor.numel():
            first = tensor.data_ptr()
            steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((str(tensor.device), first, first + (steps + 1) * tensor.itemsize, path))
    spans.sort()
    for one, other in pairwise(spans):
        if one[0] == other[0] and other[1] < one[2]:
            raise ValueError(
                "the tensors of a resident model must lie in memory of their own, got "
                f"{one[3]} and {other[3]} in the same; make one a clone, or one object of both"
            )
