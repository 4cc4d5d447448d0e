"""Greedy layer-wise training: a local output head and cross-entropy behind each unit of layers.

    x_0 = images ;  x_u = unit_u(detach(x_(u-1))) ;  loss_u = CE(head_u(class token of x_u), label)

All units learn on every batch, each from what the one before it makes of it. The last head's
prediction counts; those of all are reported. After Belilovsky, Eickenberg and Oyallon 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.study.methods.units import Stage, TokenHead, Units, UnitTrainer
from dblocks.models.vit import ViT, ViTConfig
from dblocks.recipes.data.batches import Batch
from dblocks.recipes.data.splits import Images

if TYPE_CHECKING:
    from benchmarks.study.methods.run import MethodRun


class HeadedStage(nn.Module):
    """Some layers and the head behind them."""

    def __init__(self, vit: ViT, first: int, end: int) -> None:
        super().__init__()
        self.stage = Stage(vit, first, end)
        self.head = TokenHead(vit.config.width, vit.config.num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images or tokens to tokens and logits."""
        x = self.stage(x)
        return x, self.head(x[:, 0])


class GreedyTrainer(UnitTrainer):
    """Trains each unit by the cross-entropy of its own head."""

    def __init__(self, run: MethodRun, data: Images, evaluated: Images) -> None:
        def make(config: ViTConfig) -> Units:
            vit, size = ViT(config), run.depth // run.blocks
            firsts = range(0, run.depth, size)
            return Units(config, [HeadedStage(vit, first, first + size) for first in firsts])

        super().__init__(run, data, evaluated, make)

    @staticmethod
    def layers_per_step(run: MethodRun) -> float:
        """All of them."""
        return run.depth

    def train_on(self, batch: Batch, step: int) -> tuple[int, float]:
        """A step of every unit, first to last."""
        x, loss = batch["images"], 0.0
        for unit, module in enumerate(self.network.units):
            x, logits = module(x)
            loss = self.update(unit, nn.functional.cross_entropy(logits, batch["labels"]))
            x = x.detach()
        return self.num_blocks - 1, loss

    def loss(self, batch: Batch, block: int) -> Tensor:
        """That of one unit, by which the memory of a step is measured."""
        x = batch["images"]
        with torch.no_grad():
            for module in self.network.units[:block]:
                x, _ = module(x)
        _, logits = self.network.units[block](x)
        return nn.functional.cross_entropy(logits, batch["labels"])

    def predict(self, images: Tensor) -> Sequence[Tensor]:
        """The logits of all heads."""
        x, found = images, []
        for module in self.network.units:
            x, logits = module(x)
            found.append(logits)
        return found
