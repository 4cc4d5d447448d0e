"""Counts the memory of training: activations saved for the backward, and training state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dblocks.blocks.sharding import part_here


class SavedActivations:
    """Counts the bytes that autograd saves for the backward inside the `with` block.

    Each storage counts once and whole, whatever the number of its views; parameters do not count.
    The block should hold one forward pass and keep its result, since a storage that is freed and
    reused inside it counts once.

    Args:
        parameters: parameters, which are not counted: `model.parameters()`.
        within: count only what is saved while one of these modules runs, such as `model.layers`.
    """

    def __init__(
        self, parameters: Iterable[Tensor] = (), within: Iterable[nn.Module] | None = None
    ) -> None:
        self._excluded = {_storage(p) for p in parameters}
        self._within = None if within is None else list(within)
        self._sizes: dict[tuple[torch.device, int], int] = {}
        self._hooks: saved_tensors_hooks | None = None
        self._handles: list[RemovableHandle] = []
        self._running = 0

    @property
    def bytes(self) -> int:
        """The bytes counted so far."""
        return sum(self._sizes.values())

    def __enter__(self) -> SavedActivations:
        for module in self._within or ():
            self._handles.append(module.register_forward_pre_hook(self._enter_module))
            leave = module.register_forward_hook(self._leave_module, always_call=True)
            self._handles.append(leave)
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if (self._within is None or self._running) and key not in self._excluded:
            self._sizes[key] = tensor.untyped_storage().nbytes()
        return tensor

    def _enter_module(self, *_: object) -> None:
        self._running += 1

    def _leave_module(self, *_: object) -> None:
        self._running -= 1


def state_bytes(parameters: Iterable[Tensor], optimizer: Optimizer | None = None) -> int:
    """Bytes of parameters, of the gradients that they hold, and of optimizer state held for them.

    For sharded tensors, the bytes on this process.

    Args:
        parameters: what to count.
        optimizer: an optimizer whose state for `parameters` is counted too.
    """
    total = 0
    for parameter in parameters:
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        held = [parameter, *_tensors(state.values())]
        if parameter.grad is not None:
            held.append(parameter.grad)
        total += sum(part_here(tensor).nbytes for tensor in held)
    return total


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, part_here(tensor).untyped_storage().data_ptr()


def _tensors(values: Iterable[object]) -> Iterator[Tensor]:
    yield from (value for value in values if isinstance(value, Tensor))
