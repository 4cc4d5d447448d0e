"""Finds the lists of modules that may hold a model's residual layers, by library."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn

LISTS = (nn.ModuleList, nn.Sequential)
CLASS_NAMES = ("_repeated_blocks", "_no_split_modules")
"""Attributes of models of diffusers and transformers that name the classes of their layers."""

IsStack = Callable[[str, Sequence[nn.Module]], bool]


class Stack(NamedTuple):
    """A list of modules, its path, and its members by their fully qualified names."""

    path: str
    layers: dict[str, nn.Module]

    def __str__(self) -> str:
        kinds = dict.fromkeys(type(layer).__name__ for layer in self.layers.values())
        return f"{self.path or 'the model itself'} ({len(self.layers)} {' and '.join(kinds)})"


def candidates(model: nn.Module) -> list[Stack]:
    """The stacks by the first signal that finds any; see `find_layers`."""
    signals = (_checkpointed, _named_by_class, _grouped, _homogeneous)
    return next(filter(None, (signal(model) for signal in signals)), [])


def stages(stack: Stack) -> list[Stack]:
    """The stacks inside a stack's members; the members themselves if there are none."""
    return [s for path, m in stack.layers.items() for s in _stacks(m, _is_alone, path)] or [
        Stack(path, {path: member}) for path, member in stack.layers.items()
    ]


def alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether at least half of the parameters that both have, by name, have the same shape.

    Layers of one stack may differ in part: a last layer with fewer outputs, experts in some.
    """
    shapes = {name: p.shape for name, p in one.named_parameters()}
    equal = [shapes[name] == p.shape for name, p in other.named_parameters() if name in shapes]
    return 2 * sum(equal) >= len(equal)


def join(*names: str) -> str:
    """The path of these names; empty ones are skipped."""
    return ".".join(filter(None, names))


def members(stack: nn.Module, path: str) -> dict[str, nn.Module]:
    """The members of a list by path, with repetitions."""
    return {join(path, name): m for name, m in stack._modules.items() if m is not None}


def _checkpointed(model: nn.Module) -> list[Stack]:
    # Only models of transformers have such layers, and they load this module.
    module = sys.modules.get("transformers.modeling_layers")
    kind = getattr(module, "GradientCheckpointingLayer", ())
    return list(_stacks(model, lambda _, layers: all(isinstance(m, kind) for m in layers)))


def _named_by_class(model: nn.Module) -> list[Stack]:
    for attribute in CLASS_NAMES:
        names = {n for m in model.modules() for n in getattr(m, attribute, None) or ()}
        if found := list(_stacks(model, _all_in(names))):
            return found
    return []


def _all_in(names: set[str]) -> IsStack:
    return lambda _, layers: all(type(m).__name__ in names for m in layers)


def _grouped(model: nn.Module) -> list[Stack]:
    for prefix, module in model.named_modules():
        matcher = getattr(module, "group_matcher", None)
        groups = matcher(coarse=False) if callable(matcher) else None
        # In a few models this is a function, which does not tell stems and heads from layers.
        if isinstance(groups, dict) and (
            found := list(_stacks(module, _all_match(groups), prefix))
        ):
            return found
    return []


def _all_match(groups: dict[str, Any]) -> IsStack:
    """Whether every member is a whole layer by the patterns of a `group_matcher`."""
    patterns: list[str] = []
    for name, spec in groups.items():
        if name != "stem":
            patterns += [spec] if isinstance(spec, str) else [pattern for pattern, *_ in spec or ()]

    def is_stack(path: str, layers: Sequence[nn.Module]) -> bool:
        names = [join(path, str(i)) for i in range(len(layers))]
        return all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in names)

    return is_stack


def _homogeneous(model: nn.Module) -> list[Stack]:
    return list(_stacks(model, lambda path, layers: len(layers) > 1 and _is_alone(path, layers)))


def _is_alone(_: str, layers: Sequence[nn.Module]) -> bool:
    """Whether the members have one class and parameters, and are not plain layers of torch."""
    kind = type(layers[0])
    if any(type(m) is not kind or next(m.parameters(), None) is None for m in layers):
        return False
    return not kind.__module__.startswith("torch.nn.") or any(layers[0].children())


def _stacks(module: nn.Module, is_stack: IsStack, prefix: str = "") -> Iterator[Stack]:
    """The outermost lists that `is_stack` accepts, which gets their paths within `module`."""
    pending = [("", module)]
    while pending:
        path, here = pending.pop()
        if isinstance(here, LISTS) and len(here) and is_stack(path, list(here)):
            yield Stack(join(prefix, path), members(here, join(prefix, path)))
        else:
            children = [(join(path, name), child) for name, child in here.named_children()]
            pending += reversed(children)
