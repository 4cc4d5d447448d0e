"""Calls functions within FSDP2, which gathers a module's parameters around its forward only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn

T = TypeVar("T")
NAME = "_run_within"


def within(module: nn.Module, function: Callable[..., T]) -> Callable[..., T]:
    """`function`, to be called while the parameters of `module` are whole.

    It runs as the forward of a module does that `fully_shard` was called on, with the same hooks;
    see `register_fsdp_forward_method`. For any other module it is `function` itself.
    """
    # Whoever shards has imported it.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if torch.compiler.is_compiling() or fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return function
    if NAME not in vars(module):
        object.__setattr__(module, NAME, _call)
        fsdp.register_fsdp_forward_method(module, NAME)
    return partial(cast(Callable[..., T], getattr(module, NAME)), function)


def _call(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return function(*args, **kwargs)
