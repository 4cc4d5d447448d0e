"""Training state as JSON values and tensors, which can be read without executing code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dblocks.blocks import BlockOptimizers
from dblocks.config import LARGEST_INTEGER


def state_of(holder: Any) -> Any:
    """The state of a generator, or of an object with `state_dict`.

    Raises:
        TypeError: `holder` is neither.
    """
    if isinstance(holder, torch.Generator):
        return holder.get_state()
    if not hasattr(holder, "state_dict") or not hasattr(holder, "load_state_dict"):
        raise TypeError(
            "an object of a checkpoint must be a torch.Generator or have state_dict and "
            f"load_state_dict, got {type(holder).__name__}"
        )
    return holder.state_dict()


def load_state_(holder: Any, state: Any) -> None:
    """Loads a state from `state_of` into `holder` exactly, without changes of dtype.

    Raises:
        ValueError: the state does not fit the holder.
    """
    if isinstance(holder, torch.Generator):
        holder.set_state(state)
    elif isinstance(holder, BlockOptimizers):
        holder.load_state_dict(state)
        states = (s for group in (*state["blocks"], state["shared"]) for s in group)
        for optimizer, values in zip(holder, states, strict=True):
            _restore_dtypes_(optimizer, values)
    else:
        if isinstance(holder, nn.Module):
            _check_dtypes(holder, state)
        holder.load_state_dict(state)
        if isinstance(holder, Optimizer):
            _restore_dtypes_(holder, state)


def pack(value: Any, tensors: dict[str, Tensor], place: str = "") -> Any:
    """A state as JSON values; its tensors are added to `tensors`, with dotted keys.

    `unpack` restores lists, tuples, dictionaries with any keys, and numbers exactly.

    Args:
        value: None, numbers, texts and tensors, in lists, tuples and dictionaries.
        tensors: dictionary that receives the tensors.
        place: the dotted key of the value.

    Raises:
        TypeError: the state holds another type; the message says where.
    """

    def inner(key: Any, part: Any) -> Any:
        return pack(part, tensors, f"{place}.{key}" if place else str(key))

    if isinstance(value, Tensor):
        name = place or "value"
        while name in tensors:  # keys with the same text, such as 1 and "1"
            name += "'"
        tensors[name] = value.detach()
        return {"tensor": name, "device": value.device.type}
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return value if abs(value) <= LARGEST_INTEGER else {"int": str(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Mapping):
        return {"dict": [[inner(".key", k), inner(k, v)] for k, v in value.items()]}
    if isinstance(value, list):
        return [inner(i, part) for i, part in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [inner(i, part) for i, part in enumerate(value)]}
    raise TypeError(
        f"a checkpoint can hold numbers, texts and tensors, got {type(value).__name__} at "
        f"{place or 'the top'}"
    )


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that was passed to `pack`; tensors return to their type of device.

    Raises:
        ValueError: `packed` was not written by `pack`.
    """
    if isinstance(packed, list):
        return [unpack(part, tensors) for part in packed]
    if not isinstance(packed, dict):
        return packed
    if set(packed) == {"tensor", "device"} and packed["tensor"] in tensors:
        return tensors[packed["tensor"]].to(packed["device"])
    kind, value = next(iter(packed.items()), ("", ""))
    if kind == "int":
        return int(value)
    if kind == "float":
        return float(value)
    if kind == "tuple":
        return tuple(unpack(value, tensors))
    if kind == "dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in value}
    raise ValueError(f"state must have been written by a checkpoint, got {packed!r:.100}")


def _check_dtypes(module: nn.Module, state: Mapping[str, Any]) -> None:
    for name, held in module.state_dict().items():
        found = state.get(name)
        if not isinstance(held, Tensor) or not isinstance(found, Tensor):
            continue
        if held.dtype != found.dtype:
            raise ValueError(f"{name} must have dtype {held.dtype}, got {found.dtype}")


def _restore_dtypes_(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Restores the dtypes of state tensors, which `load_state_dict` casts to their parameter's."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        held = optimizer.state[parameters[number]]
        for name, value in values.items():
            if isinstance(value, Tensor) and held[name].dtype != value.dtype:
                held[name] = value.to(held[name].device)
