"""An ensemble of B plain networks of L/B layers, trained apart, which take turns with the steps.

Together they run as many layers as one network of L layers end to end in L/B times fewer steps.
The prediction is the mean of their probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.study.methods.units import Units, UnitTrainer
from dblocks.models.vit import ViT, ViTConfig
from dblocks.recipes.data.batches import Batch
from dblocks.recipes.data.splits import Images

if TYPE_CHECKING:
    from benchmarks.study.methods.run import MethodRun


class EnsembleTrainer(UnitTrainer):
    """Trains the members of an ensemble, one a step."""

    def __init__(self, run: MethodRun, data: Images, evaluated: Images) -> None:
        def make(config: ViTConfig) -> Units:
            small = replace(config, depth=run.depth // run.blocks)
            return Units(small, [ViT(small) for _ in range(run.blocks)])

        super().__init__(run, data, evaluated, make)

    @staticmethod
    def layers_per_step(run: MethodRun) -> float:
        """Those of one member."""
        return run.depth // run.blocks

    def optimizers_of(self, block: int) -> Sequence[Optimizer]:
        """That of a member."""
        return [self.optimizers[block]]

    def train_on(self, batch: Batch, step: int) -> tuple[int, float]:
        """A step of the member whose turn it is."""
        member = step % self.num_blocks
        return member, self.update(member, self.loss(batch, member))

    def loss(self, batch: Batch, block: int) -> Tensor:
        """The cross-entropy of a member."""
        return nn.functional.cross_entropy(
            self.network.units[block](batch["images"]), batch["labels"]
        )

    def predict(self, images: Tensor) -> Sequence[Tensor]:
        """The members' logits, and the logarithm of their mean probabilities."""
        members = [member(images) for member in self.network.units]
        mean = torch.stack([logits.softmax(-1) for logits in members]).mean(0)
        return [*members, mean.log()]
