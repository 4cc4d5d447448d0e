"""The vision transformer in self-conditioned blocks: its run, and rows of the study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.study.rows import Row
from benchmarks.study.self_conditioning.networks import (
    ConditionedBlocks,
    ConditionedViT,
    chain,
    product,
)
from benchmarks.study.self_conditioning.runs import (
    FORWARD,
    SHARE,
    check_run,
    layers_per_step,
    made,
    work,
)
from dblocks.recipes.data.images import load_images
from dblocks.recipes.data.splits import values
from dblocks.recipes.metrics.classes import accuracy
from dblocks.recipes.metrics.classifier import AT_ONCE
from dblocks.recipes.vit import ViTRun, ViTTrainer


@dataclass(frozen=True, kw_only=True)
class SelfViTRun(ViTRun):
    """Train a ViT in blocks that see the prediction of the block before."""

    share: float = SHARE
    """Of a block's steps that see it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_run(self, self.share)

    def trainer(self) -> SelfViTTrainer:
        """The network of this run with its data, ready to train."""
        data = load_images(self.data, self.part, path=self.data_path, size=self.image_size)
        return SelfViTTrainer(self, *data)


class SelfViTTrainer(ViTTrainer):
    """Trains a `ConditionedViT`, and measures it by the chain of its blocks' predictions."""

    def measure(self) -> dict[str, Any]:
        """The accuracy of the chain's product, and of each block in it."""
        return self._accuracies(chained=True)

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """Also the accuracies without any condition; Euler steps, which hand on none, are not."""
        run = cast(SelfViTRun, self.run)
        return {
            "accuracy": last["accuracy"],
            "blocks_alone": last["blocks_alone"],
            "without_condition": self._accuracies(chained=False),
            "adaln": self.network.config.conditioning != "none",
            "accuracy_by_denoising_steps": None,
            "accuracy_from_noise": None,
            **work(run, last["layer_evaluations"]),
        }

    def _made(self, make: Callable[[], Any]) -> tuple[Any, Any]:
        run = cast(SelfViTRun, self.run)
        return made(run, run.share, self.config, ConditionedViT, make)

    @torch.no_grad()
    def _accuracies(self, *, chained: bool) -> dict[str, Any]:
        """Of the product of the blocks' predictions, and of each block's."""
        found = [self._predict(values(x), chained) for x in self.evaluated.images.split(AT_ONCE)]
        blocks = [torch.cat(parts) for parts in zip(*found, strict=True)]
        labels = self.evaluated.labels
        return {
            "accuracy": accuracy(product(blocks), labels),
            "blocks_alone": [accuracy(block, labels) for block in blocks],
        }

    def _predict(self, images: Tensor, chained: bool) -> list[Tensor]:
        """Log-probabilities of each block, from the mean of the noise as `classify`."""
        model = cast(ConditionedBlocks, self.model)
        z = torch.zeros(len(images), self.network.config.width, device=images.device)
        if chained:
            return chain(model, z, images=images)
        sigma = z.new_full((len(z),), model.config.noise_schedule.sigma_max)
        bound = model.bind(images=images)
        return [
            bound.logits(z, sigma, block=block).log_softmax(-1) for block in range(self.num_blocks)
        ]


def rows_of(rows: Sequence[Row], budget: int) -> list[Row]:
    """Self-conditioned blocks of as much work as others, and of as many calls of layers.

    At the rate of the blocks without the condition.
    """
    (row,) = (row for row in rows if row.name == "blocks")
    row = replace(row, part="conditions", lrs=(), rate_of=row.name, seeds=(0,), planned=False)
    run = cast(ViTRun, row.run)
    return [
        replace(
            row,
            name="blocks_self",
            title="3 blocks that see the one before, forward calls counted as a third",
            run=run_of(run, budget, FORWARD),
        ),
        replace(
            row,
            name="blocks_self_calls",
            title="3 blocks that see the one before, forward calls counted in full",
            run=run_of(run, budget, 1.0),
        ),
    ]


def run_of(run: ViTRun, budget: int, forward: float) -> SelfViTRun:
    """The run of self-conditioned blocks of so many layer evaluations."""
    per_step = layers_per_step(run.depth, run.blocks, SHARE, forward)
    return SelfViTRun(**{**vars(run), "steps": round(budget / per_step)})
