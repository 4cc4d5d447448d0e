"""Averages the blocks' copies of shared parameters every k steps: `shared="reduce"`."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from dblocks.blocks import Block, DiffusionBlocks
from dblocks.blocks.training import blocks_of


@torch.no_grad()
def average_shared(model: nn.Module, group: Any = None, *, step: int = 0) -> None:
    """Replaces every block's copy of the shared parameters by the mean of all copies, in place.

    w_b <- w_0 + sum_i (w_i - w_0) / B, in float32 or wider. Optimizer states and frozen parameters
    do not change. Results are bitwise the same in one process and in many.

    Args:
        model: a `DiffusionBlocks`, which holds all copies; or one `Block`, with the others in other
            processes.
        group: a process group whose rank b owns block b; by default, all processes. Each sends and
            receives 2 (B - 1) / B times the bytes of its copy.
        step: the training step, which must be the same for all blocks.

    Raises:
        ValueError: the model does not have `shared="reduce"`; or the processes do not own blocks 0,
            1, ... in order, or are at different steps. All of them raise.
        RuntimeError: `model` is a `Block`, and there is no process group.
        TypeError: `model` is neither, or a shared parameter is sharded.
    """
    whole = blocks_of(model)
    if whole.config.shared != "reduce":
        raise ValueError(
            "model must have shared='reduce' for its copies to be averaged, "
            f"got {whole.config.shared!r}; make it with BlocksConfig(..., shared='reduce')"
        )
    if isinstance(whole, DiffusionBlocks):
        copies = [_own_copy(whole, b) for b in range(whole.config.num_blocks)]
        for held in zip(*copies, strict=True):
            mean = _mean([t.to(held[0].device) for t in held])
            for tensor in held:
                tensor.copy_(mean)
        return
    tensors = _own_copy(whole, cast(int, whole.index))
    _check_owners(whole, sum(t.numel() for t in tensors), group, step)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [t for t in tensors if t.dtype == dtype]
        mean = _mean_over(torch.cat([t.reshape(-1) for t in same]), group)
        for tensor, part in zip(same, mean.split([t.numel() for t in same]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def join_owners(block: int, num_blocks: int, device: str) -> None:
    """Joins the process group of all blocks' owners, with the block's index as the rank.

    An existing process group is used. Otherwise one is created from the environment variables
    `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`, as set by torchrun.

    Raises:
        ValueError: these are missing, or do not match the block or the number of blocks.
    """
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        return
    wanted = {"RANK": str(block), "WORLD_SIZE": str(num_blocks)}
    found = {name: os.environ.get(name) for name in wanted}
    if not dist.is_available() or found != wanted or "MASTER_ADDR" not in os.environ:
        words = " ".join(f"{name}={value}" for name, value in wanted.items())
        raise ValueError(
            "shared='reduce' for one block must find the jobs of the other blocks, to average with "
            f"them: set {words}, and MASTER_ADDR and MASTER_PORT to one address for all "
            f"jobs, got {found}; or use shared='private', which needs no other job"
        )
    dist.init_process_group("gloo" if torch.device(device).type == "cpu" else None)
    atexit.register(_leave)


def _leave() -> None:
    """Ends the process group; a process that exits without may abort in gloo's threads."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _own_copy(model: Any, block: int) -> list[Tensor]:
    """The trained parameters in a block's copy of the shared modules."""
    network, _ = model.parts_at_rest(block)
    inside = {id(p) for p in network.layers.parameters()}
    fixed = {id(p) for p in network.target.parameters()}
    found = {
        name: p
        for name, p in network.named_parameters()
        if id(p) not in inside | fixed and p.requires_grad
    }
    for name, parameter in found.items():
        if hasattr(parameter, "to_local"):
            raise TypeError(
                f"shared parameters must be plain tensors to be averaged, got {name} as a "
                f"{type(parameter).__name__}; shard the layers only"
            )
    return [p.detach() for p in found.values()]


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean in a fixed order; of equal tensors, exactly their value."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    first = tensors[0].to(wide)
    total = torch.zeros_like(first)
    for tensor in tensors[1:]:
        total += tensor.to(wide) - first
    return (first + total / len(tensors)).to(tensors[0].dtype)


def _mean_over(values: Tensor, group: Any) -> Tensor:
    """The mean of [N] over processes; each computes a part of it."""
    dist = torch.distributed
    count = dist.get_world_size(group)
    each = -(-values.numel() // count)
    padded = nn.functional.pad(values, (0, each * count - values.numel()))
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts, padded, group=group)
    mean = _mean(parts.view(count, each).unbind())
    dist.all_gather(list(padded.view(count, each)), mean, group=group)
    return padded[: values.numel()]


def _check_owners(block: Block, elements: int, group: Any, step: int) -> None:
    """Raises in all processes unless they own all blocks, in order, at the same step."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "one Block is averaged with the blocks of other processes, got no process group; call "
            "torch.distributed.init_process_group first, or give a DiffusionBlocks"
        )
    # On the device that the group's backend communicates from.
    device = next(iter(block.parameters())).device
    mine = torch.tensor([block.index, elements, step], device=device)
    rows = mine.new_empty(dist.get_world_size(group), 3)
    dist.all_gather(list(rows), mine, group=group)
    owners, sizes, steps = rows.T.tolist()
    if owners != list(range(block.config.num_blocks)):
        raise ValueError(
            f"group must have the owners of blocks 0 to {block.config.num_blocks - 1} as its "
            f"ranks, in order, got blocks {owners}"
        )
    if len({*sizes}) > 1:
        raise ValueError(
            f"all blocks must share the same number of parameters, got {sizes} for blocks 0, 1, ..."
        )
    if len({*steps}) > 1:
        raise ValueError(
            f"all blocks must be at the same step to be averaged, got {steps} for blocks 0, 1, "
            f"...; remove the checkpoints after step {min(steps)}, and resume all jobs"
        )
