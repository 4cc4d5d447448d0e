"""Keeps private copies of a model's modules up to date with later changes of the model.

With `shared="private"` or "reduce", each block but the first has a copy of the modules outside the
layers. Modes, freezing, dtypes and devices that are set on the model afterwards are meant for all
blocks; what cannot be taken over is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import ref

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from dblocks.blocks.changes import is_sharded
from dblocks.blocks.sharding import is_part

if TYPE_CHECKING:
    from dblocks.integrations.convert.network import Converted

# Modes of modules; "p" is the rate of an nn.Dropout.
MODES = ("training", "gradient_checkpointing", "grad_checkpointing")
# What dynamic rotary positions note of the longest text that they have met.
NOTES = ("seq_len_cached",)


class State(NamedTuple):
    """What a copy takes over from a module and its own parameters and buffers."""

    modes: dict[str, Any]
    tensors: dict[str, tuple[bool, torch.dtype, torch.device]]


class Original:
    """The model of which a copy was made, and what was last taken over from it.

    Args:
        network: the converted model.
    """

    def __init__(self, network: Converted) -> None:
        self.network = ref(network)
        self.states = {name: _state(module) for name, module in _outside(network)}

    def followed_by(self, copied: Converted, *, moved: bool) -> None:
        """Takes over in a copy what was changed in the original since the last call.

        Raises:
            ValueError: a number, bool or string of a module was changed, which is not taken over.
        """
        network = self.network()
        if network is None:
            return
        copies = dict(_outside(copied))
        for name, module in _outside(network):
            if name in copies:
                _check_numbers(name, module, copies[name])
        for name, module in _outside(network):
            before, now = self.states.get(name), _state(module)
            if name in copies and before is not None and before != now:
                _take_over(copies[name], before, now, moved=moved)
            self.states[name] = now


def _outside(network: Converted) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model outside its layers, by name."""
    # The attribute itself: `network.model` would call the network, whose step calls this.
    pending = [("", cast(nn.Module, network._modules["model"]))]
    layers = set(network.names)
    while pending:
        name, module = pending.pop()
        yield name, module
        for child_name, child in module._modules.items():
            path = f"{name}.{child_name}" if name else child_name
            if child is not None and path not in layers:
                pending.append((path, child))


def _state(module: nn.Module) -> State:
    own = vars(module)
    modes = {name: own[name] for name in _modes(module) if name in own}
    held = {**module._parameters, **module._buffers}
    if is_sharded(module):
        held = {}
    return State(
        modes,
        {n: (t.requires_grad, t.dtype, t.device) for n, t in held.items() if t is not None},
    )


def _modes(module: nn.Module) -> tuple[str, ...]:
    return (*MODES, "p") if isinstance(module, _DropoutNd) else MODES


def _take_over(copied: nn.Module, before: State, now: State, *, moved: bool) -> None:
    for name, value in now.modes.items():
        if before.modes.get(name) != value:
            setattr(copied, name, value)
    own = {**copied._parameters, **copied._buffers}
    for name, (requires_grad, dtype, device) in now.tensors.items():
        tensor, then = own.get(name), before.tensors.get(name)
        if tensor is None or then is None:
            continue
        # What is sharded is moved by its own library, and meta tensors have no values to move.
        fixed = is_part(tensor) or "meta" in (device.type, tensor.device.type)
        to_dtype = dtype if then[1] != dtype and not fixed else tensor.dtype
        to_device = device if moved and then[2] != device and not fixed else tensor.device
        if (to_dtype, to_device) != (tensor.dtype, tensor.device):
            tensor.data = tensor.data.to(to_device, to_dtype)
        if then[0] != requires_grad and isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(requires_grad)


def _check_numbers(name: str, module: nn.Module, copied: nn.Module) -> None:
    """Raises if a number, bool or string of a module differs from its copy's."""
    modes, other = _modes(module), vars(copied)
    for key, value in vars(module).items():
        if key in modes or key.startswith("_") or key.endswith(NOTES):
            continue
        if isinstance(value, (bool, int, float, str)) and other.get(key, value) != value:
            raise ValueError(
                f"{key} of {name or 'the model'} ({type(module).__name__}) must not be changed "
                f"after convert with a copy of it in each block, got {value!r} where a block's "
                f"copy has {other[key]!r}; change it before, or convert the model anew"
            )
