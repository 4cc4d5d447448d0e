"""Calls functions within FSDP2 and DDP, which act around a module's forward only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn

T = TypeVar("T")
NAME, CHECKED = "_run_within", "_dblocks_one_block"


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


def through(parallel: Any, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """`function(*args)` as the forward of a `DistributedDataParallel`.

    The backward of what it returns then averages gradients over the processes.
    """
    module: Any = parallel.module
    module.forward = function
    try:
        return parallel(*args, **kwargs)
    finally:
        del module.forward


def check_parallel(parallel: Any, num_blocks: int) -> None:
    """Raises where a `DistributedDataParallel` would wait for gradients of the other blocks."""
    if num_blocks > 1 and not parallel.find_unused_parameters:
        raise ValueError(
            "DistributedDataParallel must be given find_unused_parameters=True, got False: a step "
            f"uses the parameters of one of {num_blocks} blocks, and it would wait for the others"
        )
    if parallel.static_graph:
        raise ValueError(
            "DistributedDataParallel must be given static_graph=False, got True: each step may use "
            "another block's parameters"
        )
    if not parallel.require_backward_grad_sync:
        raise ValueError(
            "train_step must not be called within no_sync() of a DistributedDataParallel: each "
            "process would step on its own gradients; accumulate with model.loss there instead"
        )
    index = parallel.module.index
    if index is not None and not getattr(parallel, CHECKED, False):
        # Once: which block this one is never changes.
        held: list[Any] = [None] * parallel.process_group.size()
        torch.distributed.all_gather_object(held, index, group=parallel.process_group)
        if len(set(held)) > 1:
            raise _other_blocks(held)
        setattr(parallel, CHECKED, True)


def check_one_block(model: Any) -> None:
    """Raises, in all processes alike, where these ran the backward of different blocks.

    Whose parameters were used anywhere has a gradient everywhere after it: that is what
    `find_unused_parameters` finds out, so no process need be asked.
    """
    if model.index is not None:
        return
    blocks = [
        block
        for block in range(model.config.num_blocks)
        if any(p.grad is not None for p in model.block_parameters(block))
    ]
    if len(blocks) > 1:
        raise _other_blocks(blocks)


def _other_blocks(blocks: list[int]) -> ValueError:
    return ValueError(
        "block must be the same in all processes of a DistributedDataParallel, got blocks "
        f"{sorted(set(blocks))}; give the same one, or none: then the first process draws it"
    )


def agreed(block: int, parallel: Any) -> int:
    """The block that the first process has drawn, in all of them."""
    distributed: Any = torch.distributed
    device = next(p.device for p in parallel.module.parameters())
    number = torch.tensor(block, device=device)
    distributed.broadcast(number, group=parallel.process_group, group_src=0)
    return int(number)


def _call(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return function(*args, **kwargs)
