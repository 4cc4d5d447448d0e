"""NoProp-DT (arXiv 2503.24322): each block denoises the label on its own, in discrete time.

With y the one-hot label, a_t the cosine schedule clipped to [1e-4, .99], ascending, and S = a/(1-a)
the signal-to-noise ratio, block t (1 to T) reads the image and

    z_(t-1) = sqrt(a_(t-1)) y + sqrt(1 - a_(t-1)) eps

and predicts u_t = softmax(logits). Its loss is that of the bound, T/2 eta (S_t - S_(t-1)) |u_t - y|^2.
A linear classifier learns the label from z_T. To classify, z_0 is noise, and each block in turn
replaces z by a draw from the posterior of its prediction, with r = a_(t-1)/a_t:

    z_t = sqrt(a_t) (1-r)/(1-a_(t-1)) u_t + sqrt(r) (1-a_t)/(1-a_(t-1)) z_(t-1)
          + sqrt((1-a_t) (1-r)/(1-a_(t-1))) eps

The label's embedding is fixed, one-hot, which is one of the paper's choices. Blocks share nothing,
as there.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.study.methods.units import Stage, TokenHead, Units, UnitTrainer
from dblocks.models.vit import ViT, ViTConfig
from dblocks.recipes.data.batches import Batch
from dblocks.recipes.data.splits import Images
from dblocks.recipes.metrics import NOISE_SEED

if TYPE_CHECKING:
    from benchmarks.study.methods.run import MethodRun

LOWEST, HIGHEST = 1e-4, 0.99  # of the schedule
ETA = 0.1


class Step(NamedTuple):
    """What block t needs of the schedule."""

    before: float
    """a_(t-1)."""
    gain: float
    """S_t - S_(t-1)."""
    of_prediction: float
    of_state: float
    std: float
    """Of the noise that is added."""


def schedule(num_blocks: int) -> tuple[list[Step], float]:
    """The steps of all blocks, first to last, and a_T."""
    cosine = (math.sin(math.pi / 2 * t / num_blocks) ** 2 for t in range(num_blocks + 1))
    alphas = [min(max(a, LOWEST), HIGHEST) for a in cosine]
    steps = []
    for low, high in pairwise(alphas):
        ratio, rest = low / high, 1 - low
        steps.append(
            Step(
                low,
                high / (1 - high) - low / rest,
                math.sqrt(high) * (1 - ratio) / rest,
                math.sqrt(ratio) * (1 - high) / rest,
                math.sqrt((1 - high) * (1 - ratio) / rest),
            )
        )
    return steps, alphas[-1]


class LabelDenoiser(nn.Module):
    """A block: layers on the patches and a class token that holds the noisy label."""

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        config = vit.config
        self.stage = Stage(vit, 0, config.depth)
        self.inlet = nn.Linear(config.num_classes, config.width)
        self.head = TokenHead(config.width, config.num_classes)

    def forward(self, images: Tensor, z: Tensor) -> Tensor:
        """Images and noisy labels [N, classes] to the logits of the clean label."""
        x = self.stage.embedding(images)  # pyright: ignore[reportOptionalCall]
        x = torch.cat([x[:, :1] + self.inlet(z)[:, None], x[:, 1:]], dim=1)
        for layer in self.stage.layers:
            x = layer(x, None)
        return self.head(x[:, 0])


class NoPropTrainer(UnitTrainer):
    """Trains each block to denoise labels at its own level, one a step, and the last classifier."""

    def __init__(self, run: MethodRun, data: Images, evaluated: Images) -> None:
        def make(config: ViTConfig) -> Units:
            small = replace(config, depth=run.depth // run.blocks)
            blocks = [LabelDenoiser(ViT(small)) for _ in range(run.blocks)]
            return Units(small, [*blocks, nn.Linear(config.num_classes, config.num_classes)])

        super().__init__(run, data, evaluated, make)
        self.steps, self.last = schedule(run.blocks)

    @staticmethod
    def layers_per_step(run: MethodRun) -> float:
        """Those of one block."""
        return run.depth // run.blocks

    def optimizers_of(self, block: int) -> Sequence[Optimizer]:
        """That of the block, and of the classifier, which every step trains."""
        return [self.optimizers[block], self.optimizers[-1]]

    def train_on(self, batch: Batch, step: int) -> tuple[int, float]:
        """A step of a block, drawn at random, and one of the classifier."""
        block = int(torch.randint(self.num_blocks, (), generator=self.generator))
        loss = self.update(block, self.loss(batch, block))
        z = self.noisy(batch["labels"], self.last)
        classifier = self.network.units[-1]
        self.update(self.num_blocks, nnf.cross_entropy(classifier(z), batch["labels"]))
        return block, loss

    def loss(self, batch: Batch, block: int) -> Tensor:
        """The part of the bound that is a block's."""
        step = self.steps[block]
        logits = self.network.units[block](
            batch["images"], self.noisy(batch["labels"], step.before)
        )
        error = (logits.softmax(-1) - self.one_hot(batch["labels"])).square().sum(-1).mean()
        return self.num_blocks / 2 * ETA * step.gain * error

    def noisy(self, labels: Tensor, alpha: float) -> Tensor:
        """Labels under noise: sqrt(alpha) y + sqrt(1 - alpha) eps."""
        clean = self.one_hot(labels)
        noise = torch.randn(clean.shape, generator=self.generator).to(clean.device)
        return math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * noise

    def one_hot(self, labels: Tensor) -> Tensor:
        """float32 [N, classes]."""
        return nnf.one_hot(labels, self.network.config.num_classes).float()

    def predict(self, images: Tensor) -> Sequence[Tensor]:
        """From noise: the logits of every block on the way, and of the classifier."""
        generator = torch.Generator().manual_seed(NOISE_SEED)
        shape = len(images), self.network.config.num_classes
        z, found = torch.randn(shape, generator=generator).to(images.device), []
        for module, step in zip(self.network.units, self.steps, strict=False):
            logits = module(images, z)
            noise = torch.randn(shape, generator=generator).to(images.device)
            z = step.of_prediction * logits.softmax(-1) + step.of_state * z + step.std * noise
            found.append(logits)
        return [*found, self.network.units[-1](z)]
