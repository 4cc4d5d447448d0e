"""The training step: one block's loss, one block's optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dblocks.blocks.denoiser import Loss, unwrapped
from dblocks.blocks.network import Block, DiffusionBlocks
from dblocks.blocks.sharding import (
    Replicas,
    agreed,
    check_parallel,
    is_part,
    part_here,
    reduced,
    replicas_of,
    through,
    whole,
)
from dblocks.blocks.targets.base import Batch
from dblocks.schedules.random import check_generator

Optimizers = Optimizer | Sequence[Optimizer] | None
NonFinite = Literal["raise", "skip"]


class BlockOptimizers:
    """The optimizers of each block and of the shared parameters: one, several, or None.

    Args:
        blocks: the optimizers of the blocks, first to last; None for a block without trained
            parameters.
        shared: the optimizers of the shared parameters; None if they are not trained.
        considered: the parameters that required gradients when these were made, whether or not an
            optimizer holds them: a step refuses others, which it would not train. None for no such
            check.
    """

    def __init__(
        self,
        blocks: Iterable[Optimizers],
        shared: Optimizers,
        considered: Iterable[nn.Parameter] | None = None,
    ) -> None:
        self.blocks = tuple(blocks)
        self.shared = shared
        # The parameters themselves, not ids, which are used again once a parameter is gone.
        self.considered = None if considered is None else tuple(considered)

    def __iter__(self) -> Iterator[Optimizer]:
        """Every optimizer: the blocks', then the shared ones."""
        for held in (*self.blocks, self.shared):
            yield from _several(held)

    def of_block(self, block: int) -> tuple[Optimizer, ...]:
        """The optimizers that a step on one block uses."""
        return (*_several(self.blocks[block]), *_several(self.shared))

    def state_dict(self) -> dict[str, Any]:
        """The states of all optimizers."""
        blocks = [[o.state_dict() for o in _several(held)] for held in self.blocks]
        return {"blocks": blocks, "shared": [o.state_dict() for o in _several(self.shared)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: the state has a different number of optimizers.
        """
        groups = [*state["blocks"], state["shared"]]
        found = [len(group) for group in groups]
        expected = [len(_several(held)) for held in (*self.blocks, self.shared)]
        if found != expected:
            raise ValueError(
                "state must have as many optimizers for each block, and last for the shared "
                f"parameters, as the model, {expected}, got {found}; make them alike"
            )
        for optimizer, values in zip(self, chain(*groups), strict=True):
            optimizer.load_state_dict(values)


class StepResult(NamedTuple):
    """The result of a training step; tensors are on the device, without synchronisation."""

    block: int
    """The block that was trained."""
    loss: Tensor
    """The loss of this process's batch, 0-d, detached; with several processes, the mean of their
    losses is what is minimised."""
    details: Loss
    """The result of `DiffusionBlocks.loss`, detached."""
    grad_norm: Tensor | None
    """The norm of the gradients before clipping; None without `clip_grad_norm`."""
    skipped: bool = False
    """Whether the step was skipped because its loss or a gradient was not finite."""

    def __repr__(self) -> str:
        """Short: a tensor of one element as its number, others by their shape and dtype."""
        return _short(self)


def make_optimizers(
    model: nn.Module, factory: Callable[[list[nn.Parameter]], Optimizers]
) -> BlockOptimizers:
    """Makes the optimizers of each block and of the shared parameters.

    Args:
        model: the network, possibly in a `DistributedDataParallel`, or one block of it, which then
            alone has optimizers.
        factory: makes an optimizer from a list of parameters, such as `lambda params:
            torch.optim.AdamW(params, lr=1e-3)`; or several that divide the list, such as Muon for
            matrices and AdamW for the rest. It is called for each block and for the shared
            parameters, if any of them require gradients.

    Raises:
        TypeError: `model` is not a `DiffusionBlocks`, or the factory does not return optimizers.
    """
    parallel = _parallel(model)
    model = blocks_of(model if parallel is None else parallel.module)
    model.follow_originals_()  # which may unfreeze parameters of private copies
    groups = [_trainable(model.block_parameters(b)) for b in range(model.config.num_blocks)]
    shared = _trainable(model.shared_parameters())
    blocks = [_made(factory, group) if group else None for group in groups]
    made = _made(factory, shared) if shared else None
    return BlockOptimizers(blocks, made, chain(*groups, shared))


def train_step(
    model: nn.Module,
    batch: Batch,
    optimizers: BlockOptimizers,
    *,
    block: int | None = None,
    generator: torch.Generator | None = None,
    clip_grad_norm: float | None = None,
    nonfinite: NonFinite | None = None,
) -> StepResult:
    """One training step of one block; no other block's parameters or optimizer state change.

    All randomness comes from `generator`: it draws the block and one seed, from which sigma and the
    noise are drawn on the device. Nothing synchronises, except for `nonfinite` on a GPU.

    Gradients are cleared before and after the step, so that none is stored between steps. To
    accumulate them over k batches, call `(model.loss(batch, block).loss / k).backward()` for each,
    then `step()` of every optimizer in `optimizers.of_block(block)`, then `model.zero_grad()`.

    Args:
        model: the network, or one block of it; possibly in a `DistributedDataParallel` (with
            `find_unused_parameters=True` if it has several blocks) or after `fully_shard`. Then
            each process has its part of the batch, and `generator` must have the same state in all:
            the step equals that of one process on all parts in the order of the processes. A drawn
            block is that of the first process, which synchronises; a given one must be the same in
            all.
        batch: the entries that the network and its target read; with the same shapes in all
            processes.
        optimizers: from `make_optimizers`.
        block: the block to train; by default drawn uniformly, if there is more than one.
        generator: a CPU generator.
        clip_grad_norm: largest norm of the gradients of the block and the shared parameters,
            above 0; inf measures it only.
        nonfinite: what to do if the loss or a gradient is NaN or infinite: "raise", or "skip" the
            step; in both cases parameters and optimizers do not change. The check synchronises with
            a GPU, so the default is "raise" if the loss is on a CPU, and no check otherwise.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; the message names the block.
        TypeError: `model` is not a `DiffusionBlocks`, `optimizers` are not from `make_optimizers`,
            `block` is not an integer, or `generator` not a generator.
        RuntimeError: if called within no_grad.
        ValueError: `block` is out of range, differs between processes, or has no trained
            parameters; the optimizers belong to another model, or the block has come to have
            trainable parameters since they were made; or another value is invalid.
    """
    parallel = _parallel(model)
    model = blocks_of(model if parallel is None else parallel.module)
    check_generator(generator)
    _check_options(clip_grad_norm, nonfinite)
    if not isinstance(optimizers, BlockOptimizers):
        raise TypeError(
            f"optimizers must be BlockOptimizers, got {type(optimizers).__name__}; "
            "call make_optimizers(model, factory)"
        )
    replicas = None
    if parallel is not None:
        check_parallel(parallel, len(model.held))
        replicas = replicas_of(parallel)
    elif model.sharded:
        replicas = replicas_of(model)
    block = _chosen(model, block, optimizers, generator, replicas)
    moved = optimizers.of_block(block)
    if not moved:
        raise ValueError(
            f"block {block} must have an optimizer, got parameters that all are frozen; "
            "unfreeze some of its layers, or train the other blocks by block="
        )
    _check_own(moved, model)
    if not torch.is_grad_enabled():
        raise RuntimeError("train_step must not be called within no_grad; call it outside")
    model.zero_grad(set_to_none=True)
    if parallel is None:
        result = model.loss(batch, block, generator=generator)
    else:
        result = through(parallel, model.loss, batch, block, generator=generator, replicas=replicas)
    result.loss.backward()
    parameters = [p for o in moved for group in o.param_groups for p in group["params"]]
    _check_considered(optimizers, model, parameters, block)
    wrong = None
    if nonfinite is not None or result.loss.device.type == "cpu":
        # All processes must decide alike: gradients are the same in all of them, losses are not.
        wrong = not_finite(result.loss if replicas is None else None, parameters, replicas)
    if wrong is not None and nonfinite != "skip":
        model.zero_grad(set_to_none=True)
        raise _not_finite_error(block, wrong, nonfinite)
    grad_norm = None
    if clip_grad_norm is not None:
        grad_norm = whole(nn.utils.clip_grad_norm_(parameters, clip_grad_norm))
    for optimizer in moved if wrong is None else ():
        optimizer.step()
    # No gradient is stored between steps, so that the memory of a step is one block's.
    model.zero_grad(set_to_none=True)
    details = Loss(*(value.detach() for value in result))
    return StepResult(block, details.loss, details, grad_norm, wrong is not None)


def _chosen(
    model: DiffusionBlocks | Block,
    block: int | None,
    optimizers: BlockOptimizers,
    generator: torch.Generator | None,
    replicas: Replicas | None,
) -> int:
    """The block to train: the given one, or a single block's own, or a drawn one."""
    if block is None:
        block = model.index
    drawn = block is None
    if block is None:
        num_blocks = model.config.num_blocks
        block = int(torch.randint(num_blocks, (), generator=generator, device="cpu"))
        if replicas is not None:
            block = agreed(block, replicas, next(model.parameters()).device)
    block = model.held_block(block)
    if model.residency is not None:
        block = model.residency.visit(block, optimizers, generator, drawn=drawn)
    return block


def _not_finite_error(block: int, wrong: str, nonfinite: NonFinite | None) -> FloatingPointError:
    # A caller that passed "raise" explicitly, such as a command without that option, needs no hint.
    other = ', or give nonfinite="skip"' if nonfinite is None else ""
    return FloatingPointError(
        f"loss and gradients of block {block} must be finite, got {wrong}; its parameters are "
        f"as before the step. Lower the learning rate{other}"
    )


def _check_own(optimizers: Iterable[Optimizer], model: nn.Module) -> None:
    """Raises if optimizers hold parameters that are not the model's, which they would not train."""
    own = {id(p) for p in model.parameters()}
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    others = sum(id(p) not in own for p in held)
    if others:
        raise ValueError(
            f"optimizers must hold parameters of this model alone, got {others} of {len(held)} "
            "that it does not have: they are of another model, or a layer was replaced or loaded "
            "with assign=True; call make_optimizers(model, factory) again"
        )


def _check_considered(
    optimizers: BlockOptimizers, model: nn.Module, held: Iterable[nn.Parameter], block: int
) -> None:
    """Raises if gradients reach parameters that became trainable after `make_optimizers`."""
    if optimizers.considered is None:
        return
    known = {id(p) for p in chain(optimizers.considered, held)}
    missed = [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in known]
    if missed:
        model.zero_grad(set_to_none=True)
        raise ValueError(
            "optimizers must hold every parameter that requires gradients, got "
            f"{len(missed)} in block {block} and the shared part that were added or unfrozen "
            f"later, such as {missed[0]}; call make_optimizers(model, factory) again"
        )


def _parallel(model: Any) -> Any:
    """The `DistributedDataParallel` that a model is, or None."""
    return model if isinstance(model, nn.parallel.DistributedDataParallel) else None


def blocks_of(model: Any) -> DiffusionBlocks | Block:
    """The `DiffusionBlocks` or `Block` to train, without the wrapper of torch.compile.

    Raises:
        TypeError: there is none, or it is inside another wrapper.
    """
    inner = unwrapped(model)
    compiled = getattr(model, "_orig_mod", None) is inner
    if isinstance(inner, (DiffusionBlocks, Block)) and (inner is model or compiled):
        return inner
    name = type(model).__name__
    if isinstance(inner, (DiffusionBlocks, Block)):
        raise TypeError(
            f"model must be a DiffusionBlocks, got one inside a {name}, which would not see the "
            f"step; give the {name}'s module, and wrap its layers instead"
        )
    raise TypeError(
        f"model must be a DiffusionBlocks, got {name}; DiffusionBlocks(network, config) makes one"
    )


def _made(factory: Callable[[list[nn.Parameter]], Optimizers], group: Any) -> Optimizers:
    """The optimizers that the factory makes for a group of parameters."""
    made: Any = factory(group)
    several = isinstance(made, (list, tuple)) and all(isinstance(o, Optimizer) for o in made)
    if made is not None and not isinstance(made, Optimizer) and not several:
        raise TypeError(
            "factory must return an optimizer, several in a list, or None, "
            f"got {type(made).__name__}; such as lambda params: torch.optim.AdamW(params, lr=1e-3)"
        )
    return made


def _check_options(clip_grad_norm: float | None, nonfinite: str | None) -> None:
    if nonfinite is not None and nonfinite not in get_args(NonFinite):
        raise ValueError(f"nonfinite must be one of {get_args(NonFinite)}, got {nonfinite!r}")
    number = isinstance(clip_grad_norm, (int, float)) and not isinstance(clip_grad_norm, bool)
    if clip_grad_norm is not None and not (number and clip_grad_norm > 0):
        raise ValueError(f"clip_grad_norm must be a number above 0, got {clip_grad_norm!r}")


def not_finite(
    loss: Tensor | None, parameters: Iterable[nn.Parameter], replicas: Replicas | None = None
) -> str | None:
    """Names what is not finite after a step, the same in all processes; synchronises."""
    if loss is not None and not loss.detach().isfinite():
        return f"a loss of {loss.item()}"
    # The largest magnitudes suffice, and a sum of squares may overflow.
    grads = [p.grad for p in parameters if p.grad is not None]
    divided = any(type(grad) is not Tensor for grad in grads)
    parts = list(map(part_here, grads)) if divided else grads
    here = [part for part in parts if part.numel()]
    norm = nn.utils.get_total_norm(here, norm_type=math.inf)
    wrong = (~norm.isfinite()).int()
    if replicas is not None and divided and any(map(is_part, grads)):
        wrong = reduced(wrong.to(parts[0].device), replicas, "max")
    return f"a gradient with {norm.item()} in it" if wrong else None


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        if value.ndim == 0 and type(value) is Tensor and not value.is_meta:
            return f"{value.item():.6g}"
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple) and (names := getattr(value, "_fields", ())):
        fields = ", ".join(f"{n}={_short(v)}" for n, v in zip(names, value, strict=True))
        return f"{type(value).__name__}({fields})"
    return repr(value)


def _several(held: Optimizers) -> tuple[Optimizer, ...]:
    if held is None:
        return ()
    return (held,) if isinstance(held, Optimizer) else tuple(held)


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]
