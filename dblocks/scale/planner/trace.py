"""Traces what a forward pass saves for the backward, on real or fake tensors.

The parts of a pass are the layers, what runs before them, and what runs after them. In networks
without data, identical layers run only once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

BEFORE, AFTER = -1, -2
ENTRIES = ("forward", "doubled")  # the methods with which a network runs a layer
ORDER = re.compile(r"(layer|block)?_?(idx|id|index|number)$")  # attributes that distinguish layers


@dataclass
class Part:
    """One part of a forward pass."""

    events: list[tuple[int, int]] = field(default_factory=list)
    """In order: bytes saved, and bytes of gradients that the backward allocates at this point."""
    flops: int = 0
    """Floating-point operations of the forward pass."""
    inputs: int = 0
    """Bytes of the layer's input, which gradient checkpointing keeps."""
    kept: int = 0
    """Bytes of the input that the layer itself saves."""
    calls: int = 0
    """Number of calls of the layer; 0 if the part is not a layer."""

    @cached_property
    def saved(self) -> int:
        """Bytes saved for the backward."""
        return sum(saved for saved, _ in self.events)

    @cached_property
    def gradients(self) -> int:
        """Bytes of gradients."""
        return sum(gradient for _, gradient in self.events)

    @cached_property
    def highest(self) -> int:
        """The peak memory of the backward of this part, relative to its start."""
        memory = highest = 0
        for saved, gradient in reversed(self.events):
            memory += gradient
            highest = max(highest, memory)
            memory -= saved
        return highest


@dataclass
class Trace:
    """A forward pass of all layers, part by part."""

    before: Part
    layers: list[Part]
    """Layers that are followed by another one in their block."""
    last: list[Part]
    """Layers that are the last of their block, which may compute less."""
    after: Part

    def parts(self, first: int, end: int) -> list[Part]:
        """The forward pass of a block with the layers first..end-1."""
        return [self.before, *self.layers[first : end - 1], self.last[end - 1], self.after]

    def saved(self, first: int, end: int) -> int:
        """Bytes that a block's forward pass saves for the backward."""
        return sum(part.saved for part in self.parts(first, end))


def saved_bytes(function: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd saves while `function` runs: each storage once, without parameters.

    Args:
        function: runs a forward pass, on real or fake tensors, and returns its loss.
        parameters: parameters, which are not counted.
    """
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # kept alive, so that no address is used twice
    excluded = {_storage(p) for p in parameters}

    def pack(tensor: Tensor) -> Tensor:
        if (key := _storage(tensor)) not in excluded:
            sizes[key] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(function())
    return sum(sizes.values())


def trace(
    function: Callable[[], Tensor],
    model: nn.Module,
    layers: Sequence[nn.Module],
    *,
    once: bool = False,
) -> Trace:
    """The parts of a forward pass.

    Args:
        function: runs the forward pass and returns the loss.
        model: the network; a gradient is counted for each trained parameter.
        layers: the layers that it calls one after the other.
        once: run identical layers only once and copy the trace for the others, whose outputs are
            then not computed; for networks without data.
    """
    recorder = _Recorder(model, layers)
    same = _alike(layers) if once else list(range(len(layers)))
    with recorder.entering(same):
        kept = function()
    recorder.finish()
    del kept
    parts = recorder.parts
    inner = [parts[i] for i in same]
    # If the last layer computes less than others like it, so does any layer that is last.
    kinds = _alike(layers)
    like_last = next((i for i, k in enumerate(kinds) if k == kinds[-1]), len(layers) - 1)
    own_last = parts[len(layers) - 1]
    last = list(inner)
    if like_last < len(layers) - 1 and own_last.events != parts[same[like_last]].events:
        inner[-1] = parts[same[like_last]]
        last = [own_last if k == kinds[-1] else inner[i] for i, k in enumerate(kinds)]
    return Trace(parts[BEFORE], inner, last, parts[AFTER])


class _Recorder:
    """Records what is saved in which part of the forward pass."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.parts = {i: Part() for i in (BEFORE, AFTER, *range(len(layers)))}
        self.parameters = {_storage(p): p for p in model.parameters()}
        self.current = BEFORE
        self.made: dict[int, int] = {}  # storage -> the part in which it was made
        self.kept: list[Tensor] = []
        self.saved: dict[int, tuple[int, int]] = {}  # storage -> its part and event
        self.used: dict[int, tuple[int, int]] = {}  # parameter's storage -> its last use
        self.hidden: set[int] = set()
        self.outputs: Any = None

    @contextmanager
    def entering(self, same: Sequence[int]) -> Iterator[None]:
        """Records saved tensors and the running layer inside the `with` block."""
        for i, layer in enumerate(self.layers):
            for name in ENTRIES:
                if hasattr(layer, name):
                    # In the instance's __dict__: nn.Module's own setattr may register a child.
                    vars(layer)[name] = self._entry(i, getattr(layer, name), same[i] == i)
        try:
            with saved_tensors_hooks(self._pack, lambda tensor: tensor), _Watch(self):
                yield
        finally:
            for layer in self.layers:
                for name in ENTRIES:
                    vars(layer).pop(name, None)

    def finish(self) -> None:
        """Adds the gradients at the points where the backward allocates them."""
        owner = {id(p): i for i, layer in enumerate(self.layers) for p in layer.parameters()}
        uses: dict[tuple[int, int], int] = {}
        unused: dict[int, int] = {}
        for key, parameter in self.parameters.items():
            if not parameter.requires_grad:
                continue
            part = owner.get(id(parameter), BEFORE)
            if key in self.used:
                uses[self.used[key]] = parameter.nbytes
            else:
                # No operation saved it, like an embedding's weight: the backward reaches it last.
                unused[part] = unused.get(part, 0) + parameter.nbytes
        for i, part in self.parts.items():
            placed = [(s, g + uses.get((i, n), 0)) for n, (s, g) in enumerate(part.events)]
            part.events = [(0, unused[i]), *placed] if i in unused else placed

    def _entry(self, index: int, method: Callable[..., Any], runs: bool) -> Callable[..., Any]:
        def entered(*args: Any, **kwargs: Any) -> Any:
            outer, self.current = self.current, index
            hidden = _hidden(args, kwargs, method.__name__)
            self.hidden = {_storage(x) for x in hidden}
            if torch.is_grad_enabled():
                self.parts[index].inputs += sum(x.untyped_storage().nbytes() for x in hidden)
                self.parts[index].calls += 1
            try:
                # The last layer always runs, as it may compute less than others like it.
                if runs or index == len(self.layers) - 1:
                    self.outputs = method(*args, **kwargs)
                    return self.outputs
                fresh = iter([x.clone() for x in hidden])
                return tree_map(lambda x: _replaced(x, fresh), self.outputs)
            finally:
                self.current = AFTER if outer in (BEFORE, AFTER) else outer

        return entered

    def _pack(self, tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        part = self.current
        if key in self.parameters:
            self.used[key] = part, len(self.parts[part].events)
            self.parts[part].events.append((0, 0))
            return tensor
        if key not in self.saved:
            self.kept.append(tensor)
            # Tensors that layers share, such as positions, count for every block.
            if part >= 0 and self.made.get(key, BEFORE) == BEFORE and key not in self.hidden:
                part = BEFORE
            size = tensor.untyped_storage().nbytes()
            self.saved[key] = part, len(self.parts[part].events)
            self.parts[part].events.append((size, 0))
            if part >= 0 and key in self.hidden:
                self.parts[part].kept += size
        return tensor


class _Watch(TorchDispatchMode):
    """Counts floating-point operations, and records in which part each tensor is created."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        from torch.utils import flop_counter

        from dblocks.ops import _flops

        _flops.watch()
        self.recorder, self.formulas = recorder, flop_counter.flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        recorder = self.recorder
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            recorder.parts[recorder.current].flops += formula(*args, **(kwargs or {}), out_val=out)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := _storage(x)) not in recorder.made:
                recorder.made[key] = recorder.current
                recorder.kept.append(x)
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any], method: str) -> list[Tensor]:
    """The input rows of a layer: clean and noisy ones, if they are separate tensors."""
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    return given[: 2 if method == "doubled" else 1]


def _replaced(x: Any, fresh: Iterator[Tensor]) -> Any:
    return next(fresh, x) if isinstance(x, Tensor) else x


def _alike(layers: Sequence[nn.Module]) -> list[int]:
    """For each layer, the index of the first identical one."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(_signature(layer), i) for i, layer in enumerate(layers)]


def _signature(layer: nn.Module) -> Hashable:
    tensors = [
        (name, x.shape, x.dtype, x.requires_grad)
        for name, x in (*layer.named_parameters(), *layer.named_buffers())
    ]
    settings = [
        (path, type(module), tuple(_settings(module))) for path, module in layer.named_modules()
    ]
    return tuple(tensors), tuple(settings)


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if isinstance(value, (bool, int, float, str)) and not ORDER.fullmatch(name):
            yield name, value
