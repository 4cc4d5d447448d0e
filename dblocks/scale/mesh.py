"""Assigns blocks and process groups to the processes started by `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from dblocks.blocks import Block, DiffusionBlocks
from dblocks.blocks.sharding import Replicas, reduced

Sharding = Literal["ddp", "fsdp"]
WAIT = timedelta(days=365)  # time-out for the slowest block; a failed process ends the others
NAMES = ("block", "dp")
ENDED, FAILED = "dblocks/ended/", b"failed"  # in the store, how each process ended


class Layout(NamedTuple):
    """The role of one of several processes."""

    blocks: tuple[int, ...]
    """Indices of the blocks that the process trains, one after the other."""
    mesh: Any
    """1-D DeviceMesh of the processes that train these blocks together; None for one process."""
    first: bool
    """Whether the process writes the files of its blocks."""
    merged: bool
    """Whether all blocks are trained and merged at the end."""
    merges: bool
    """Whether this process merges the blocks."""


ALONE = Layout((), None, True, False, False)  # without torchrun


def world_size() -> int:
    """Number of processes started by torchrun; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rows_of(count: int, rank: int, size: int) -> tuple[int, ...]:
    """Indices of the blocks of one process, if there are fewer processes than blocks."""
    return tuple(range(rank, count, size))


def check_layout(num_blocks: int, processes: int) -> None:
    """Raises ValueError if some processes would have nothing to do.

    Args:
        num_blocks: blocks to train.
        processes: number of processes.
    """
    if processes > num_blocks and processes % num_blocks:
        raise ValueError(
            f"the number of processes must be at most the number of blocks, {num_blocks}, or a "
            f"multiple of it, got {processes}; start {processes // num_blocks * num_blocks}, or "
            "use another number of blocks"
        )


@contextmanager
def joined(num_blocks: int, device: str, block: int | None = None) -> Iterator[Layout]:
    """Joins the processes started by torchrun in a mesh with the axes "block" and "dp".

    With W processes and B blocks, W/B of them train each block together; with fewer processes than
    blocks, process r trains the blocks r, r + W, r + 2W, ... one after the other. Processes of
    different blocks do not communicate until all blocks are trained.

    Args:
        num_blocks: B.
        device: name of the device; with "cuda" each process of a machine uses a different GPU.
        block: the block that all processes train; None for all blocks.

    Raises:
        ValueError: W is larger than B and not a multiple of it.
    """
    distributed: Any = torch.distributed
    size, count = world_size(), num_blocks if block is None else 1
    check_layout(count, size)
    if torch.device(device).type != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    # Collectives on CPU tensors use gloo, even if each process has a GPU.
    distributed.init_process_group()
    rank = distributed.get_rank()
    try:
        groups, each = min(count, size), max(size // count, 1)
        mesh = distributed.device_mesh.init_device_mesh(
            torch.device(device).type, (groups, each), mesh_dim_names=NAMES
        )
        place = mesh.get_local_rank("block")
        blocks = (block,) if block is not None else rows_of(count, place, groups)
        together = mesh["dp"] if each > 1 else None
        first, merged = mesh.get_local_rank("dp") == 0, block is None
        yield Layout(blocks, together, first, merged, merged and rank == 0)
    except BaseException:
        with suppress(RuntimeError):  # the store may be gone with the process that holds it
            _store().set(f"{ENDED}{rank}", FAILED)
        raise
    finally:
        distributed.destroy_process_group()


def wait_for_all() -> None:
    """Waits until the last block is trained.

    Uses the store, so that processes of other blocks need not call it at the same time.

    Raises:
        ValueError: another process failed.
    """
    distributed: Any = torch.distributed
    store, rank, size = _store(), distributed.get_rank(), distributed.get_world_size()
    store.set(f"{ENDED}{rank}", "trained")
    if rank == 0:
        keys = [f"{ENDED}{r}" for r in range(size)]
        store.wait(keys, WAIT)
        store.set(
            f"{ENDED}all", ",".join(str(r) for r in range(size) if store.get(keys[r]) == FAILED)
        )
    else:
        # The first process may host the store: it must not leave before all have read it.
        store.wait([f"{ENDED}all"], WAIT)
    if failed := store.get(f"{ENDED}all").decode():
        raise ValueError(
            f"all processes must train their blocks, but process {failed} failed; see its "
            "message. The results of the others are saved: start all again, with --resume if "
            "there are checkpoints, or train the missing blocks with --block and merge them"
        )


def _store() -> Any:
    return cast(Any, torch.distributed).distributed_c10d._get_default_store()


def data_parallel(model: DiffusionBlocks | Block, mesh: Any, sharding: Sharding = "ddp") -> Any:
    """Makes `model` data parallel: several processes each train it on a part of the batch.

    "ddp" wraps it in `DistributedDataParallel`: each process holds all parameters. "fsdp" calls
    `fully_shard` on the layers and on the model: each process holds a shard of the parameters,
    gradients and optimizer state. Pass the result to `make_optimizers` and `train_step`. If a step
    of one block does not use all of its parameters, create the `DistributedDataParallel` yourself,
    with `find_unused_parameters=True`.

    Args:
        model: a network in blocks, or one block; all processes must have the same weights.
        mesh: a 1-D DeviceMesh of the processes, such as `mesh["dp"]` of a larger one.
        sharding: "ddp" or "fsdp".

    Raises:
        TypeError: `model` is neither.
        ValueError: `sharding` is neither; the model has no trained parameters; or, under "fsdp",
            layers share a parameter, of which each would get its own shards.
    """
    if not isinstance(model, (DiffusionBlocks, Block)):
        raise TypeError(
            f"model must be a DiffusionBlocks or a Block, got {type(model).__name__}; see "
            "DiffusionBlocks(network, config)"
        )
    if sharding not in get_args(Sharding):
        raise ValueError(f"sharding must be one of {get_args(Sharding)}, got {sharding!r}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("a model that is trained must have parameters that are not frozen")
    if sharding == "ddp":
        return nn.parallel.DistributedDataParallel(
            model,
            process_group=mesh.get_group(),
            find_unused_parameters=len(model.held) > 1,
        )
    from torch.distributed.fsdp import fully_shard

    # In a converted model the original layer holds the parameters, and its parts run inside.
    layers = [
        cast(nn.Module, getattr(layer, "layer", layer))
        for block in model.held
        for layer in model.parts_at_rest(block)[1]
    ]
    _check_untied(model, layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _check_untied(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Raises ValueError if two layers, which are sharded separately, share a parameter."""
    owner: dict[int, nn.Module] = {}
    for layer in layers:
        for parameter in layer.parameters():
            if owner.setdefault(id(parameter), layer) is not layer:
                named = model.named_parameters(remove_duplicate=False)
                names = [name for name, other in named if other is parameter]
                raise ValueError(
                    f"layers must not share parameters under 'fsdp', got {' and '.join(names)}; "
                    "use 'ddp', or untie the layers (copy.deepcopy one of them)"
                )


def replicas_in(mesh: Any) -> Replicas | None:
    """The replicas on a 1-D mesh; None for one process."""
    if mesh is None or mesh.size() == 1:
        return None
    return Replicas(mesh.get_local_rank(), mesh.size(), (mesh.get_group(),))


def largest(value: int, mesh: Any) -> int:
    """The maximum over all processes of a mesh; a collective."""
    replicas = replicas_in(mesh)
    if replicas is None:
        return value
    return int(reduced(torch.tensor(value), replicas, "max"))


def mean(value: Tensor, mesh: Any) -> Tensor:
    """The mean over all processes of a mesh; a collective."""
    replicas = replicas_in(mesh)
    if replicas is None:
        return value
    return reduced(value.detach().clone(), replicas, "sum") / replicas.count
