"""The training step: one block's loss, one block's optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dblocks.blocks import Batch, DiffusionBlocks, Loss
from dblocks.schedule import check_block


class BlockOptimizers:
    """One optimizer per block, and one for what blocks share.

    Args:
        blocks: the optimizers of the blocks, first to last.
        shared: the optimizer of the shared parameters; None where they do not train.
    """

    def __init__(self, blocks: Iterable[Optimizer], shared: Optimizer | None) -> None:
        self.blocks = tuple(blocks)
        self.shared = shared

    def __iter__(self) -> Iterator[Optimizer]:
        """Every optimizer: the blocks', then the shared one if there is one."""
        yield from self.blocks
        if self.shared is not None:
            yield self.shared

    def of_block(self, block: int) -> tuple[Optimizer, ...]:
        """The optimizers that a step on one block moves."""
        own = self.blocks[block]
        return (own,) if self.shared is None else (own, self.shared)

    def state_dict(self) -> dict[str, Any]:
        """The states of all optimizers."""
        shared = None if self.shared is None else self.shared.state_dict()
        return {"blocks": [o.state_dict() for o in self.blocks], "shared": shared}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: the state is of another number of blocks, or shared otherwise.
        """
        found = len(state["blocks"]), state["shared"] is not None
        expected = len(self.blocks), self.shared is not None
        if found != expected:
            raise ValueError(
                f"state must be of {expected[0]} blocks with shared={expected[1]}, "
                f"got {found[0]} blocks with shared={found[1]}"
            )
        for optimizer, values in zip(self.blocks, state["blocks"], strict=True):
            optimizer.load_state_dict(values)
        if self.shared is not None:
            self.shared.load_state_dict(state["shared"])


class StepResult(NamedTuple):
    """What a training step did; tensors are on the device, nothing was synchronised."""

    block: int
    """The block that was trained."""
    loss: Tensor
    """The loss that was minimised, 0-d, detached."""
    details: Loss
    """All of `DiffusionBlocks.loss`, detached."""
    grad_norm: Tensor | None
    """The norm of the gradients before clipping; None without clipping."""


def make_optimizers(
    model: DiffusionBlocks, factory: Callable[[list[nn.Parameter]], Optimizer]
) -> BlockOptimizers:
    """One optimizer per block and one for the shared parameters.

    Args:
        model: the network.
        factory: makes an optimizer of a list of parameters, such as
            `lambda params: torch.optim.AdamW(params, lr=1e-3)`.
    """
    blocks = [
        factory(_trainable(model.block_parameters(b))) for b in range(model.config.num_blocks)
    ]
    shared = _trainable(model.shared_parameters())
    return BlockOptimizers(blocks, factory(shared) if shared else None)


def train_step(
    model: DiffusionBlocks,
    batch: Batch,
    optimizers: BlockOptimizers,
    *,
    block: int | None = None,
    generator: torch.Generator | None = None,
    clip_grad_norm: float | None = None,
) -> StepResult:
    """One step on one block; no other block's parameters or optimizer state change.

    Everything random follows from `generator`: it draws the block and one seed, from which sigma
    and the noise are made on the device. Nothing synchronises.

    Args:
        model: the network.
        batch: what its parts read.
        optimizers: from `make_optimizers`.
        block: the block to train; drawn uniformly by default.
        generator: a CPU generator.
        clip_grad_norm: largest norm of the gradients of the block and the shared parameters.
    """
    num_blocks = model.config.num_blocks
    if block is None:
        block = int(torch.randint(num_blocks, (), generator=generator))
    check_block(block, num_blocks)
    model.zero_grad(set_to_none=True)
    result = model.loss(batch, block, generator=generator)
    result.loss.backward()
    grad_norm = None
    moved = optimizers.of_block(block)
    if clip_grad_norm is not None:
        parameters = [p for o in moved for group in o.param_groups for p in group["params"]]
        grad_norm = nn.utils.clip_grad_norm_(parameters, clip_grad_norm)
    for optimizer in moved:
        optimizer.step()
    # Between steps no gradient is held, so that the memory of a step is one block's.
    model.zero_grad(set_to_none=True)
    details = Loss(*(value.detach() for value in result))
    return StepResult(block, details.loss, details, grad_norm)


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]
