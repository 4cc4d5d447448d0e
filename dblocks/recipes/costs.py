"""The cost of a run: layer evaluations and memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dblocks.blocks.memory import SavedActivations, state_bytes
from dblocks.blocks.sharding import part_here
from dblocks.recipes.data.batches import Batch
from dblocks.recipes.trainer import Trainer

MIB = 2**20


class LayerCounter:
    """Counts the calls of some modules in training, inside the `with` block.

    It uses one global hook, removed at the end, since layers of converted models must not have
    hooks of their own. Calls inside `paused()` do not count.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.count = 0
        self._counts = True
        self._modules = list(modules)
        self._ids = {id(module) for module in self._modules}
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> LayerCounter:
        if self._ids:
            self._handle = register_module_forward_hook(self._add)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count calls inside the `with` block, for evaluation."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def _add(self, module: nn.Module, args: Any, output: Any) -> None:
        self.count += self._counts and id(module) in self._ids


def memory(trainer: Trainer) -> dict[str, float]:
    """The memory of the largest block's step, in MiB: saved activations, and state.

    `state_mib` is the state used by the step, which is all that a worker of that block holds;
    `process_mib` is the state held by this process, with all blocks. With `--sharding fsdp`, the
    gathered parameters of layers count as activations.
    """
    batch = trainer.batch(0)
    costs = [_step_bytes(trainer, batch, b) for b in trainer.trained_blocks]
    activations, state, process = (max(column) / MIB for column in zip(*costs, strict=True))
    return {"activations_mib": activations, "state_mib": state, "process_mib": process}


def _step_bytes(trainer: Trainer, batch: Batch, block: int) -> tuple[int, int, int]:
    """Bytes saved for the backward pass, used by the step, and held by the process at its end."""
    network = trainer.trained
    with SavedActivations(network.parameters()) as saved:
        loss = trainer.loss(batch, block)
    loss.backward()
    held = {id(o): _held(o) for o in trainer.optimizers}
    own = trainer.optimizers_of(block)
    step = sum(held[id(o)] for o in own) + _frozen_beside(own, _read_by(trainer, block))
    process = sum(held.values()) + _frozen_beside(trainer.optimizers, network.parameters())
    network.zero_grad(set_to_none=True)
    return saved.bytes, step, process


def _held(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's parameters, their gradients and its state."""
    return state_bytes(_parameters(optimizer), optimizer)


def _read_by(trainer: Trainer, block: int) -> Iterable[Tensor]:
    """The parameters that a step on a block reads: its own and those that all blocks use."""
    model = trainer.model
    if model is None:
        return trainer.trained.parameters()
    return chain(model.block_parameters(block), model.shared_parameters())


def _frozen_beside(optimizers: Iterable[Optimizer], parameters: Iterable[Tensor]) -> int:
    """Bytes of frozen parameters that no optimizer has; end to end the optimizer has them too."""
    counted = {id(p) for optimizer in optimizers for p in _parameters(optimizer)}
    frozen = (p for p in parameters if not p.requires_grad and id(p) not in counted)
    return sum(part_here(p).nbytes for p in frozen)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
