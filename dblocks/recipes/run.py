"""What every run shares: the steps, the optimizer, and both ways of training.

End to end and in blocks have the data, its order, the optimizer, the learning rate's course and the
evaluation in common, so that two runs differ by the way of training only. A network that is a
denoiser whichever way it is trained is end to end one block of all layers; others have a plain
form without noise levels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dblocks.blocks import BlocksConfig, DiffusionBlocks, Weighting, make_optimizers, train_step
from dblocks.config import JsonConfig
from dblocks.recipes.data.digits import Part

BLOCK_SEED = 2**31  # added to a run's seed: of the blocks and noise levels drawn in training
SEED_END = 2**63

Batch = dict[str, Tensor]


def check_seed(seed: int) -> None:
    """Raises ValueError unless PyTorch's generators take this seed, also with BLOCK_SEED added."""
    if not 0 <= seed < SEED_END:
        raise ValueError(f"seed must be at least 0 and less than 2**63, got {seed}")


@dataclass(frozen=True, kw_only=True)
class Run(JsonConfig, ABC):
    """Everything that decides the outcome of a run."""

    blocks: int = 3
    """Number of blocks."""
    end_to_end: bool = False
    """Train through all layers instead; `blocks` has no meaning then."""
    steps: int
    """Training steps, of one batch each."""
    lr: float = 1e-3
    """Peak learning rate."""
    seed: int = 0
    """Of weights, order of the data and noise."""
    part: Part = "final"
    """What to train and evaluate on: "selection" never sees what "final" holds out."""
    batch_size: int
    """Samples in a batch."""
    depth: int = 12
    """Layers."""
    weighting: Weighting = "clamped"
    """Weight of a noise level's loss in blocks; chosen on the validation part."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.05
    """Of AdamW, for matrices."""
    clip: float = 1.0
    """Largest norm of the gradients of what a step trains."""
    points: int = 10
    """How often the result is measured on the way, evenly spaced."""
    device: str = "cpu"
    """Where to train, as PyTorch calls it."""
    bf16: bool = False
    """Whether layers compute in bfloat16 (autocast)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        check_seed(self.seed)
        if not self.end_to_end and not 1 <= self.blocks <= self.depth:
            raise ValueError(
                f"blocks must lie between 1 and the number of layers {self.depth}, "
                f"got {self.blocks}"
            )

    @property
    def num_blocks(self) -> int:
        """Blocks that are trained; 1 end to end."""
        return 1 if self.end_to_end else self.blocks

    @property
    def name(self) -> str:
        """What a table calls this way of training."""
        if self.end_to_end:
            return "end to end"
        return f"{self.blocks} block{'s' if self.blocks > 1 else ''}"

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: a linear rise, then a cosine to 0 over all steps.

        In blocks too it follows the global step, whichever block is drawn.
        """
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        fraction = (step - rise) / max(1, self.steps - rise)
        return self.lr * 0.5 * (1 + math.cos(math.pi * fraction))

    @abstractmethod
    def learner(self) -> Learner:
        """The network of this run with its data, ready to train."""


class Learner(ABC):
    """A network in training: `step` trains it on a batch, whichever way the run asks for.

    Args:
        run: what to train.
        make: makes the network, which has its residual layers in `layers`.
        config: how it is cut; one block end to end.
        plain_loss: the loss, 0-d, of a network and a batch end to end, for networks that have a
            form without noise levels; it is not cut then.
    """

    def __init__(
        self,
        run: Run,
        make: Callable[[], nn.Module],
        config: Callable[[], BlocksConfig],
        plain_loss: Callable[[Any, Batch], Tensor] | None = None,
    ) -> None:
        self.run = run
        self.plain_loss = plain_loss if run.end_to_end else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.network: Any = make().to(run.device)
        self.config = None if self.plain_loss else config()
        self.model = None if self.config is None else DiffusionBlocks(self.network, self.config)
        self.block_optimizers = (
            None if self.model is None else make_optimizers(self.model, self._adamw)
        )
        whole = self._adamw(list(self.network.parameters())) if self.model is None else None
        self.optimizers: list[Optimizer] = [whole] if whole else list(self.block_optimizers or ())
        # Not the stream that the weights or the order of the data come from.
        self.generator = torch.Generator().manual_seed(BLOCK_SEED + run.seed)

    @abstractmethod
    def host_batch(self, step: int) -> Batch:
        """Batch number `step`, on the CPU."""

    @abstractmethod
    def measure(self) -> dict[str, Any]:
        """What a point of the curve tells of the network as it is, as JSON values."""

    def save_beside(self, folder: Path) -> None:  # noqa: B027, most networks need nothing
        """Writes what a saved network of this kind needs beside its checkpoint."""

    @abstractmethod
    def progress(self, point: dict[str, Any]) -> str:
        """A point of the curve in a few words, for the progress bar."""

    @abstractmethod
    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """What a record tells of the trained network, whose last measurement is `last`."""

    def batch(self, step: int) -> Batch:
        """Batch number `step`, on the run's device."""
        return {key: value.to(self.run.device) for key, value in self.host_batch(step).items()}

    def counted(self) -> list[nn.Module]:
        """The modules whose calls in training count as layer evaluations."""
        return list(self.network.layers)

    @property
    def trained(self) -> Any:
        """What is trained: the `DiffusionBlocks`, or the network in its plain form."""
        return self.network if self.model is None else self.model

    @property
    def num_blocks(self) -> int:
        """Blocks that are trained; 1 end to end."""
        return 1 if self.config is None else self.config.num_blocks

    def step(self, step: int) -> tuple[int, float]:
        """Train on batch number `step`; returns the block (0 in the plain form) and its loss."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.run.lr_at(step)
        batch = self.batch(step)
        with self._autocast():
            if self.model is None or self.block_optimizers is None:
                return 0, self._plain_step(batch)
            result = train_step(
                self.model, batch, self.block_optimizers,
                generator=self.generator, clip_grad_norm=self.run.clip,
            )  # fmt: skip
        return result.block, result.details.losses.mean().item()

    def optimizers_of(self, block: int) -> Sequence[Optimizer]:
        """The optimizers that a step on `block` moves."""
        if self.block_optimizers is None:
            return self.optimizers
        return self.block_optimizers.of_block(block)

    def loss(self, batch: Batch, block: int) -> Tensor:
        """The loss of a block, or of the plain form, by which the memory of a step is measured."""
        with self._autocast():
            if self.model is None:
                return self.measured_plain_loss(batch)
            return self.model.loss(batch, block, generator=torch.Generator().manual_seed(0)).loss

    def measured_plain_loss(self, batch: Batch) -> Tensor:
        """The plain form's loss, where the work of a step is drawn at its mean."""
        return cast(Any, self.plain_loss)(self.network, batch)

    def _autocast(self) -> torch.autocast:
        device = torch.device(self.run.device).type
        return torch.autocast(device, torch.bfloat16, enabled=self.run.bf16)

    def _plain_step(self, batch: Batch) -> float:
        self.network.zero_grad(set_to_none=True)
        loss: Tensor = cast(Any, self.plain_loss)(self.network, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.run.clip)
        self.optimizers[0].step()
        self.network.zero_grad(set_to_none=True)
        return loss.item()

    def _adamw(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        matrices = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.run.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.run.lr, fused=True)
