"""The ways to fine-tune that the benchmark compares, and their runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.models.finetune import pretrained
from benchmarks.models.finetune.pretrained import Pretraining
from dblocks import BlocksConfig, make_optimizers, train_step
from dblocks.blocks.targets.classes import Head
from dblocks.integrations.convert import ConvertedBlocks, convert
from dblocks.integrations.convert.causal_lm import Rows
from dblocks.recipes.data.text import Text
from dblocks.schedules import NoiseSchedule

DENOISING_SEED = 11  # seed of levels and noise for held-out denoising
SCHEDULE = NoiseSchedule(p_mean=0.0, p_std=2.0)  # as in the text models of dblocks.recipes
OVERLAP = 0.1


@dataclass(frozen=True)
class Arm:
    """A way to fine-tune."""

    name: str
    trains: Literal["all", "layers", "added", "shared"]
    """The trained parameters: all of them end to end; or a block's layers, its layers and the added
    parameters outside of them, or its layers and all parameters outside."""
    clean_loss_weight: float = 0.0
    rows: Rows = "single"
    head: Head = "posterior"

    @property
    def by_plain(self) -> bool:
        """Whether the plain model's loss is trained; its bits then select the learning rate."""
        return self.trains == "all" or self.clean_loss_weight > 0


PUBLISHED: tuple[Rows, Head] = ("doubled", "learned")
ARMS = (
    Arm("end to end", "all"),
    Arm("blocks, layers, denoising only", "layers"),
    Arm("blocks, layers, clean loss 1", "layers", 1.0),
    Arm("blocks, layers and what is added, clean loss 1", "added", 1.0),
    Arm("blocks, all shared parameters, denoising only", "shared"),
    Arm("blocks, all shared parameters, clean loss 1", "shared", 1.0),
    Arm("as published, layers and what is added, clean loss 1", "added", 1.0, *PUBLISHED),
    Arm("as published, all shared parameters, denoising only", "shared", 0.0, *PUBLISHED),
)


@dataclass(frozen=True)
class Settings:
    """All settings that affect the figures, except the texts."""

    pretraining: Pretraining = field(default_factory=Pretraining)
    blocks: int = 3
    steps: int = 200
    selection_steps: int = 50
    batch_size: int = 2
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    selection_seed: int = 100
    windows: int | None = 64
    """Number of evenly spaced windows of a text whose second halves are scored; None for all."""


class Trainee(NamedTuple):
    """A copy of the pretrained model in training."""

    network: Any
    """The model, or the `ConvertedBlocks` around it."""
    step: Callable[[Tensor, int | None], object]
    """Trains on tokens [N, T]: one block, or the whole model."""
    loss: Callable[[Tensor, int], Tensor]
    """The loss of such a step."""
    optimizers_of: Callable[[int], Sequence[Optimizer]]
    optimizers: Sequence[Optimizer]


def trainee(model: Any, arm: Arm, settings: Settings, seed: int) -> Trainee:
    """A copy of `model` at learning rate 0; `seed` determines added parameters and draws."""
    model = copy.deepcopy(model)
    if arm.trains == "all":
        whole = pretrained.adamw(model.parameters(), lr=0.0)
        return Trainee(
            model,
            lambda tokens, block: pretrained.plain_step(model, whole, tokens),
            lambda tokens, block: pretrained.plain_loss(model, tokens),
            lambda block: [whole],
            [whole],
        )
    blocks = converted(model, arm, settings, seed)
    optimizers = make_optimizers(blocks, lambda params: pretrained.adamw(params, lr=0.0))
    generator = torch.Generator().manual_seed(seed)

    def step(tokens: Tensor, block: int | None) -> object:
        return train_step(
            blocks, {"tokens": tokens}, optimizers,
            block=block, generator=generator, clip_grad_norm=pretrained.CLIP,
        )  # fmt: skip

    def loss(tokens: Tensor, block: int) -> Tensor:
        draws = torch.Generator().manual_seed(DENOISING_SEED)
        return blocks.loss({"tokens": tokens}, block, generator=draws).loss

    return Trainee(blocks, step, loss, optimizers.of_block, list(optimizers))


def converted(model: Any, arm: Arm, settings: Settings, seed: int) -> ConvertedBlocks:
    """The model in blocks; parameters that `arm` does not train are frozen."""
    config = BlocksConfig(
        num_blocks=settings.blocks,
        schedule=SCHEDULE,
        overlap=OVERLAP,
        shared="frozen" if arm.trains == "layers" else "train",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = convert(
            model, config, task="tokens",
            clean_loss_weight=arm.clean_loss_weight, rows=arm.rows, head=arm.head,
        )  # fmt: skip
    if arm.trains == "added":
        own = {id(p) for p in model.parameters()}
        for parameter in blocks.shared_parameters():
            parameter.requires_grad_(id(parameter) not in own)
    return blocks


def finetune(
    model: Any, arm: Arm, settings: Settings, text: Text, each: Callable[[], object],
    *, lr: float, seed: int, steps: int,
) -> Any:  # fmt: skip
    """Fine-tunes a copy of `model`, plain or in blocks."""
    how = trainee(model, arm, settings, seed)
    for step in range(steps):
        for optimizer in how.optimizers:
            pretrained.set_rate(optimizer, pretrained.rate_at(step, steps, lr))
        tokens = pretrained.windows_of(
            text, settings.pretraining, settings.batch_size, seed=seed, step=step
        )
        how.step(tokens, None)
        each()
    return how.network
