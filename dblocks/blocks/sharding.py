"""Processes that share a batch, under FSDP2 and DDP, which act around a module's forward only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from dblocks.blocks.targets.base import Batch
from dblocks.blocks.targets.entries import check_scored

T = TypeVar("T")
NAME = "_run_within"


def within(module: nn.Module, function: Callable[..., T]) -> Callable[..., T]:
    """`function`, wrapped to run while the parameters of `module` are unsharded.

    It runs with the hooks of a module's forward after `fully_shard`, see
    `register_fsdp_forward_method`. For any other module it is `function` itself.
    """
    # Where a module is sharded, FSDP is already imported.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if torch.compiler.is_compiling() or fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return function
    if NAME not in vars(module):
        object.__setattr__(module, NAME, _call)
        fsdp.register_fsdp_forward_method(module, NAME)
    return partial(cast(Callable[..., T], getattr(module, NAME)), function)


class Replicas(NamedTuple):
    """Processes that train the same parameters, each with its part of a batch."""

    rank: int
    """The rank of this process; parts of the batch are in the order of ranks."""
    count: int
    """The number of processes."""
    groups: tuple[Any, ...]
    """Process groups; a reduction in one after the other is a reduction over all."""


def replicas_of(model: Any) -> Replicas | None:
    """The processes that average gradients of a `DistributedDataParallel` or an `FSDPModule`.

    None for a single process, or if the model is neither.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        group: Any = model.process_group
        found = Replicas(group.rank(), group.size(), (group,))
    else:
        mesh = _mesh_of(model)
        if mesh is None:
            return None
        groups = tuple(mesh.get_group(i) for i in range(mesh.ndim))
        rank = 0
        for i in range(mesh.ndim):
            rank = rank * mesh.size(i) + mesh.get_local_rank(i)
        found = Replicas(rank, mesh.size(), groups)
    return None if found.count == 1 else found


def reduced(value: Tensor, replicas: Replicas, op: Literal["sum", "max"]) -> Tensor:
    """`value`, changed in place: its sum or largest over all processes."""
    distributed: Any = torch.distributed
    for group in replicas.groups:
        distributed.all_reduce(value, getattr(distributed.ReduceOp, op.upper()), group=group)
    return value


class GlobalBatch(NamedTuple):
    """The part of a global batch that this process has."""

    sigma: Tensor
    """The levels of all samples, [N * processes, ...]."""
    first: int
    """The index of the first sample here."""
    factor: Tensor | None
    """Factor of the loss of the samples here, 0-d, so that the mean over processes is the loss of
    all samples; None for 1."""

    def here(self, values: Tensor, like: Tensor) -> Tensor:
        """The part of `values`, of all samples, for the samples here, as many as in `like`."""
        return values[self.first : self.first + len(like)]


def global_batch(
    sigma: Tensor, batch: Batch, N: int, block: int, scored: Tensor | None, replicas: Replicas
) -> GlobalBatch:
    """The global batch that the N samples here are part of, of processes in their order.

    Args:
        sigma: the levels of all samples.
        batch: that of this process.
        N: its samples.
        block: what is trained.
        scored: as of `Target.scored`, for the samples here.
        replicas: the processes.

    Raises:
        ValueError: the batches are not of the same shapes, the blocks not the same, or nothing is
            scored in any batch; on a GPU the device says so.
    """
    _check_alike(batch, N, block, replicas, sigma.device)
    factor = None
    if scored is not None:
        mine = scored.detach().to(sigma.device, torch.float32)
        total = reduced(mine.clone(), replicas, "sum")
        check_scored(total)
        factor = replicas.count * mine / total
    return GlobalBatch(sigma, replicas.rank * N, factor)


def is_part(value: Tensor) -> bool:
    """Whether `value` is a DTensor, of which this process holds a part."""
    return hasattr(value, "full_tensor")


def part_here(value: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor unchanged."""
    return cast(Any, value).to_local() if is_part(value) else value


def whole(value: Tensor) -> Tensor:
    """The full tensor of a DTensor, a collective call; any other tensor unchanged."""
    return cast(Any, value).full_tensor() if is_part(value) else value


def _mesh_of(module: Any) -> Any:
    """The mesh of a module after `fully_shard`; all of its axes are data parallel."""
    # Where a module is sharded, FSDP is already imported.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return None
    tensor: Any = sys.modules["torch.distributed.tensor"]
    return next((p.device_mesh for p in module.parameters() if isinstance(p, tensor.DTensor)), None)


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
    """Raises if a `DistributedDataParallel` would wait for gradients of the other blocks."""
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


def agreed(block: int, replicas: Replicas, device: torch.device) -> int:
    """The block that the first process has drawn, broadcast to all."""
    distributed: Any = torch.distributed
    number = torch.tensor(block, device=device)
    for group in replicas.groups:
        distributed.broadcast(number, group=group, group_src=0)
    return int(number)


def _call(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return function(*args, **kwargs)


def _check_alike(
    batch: Batch, N: int, block: int, replicas: Replicas, device: torch.device
) -> None:
    """Raises unless all processes train one block, on samples of one size.

    Noise is indexed by element: with samples of different sizes, processes would share noise.
    """
    given: dict[str, Any] = {
        key: list(v.shape)
        for key, v in batch.items()
        if isinstance(v, Tensor) and v.ndim and len(v) == N
    }
    size = float(N * 2**32 + sum(batch[key].numel() for key in given))
    found = torch.tensor([block, -block, size, -size], dtype=torch.float64, device=device)
    last, first, largest, smallest = reduced(found, replicas, "max").unbind()
    of_blocks = (
        "block must be the same in all processes that share a batch; give the same one, or none: "
        "then the first process draws it"
    )
    of_shapes = (
        "the batches of all processes must have the same shapes, since noise is that of the global "
        "batch; pad them to one length, and leave out a last batch that does not divide"
    )
    if device.type != "cpu":
        torch.ops.aten._assert_async.msg(last == -first, of_blocks)
        torch.ops.aten._assert_async.msg(largest == -smallest, of_shapes)
    elif last != -first:
        raise ValueError(f"{of_blocks}; got blocks {[int(-first), int(last)]}")
    elif largest != -smallest:
        raise ValueError(f"{of_shapes}; got {given} in process {replicas.rank}")
