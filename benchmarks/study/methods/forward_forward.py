"""Contrastive Forward-Forward for vision transformers (arXiv 2502.00571).

Two augmented views of each image go through the layers. Each unit of layers makes the views of a
class alike, by the supervised contrastive loss of its mean tokens, with f those of both views at
norm 1, S the other entries, P those of them of the same class, and t the temperature:

    loss = mean over i of  -mean over p in P(i) of  ln( exp(f_i f_p / t) / sum over s in S(i) exp(f_i f_s / t) )

Its input is detached and its optimizer its own. A linear head learns to classify the detached mean
tokens of all units, together; at the end, in a tenth of the steps, it alone learns, from images as
they are. A step runs every layer on two batches, and at the end on one, forward only, which counts
as much.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor

from benchmarks.study.methods.units import Stage, TokenHead, Units, UnitTrainer
from dblocks.models.vit import ViT, ViTConfig
from dblocks.recipes.data.batches import Batch
from dblocks.recipes.data.splits import Images

if TYPE_CHECKING:
    from benchmarks.study.methods.run import MethodRun

TEMPERATURE = 0.1
HEAD_SHARE = 0.1  # of the steps, the last ones: the head alone
HEAD_LR = 4e-3
SHIFT = 1 / 14  # of the image's side: 2 pixels of 28
CONTRAST = 0.3


class ForwardForwardTrainer(UnitTrainer):
    """Trains each unit by the contrastive loss of its own mean tokens, and a linear head."""

    def __init__(self, run: MethodRun, data: Images, evaluated: Images) -> None:
        def make(config: ViTConfig) -> Units:
            vit, size = ViT(config), run.depth // run.blocks
            stages = [Stage(vit, first, first + size) for first in range(0, run.depth, size)]
            head = TokenHead(run.blocks * config.width, config.num_classes)
            return Units(config, [*stages, head])

        super().__init__(run, data, evaluated, make)
        self.contrastive_steps = run.steps - round(HEAD_SHARE * run.steps)

    @staticmethod
    def layers_per_step(run: MethodRun) -> float:
        """Two batches through all layers, but for the steps of the head."""
        return run.depth * (2 - HEAD_SHARE)

    def train_on(self, batch: Batch, step: int) -> tuple[int, float]:
        """A step of every unit, first to last, and of the head; at the end of the head alone."""
        labels, head = batch["labels"], self.num_blocks
        loss, first = 0.0, step < self.contrastive_steps
        steps = self.contrastive_steps if first else self.run.steps - self.contrastive_steps
        # Each stage has a schedule of its own.
        stage = dataclasses.replace(self.run, steps=steps)
        lr = stage.lr_at(step if first else step - self.contrastive_steps)
        self.set_lr(lr * HEAD_LR / self.run.lr, [head])
        if first:
            self.set_lr(lr, range(head))
            x, found = self.views(batch["images"]), []
            for unit in range(head):
                x = [self.network.units[unit](view) for view in x]
                tokens = torch.cat([mean_token(view) for view in x])
                loss = self.update(unit, contrastive_loss(tokens, labels.repeat(2)))
                x = [view.detach() for view in x]
                found.append(tokens.detach())
            features, labels = torch.cat(found, dim=1), labels.repeat(2)
        else:
            features = self.features(batch["images"])
        of_head = self.update(head, nnf.cross_entropy(self.network.units[head](features), labels))
        return self.num_blocks - 1, loss or of_head

    def loss(self, batch: Batch, block: int) -> Tensor:
        """That of one unit, by which the memory of a step is measured."""
        x = list(torch.cat([batch["images"]] * 2).chunk(2))
        for unit in range(block + 1):
            with torch.set_grad_enabled(unit == block):
                x = [self.network.units[unit](view) for view in x]
        return contrastive_loss(
            torch.cat([mean_token(view) for view in x]), batch["labels"].repeat(2)
        )

    def predict(self, images: Tensor) -> Sequence[Tensor]:
        """The head's logits."""
        return [self.network.units[-1](self.features(images))]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The mean tokens of all units, at norm 1, [N, units*D]."""
        x, found = images, []
        for unit in range(self.num_blocks):
            x = self.network.units[unit](x)
            found.append(mean_token(x))
        return torch.cat(found, dim=1)

    def views(self, images: Tensor) -> list[Tensor]:
        """Two augmented views of each image."""
        flip = self.method_run.flip
        return [augment(images, self.generator, flip=flip) for _ in range(2)]


def mean_token(x: Tensor) -> Tensor:
    """The mean of the tokens at norm 1: [N, T, D] to [N, D]."""
    return nnf.normalize(x.mean(1), dim=-1)


def contrastive_loss(features: Tensor, labels: Tensor) -> Tensor:
    """The supervised contrastive loss, 0-d; formula above (Khosla et al. 2020, L_out).

    Args:
        features: of norm 1, [M, D].
        labels: int64 [M]; at least two of each class.
    """
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    logits = (features @ features.T / TEMPERATURE).masked_fill(own, float("-inf"))
    log_share = logits - logits.logsumexp(-1, keepdim=True)
    positive = (labels[:, None] == labels) & ~own
    return -(log_share.masked_fill(~positive, 0.0).sum(-1) / positive.sum(-1)).mean()


def augment(images: Tensor, generator: torch.Generator, *, flip: bool) -> Tensor:
    """Images shifted by up to a 14th of their side and of another contrast; half mirrored.

    Args:
        images: pixel values in [-1, 1], where -1 is the background, [N, C, H, W].
        generator: a CPU generator.
        flip: whether half of the images are mirrored.
    """
    N, _, H, W = images.shape
    by = max(1, round(SHIFT * H)), max(1, round(SHIFT * W))
    rows, columns = (
        torch.arange(size) + torch.randint(2 * most + 1, (N, 1), generator=generator)
        for size, most in zip((H, W), by, strict=True)
    )
    mirrored = torch.rand(N, 1, generator=generator) < (0.5 if flip else 0.0)
    columns = torch.where(mirrored, columns.flip(1), columns)
    contrast = 1 + CONTRAST * (2 * torch.rand(N, 1, 1, 1, generator=generator) - 1)
    padded = nnf.pad(images, (by[1], by[1], by[0], by[0]), value=-1.0)
    at = torch.arange(N)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[
        at.to(images.device), rows[:, :, None].to(images.device), columns[:, None].to(images.device)
    ].permute(0, 3, 1, 2)
    return ((shifted + 1) * contrast.to(images.device) - 1).clamp(-1, 1)
