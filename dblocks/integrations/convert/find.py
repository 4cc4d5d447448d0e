"""Finds the residual layers of a model."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from torch import nn

from dblocks.integrations.convert.stacks import LISTS, Stack, alike, candidates, members, stages

Layers: TypeAlias = str | Sequence[str] | Callable[[nn.Module], Iterable[nn.Module]]
LISTED = 12
"""How many names an error lists."""


def find_layers(model: nn.Module, layers: Layers | None = None) -> dict[str, nn.Module]:
    """The residual layers of a model, first to last, by their fully qualified names.

    Without `layers`, the first of these signals that gives a list of layers is used:

    1. transformers: the layers subclass its `GradientCheckpointingLayer`;
    2. diffusers, transformers: `_repeated_blocks`, then `_no_split_modules`, name their classes;
    3. timm: `group_matcher` says which names make one layer;
    4. any model: an `nn.ModuleList` or `nn.Sequential` of at least two modules of one class, which
       have parameters and are no plain layers of torch, outside of another such list.

    These look at names, classes and shapes of parameters; `check_residual` runs the model.

    Args:
        model: any module; it is not changed.
        layers: the path of an `nn.ModuleList` or `nn.Sequential`, such as "transformer.h"; or the
            paths of the layers, or of several such lists, one after the other; or a function from
            the model to those of its modules. It overrides all signals.

    Raises:
        ValueError: no list is found, or several, or one whose shapes change (the error lists the
            candidates); or `layers` are not distinct modules of the model.
        TypeError: `layers` is something else.
    """
    if layers is None:
        return _distinct(_only(model, candidates(model)).items())
    if isinstance(layers, nn.Module) or not (callable(layers) or isinstance(layers, Sequence)):
        raise TypeError(
            "layers must be a path, a sequence of paths, or a function from the model to its "
            f"layers, got a {type(layers).__name__}; in place of a module pass its path"
        )
    return _distinct(_returned(model, layers) if callable(layers) else _at(model, layers))


def _only(model: nn.Module, stacks: Sequence[Stack]) -> dict[str, nn.Module]:
    name = type(model).__name__
    if not stacks:
        children = _listed(f"{n} ({type(child).__name__})" for n, child in model.named_children())
        raise ValueError(
            f"{name} must have one list of residual layers, but none was found among its children "
            f"{children or '(it has none)'}; pass layers= with the path of an nn.ModuleList, the "
            "paths of the layers, or a function of the model"
        )
    if len(stacks) == 1:
        first, *others = stacks[0].layers.values()
        if all(alike(first, other) for other in others):
            return stacks[0].layers
        stacks = stages(stacks[0])
    pairs = itertools.combinations((next(iter(stack.layers.values())) for stack in stacks), 2)
    changing = any(type(one) is type(other) and not alike(one, other) for one, other in pairs)
    note = ", whose shapes differ: a hidden state must keep its shape" if changing else ""
    raise ValueError(
        f"{name} must have one list of residual layers, but it has {len(stacks)}: "
        f"{_listed(map(str, stacks))}{note}; pass layers= with the one to divide into blocks, "
        f"such as layers={stacks[0].path!r}"
    )


def _at(model: nn.Module, layers: str | Sequence[str]) -> Iterable[tuple[str, nn.Module]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = [layers] if isinstance(layers, str) else layers
    for path in paths:
        if not isinstance(path, str):
            raise TypeError(f"layers must be paths of modules, got a {type(path).__name__}")
        if path not in modules:
            near = _listed(difflib.get_close_matches(path, modules, n=3))
            raise ValueError(
                f"layers must name modules of {type(model).__name__}, got {path!r}; "
                + (f"near names: {near}" if near else "see model.named_modules()")
            )
    if not isinstance(layers, str):
        # A list of modules cannot be called, so its members are the layers.
        return [pair for path in paths for pair in _layers_at(modules[path], path)]
    if not isinstance(modules[layers], LISTS):
        raise ValueError(
            f"layers must be the path of an nn.ModuleList or nn.Sequential, got {layers!r}, "
            f"a {type(modules[layers]).__name__}; pass single layers as a sequence of paths"
        )
    return members(modules[layers], layers).items()


def _layers_at(module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
    if isinstance(module, nn.ModuleList):
        return members(module, path).items()
    return [(path, module)]


def _returned(
    model: nn.Module, function: Callable[[nn.Module], Iterable[nn.Module]]
) -> Iterable[tuple[str, nn.Module]]:
    returned = function(model)
    if not isinstance(returned, Iterable):
        raise TypeError(f"layers(model) must return several modules, got {type(returned).__name__}")
    found = list(returned)
    names = {id(module): name for name, module in model.named_modules()}
    for layer in found:
        if id(layer) not in names:
            raise ValueError(
                f"layers(model) must return modules of the {type(model).__name__} that it is "
                f"given, got a {type(layer).__name__} that is not part of it"
            )
    return [(names[id(layer)], layer) for layer in found]


def _distinct(layers: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    names: dict[int, str] = {}
    pairs = list(layers)
    for name, layer in pairs:
        if id(layer) in names:
            raise ValueError(
                "layers must be distinct modules, since each block trains its own, "
                f"got one module as {names[id(layer)]} and {name}"
            )
        names[id(layer)] = name
    for name, layer in pairs:
        inner = [names[id(m)] for m in layer.modules() if m is not layer and id(m) in names]
        if inner:
            raise ValueError(f"layers must not contain each other, got {inner[0]} within {name}")
    if not pairs:
        raise ValueError("layers must be at least one module, got none")
    return dict(pairs)


def _listed(names: Iterable[str]) -> str:
    words = list(names)
    more = f" and {len(words) - LISTED} more" if len(words) > LISTED else ""
    return ", ".join(words[:LISTED]) + more
