"""Gathers the full state of sharded modules: files do not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from dblocks.blocks import BlockOptimizers
from dblocks.blocks.sharding import is_part, whole
from dblocks.scale.state import load_state_


class Gathered:
    """A module after `fully_shard`, or its optimizers, whose state is gathered in full.

    All processes must call `state_dict` and `load_state_dict` together.

    Args:
        holder: the module, or the optimizers.
        here: whether this process keeps the gathered tensors; the others get None for each.
    """

    def __init__(self, holder: nn.Module | BlockOptimizers, *, here: bool = True) -> None:
        self.holder, self.here = holder, here

    def state_dict(self) -> dict[str, Any]:
        """The state, with full tensors on the CPU."""
        return gathered(self.holder.state_dict(), here=self.here)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state of `state_dict`, also from another number of processes."""
        if isinstance(self.holder, nn.Module):
            own = self.holder.state_dict()
            load_state_(self.holder, {k: part_of(v, own.get(k)) for k, v in state.items()})
            return
        groups = [*state["blocks"], state["shared"]]
        flat = [values for group in groups for values in group]
        parts = iter(_of_optimizer(o, s) for o, s in zip(self.holder, flat, strict=True))
        *blocks, shared = ([next(parts) for _ in group] for group in groups)
        load_state_(self.holder, {"blocks": blocks, "shared": shared})


class Snapshot:
    """A state taken earlier, in the form that `Checkpoints.save` accepts.

    Args:
        state: the result of `state_of`.
    """

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        """The state."""
        return self.state

    def load_state_dict(self, state: Any) -> None:
        """Raises TypeError: a snapshot can only be saved."""
        raise TypeError("a snapshot cannot load a state; pass resume() the trained objects")


def gathered(state: Any, *, here: bool = True) -> Any:
    """A state with sharded tensors gathered on the CPU; all processes must call it together.

    Args:
        state: a tensor, or several in dictionaries and lists.
        here: whether this process keeps the tensors; otherwise they become None one at a time.
    """
    if isinstance(state, Mapping):
        return {key: gathered(value, here=here) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [gathered(value, here=here) for value in state]
    if not is_part(state):
        return state
    found = whole(state)
    return found.cpu() if here else None


def _of_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = {
        number: {name: part_of(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": found}


def part_of(value: Any, like: Any) -> Any:
    """This process's shard of a full tensor; other values are returned unchanged."""
    fits = isinstance(value, torch.Tensor) and is_part(like) and value.shape == like.shape
    if not fits:
        return value
    from torch.distributed.tensor import distribute_tensor

    distribute: Any = distribute_tensor
    here = cast(torch.Tensor, value).to(like.device)
    # Every process has read the full tensor: none needs to send.
    return distribute(here, like.device_mesh, like.placements, src_data_rank=None)
