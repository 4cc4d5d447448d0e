"""Decides which tensors move with which block, which stay on the device, and which are refused."""

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
    """The parameters and buffers of a network by owner."""

    blocks: list[list[Named]]
    """Parameters and buffers of each block."""
    shared: list[Named]
    """Parameters and buffers that all blocks use."""


def owned(model: DiffusionBlocks) -> Owned:
    """Assigns the parameters and buffers of a network to blocks or to the shared part.

    Buffers inside a block's layers belong to the block.

    Raises:
        TypeError: a parameter is not a plain tensor.
        ValueError: a parameter is in no block and not shared, has no data, or shares memory with
            another.
    """
    count = model.config.num_blocks
    owner = {id(p): b for b in range(count) for p in model.block_parameters(b)}
    layers = [list(model.base_model.layers)[first:last] for first, last in model.layer_ranges]
    inside = {id(m): b for b, held in enumerate(layers) for lay in held for m in lay.modules()}
    stays = {id(p) for p in model.shared_parameters()}
    # All blocks use the same target embedding, though private networks hold a copy of it.
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
                        "each parameter of model must be in a block or shared by all blocks, "
                        f"got {named[0]} in neither; put it into a layer or into the network"
                    )
                places.setdefault(id(tensor), set()).add(block)
                first.setdefault(id(tensor), named)
    found = Owned([[] for _ in range(count)], [])
    for key, named in first.items():
        _check(named[0], named[2][named[3]])
        blocks = places[key]
        # A buffer that several blocks use stays on the device.
        block = blocks.pop() if len(blocks) == 1 else None
        (found.shared if block is None else found.blocks[block]).append(named)
    _check_apart(named for group in (*found.blocks, found.shared) for named in group)
    return found


def check_optimizers(optimizers: BlockOptimizers, blocks: list[set[int]], shared: set[int]) -> None:
    """Raises unless each optimizer has parameters of its block only and per-parameter state.

    Args:
        optimizers: the optimizers of the network.
        blocks: ids of the parameters of each block.
        shared: ids of the parameters that stay on the device.

    Raises:
        TypeError: an optimizer keeps one state for all parameters together.
        ValueError: the number of blocks or an optimizer's parameters differ.
    """
    if len(optimizers.blocks) != len(blocks):
        raise ValueError(
            f"optimizers must be those of {len(blocks)} blocks, got {len(optimizers.blocks)}; "
            "make them by make_optimizers(model, factory)"
        )
    for which, ids in (*enumerate(blocks), ("shared", shared)):
        held = optimizers.shared if which == "shared" else optimizers.blocks[cast(int, which)]
        for optimizer in several(held):
            if isinstance(optimizer, torch.optim.LBFGS):
                raise TypeError(
                    "an optimizer of a resident model must keep its state per parameter, got "
                    "LBFGS, which keeps one state for all; use another, or no residency"
                )
            if any(id(p) not in ids for group in optimizer.param_groups for p in group["params"]):
                part = "the shared parameters" if which == "shared" else f"block {which}"
                raise ValueError(
                    f"the optimizer of {part} must have parameters of {part} only, got others; "
                    "make it by make_optimizers(model, factory)"
                )


def several(held: Any) -> tuple[Optimizer, ...]:
    """Zero, one or several optimizers as a tuple."""
    return (held,) if isinstance(held, Optimizer) else tuple(held or ())


def held_items(named: Iterable[Named], expected: dict[str, int]) -> list[Item]:
    """The current parameters and buffers.

    Raises:
        RuntimeError: a parameter is not the object whose id `expected` has for its path.
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
    """The tensors of the optimizer state of parameters, except 0-d ones.

    Raises:
        TypeError: some are inside lists or dictionaries, or are not plain tensors.
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
                        "use another, or no residency"
                    )
                if isinstance(value, Tensor) and value.ndim:
                    items.append(State(f"{held.name} {i} {key}", values, key))
    return items


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value)


def _modules(model: nn.Module, layers: list[list[nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    """All modules by path, including those of layers that are not registered."""
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
            f"model must have data, got {path} without; load or initialise the weights first"
        )
    if not _is_plain(tensor):
        raise TypeError(
            "a resident model must hold plain strided tensors, "
            f"got {type(tensor).__name__} ({tensor.layout}) as {path}; do not shard or quantise it"
        )


def _check_apart(named: Iterable[Named]) -> None:
    """Raises if two tensors share memory, which a move would separate."""
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
                "the tensors of a resident model must not share memory, got "
                f"{one[3]} and {other[3]} in the same; clone one, or use one object for both"
            )
