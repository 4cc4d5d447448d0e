"""What the methods share: a network of units that are trained apart, each by its own optimizer.

A unit is a module that shares no parameter with another; gradients never pass from one to another.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dblocks.blocks import BlockOptimizers
from dblocks.blocks.training import not_finite
from dblocks.models.vit import ViT, ViTConfig
from dblocks.nn import Norm, TransformerLayer
from dblocks.recipes.data.batches import Batch, ImageData
from dblocks.recipes.data.splits import Images
from dblocks.recipes.metrics import NOISE_SEED
from dblocks.recipes.metrics.classes import accuracy
from dblocks.recipes.trainer import Trainer
from dblocks.recipes.vit import ViTRun

if TYPE_CHECKING:
    from benchmarks.study.methods.run import MethodRun

AT_ONCE = 2000  # images that are classified at a time


class Units(nn.Module):
    """A network whose parts are trained apart.

    Args:
        config: of the plain vision transformer that the layers are of.
        units: its parts, which share no parameter.
    """

    def __init__(self, config: ViTConfig, units: Sequence[nn.Module]) -> None:
        super().__init__()
        self.config = config
        self.units = nn.ModuleList(units)

    @property
    def layers(self) -> list[nn.Module]:
        """All transformer layers, first to last."""
        return [module for module in self.modules() if isinstance(module, TransformerLayer)]


class Embedding(nn.Module):
    """Patch tokens and class token of images with their positions, with a ViT's parameters."""

    def __init__(self, vit: ViT) -> None:
        super().__init__()
        self.patches, self.positions, self.class_token = vit.patches, vit.positions, vit.class_token

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] to [N, 1 + P, D]."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        first = self.class_token.expand(len(images), 1, -1)
        return torch.cat([first, patches], dim=1) + self.positions


class Stage(nn.Module):
    """Some layers of a ViT, for the first of all with the embedding before them."""

    def __init__(self, vit: ViT, first: int, end: int) -> None:
        super().__init__()
        self.embedding = Embedding(vit) if first == 0 else None
        self.layers = nn.ModuleList(list(vit.layers)[first:end])

    def forward(self, x: Tensor) -> Tensor:
        """Images or tokens [N, T, D] to tokens."""
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.layers:
            x = layer(x, None)
        return x


class TokenHead(nn.Module):
    """Logits from a token: `Linear(LN(token))`, zero at the start, as the ViT's own."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = Norm(width, "none")
        self.classifier = nn.Linear(width, num_classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, token: Tensor) -> Tensor:
        """[N, D] to [N, classes]."""
        return self.classifier(self.norm.modulate(token[:, None], None, None)[:, 0])


class UnitTrainer(Trainer):
    """Trains units apart; a subclass says what a step is and how the network classifies.

    Args:
        run: what to train.
        data: the images to train on.
        evaluated: the images to measure accuracy on.
        make: makes the network, of the configuration of a plain ViT of all layers.
    """

    def __init__(
        self,
        run: MethodRun,
        data: Images,
        evaluated: Images,
        make: Callable[[ViTConfig], Units],
    ) -> None:
        batches = ImageData(data, run.batch_size, run.seed)
        plain = ViTRun(
            end_to_end=True, depth=run.depth, width=run.width, heads=run.heads,
            mlp_ratio=run.mlp_ratio, patch_size=run.patch_size,
        )  # fmt: skip
        super().__init__(run, batches, lambda: make(plain.vit_config(data, evaluated)), None)
        self.method_run, self.evaluated = run, evaluated
        units = cast(Units, self.network).units
        self.optimizers: list[Optimizer] = [self._adamw(list(u.parameters())) for u in units]
        self.block_optimizers = BlockOptimizers(self.optimizers, None)

    @staticmethod
    @abstractmethod
    def layers_per_step(run: MethodRun) -> float:
        """Layer evaluations of a step: layers run forward and backward on one batch."""

    @abstractmethod
    def train_on(self, batch: Batch, step: int) -> tuple[int, float]:
        """Trains on a batch; returns a unit and its loss."""

    @abstractmethod
    def predict(self, images: Tensor) -> Sequence[Tensor]:
        """Logits of each head, the last that of the method: [N, C, H, W] to [N, classes] each."""

    def optimizers_of(self, block: int) -> Sequence[Optimizer]:
        """The optimizers of what a step trains: of all units, one after the other."""
        return self.optimizers

    @property
    def num_blocks(self) -> int:
        """Units that have a loss of their own on the way."""
        return self.run.blocks

    def update(self, unit: int, loss: Tensor) -> float:
        """Backward, and a step of one unit alone."""
        parameters = list(self.network.units[unit].parameters())
        loss.backward()
        if wrong := not_finite(loss, parameters):
            self.network.zero_grad(set_to_none=True)
            raise FloatingPointError(f"loss and gradients must be finite, got {wrong}")
        nn.utils.clip_grad_norm_(parameters, self.run.clip)
        self.optimizers[unit].step()
        self.network.zero_grad(set_to_none=True)
        return loss.item()

    def set_lr(self, lr: float, units: Sequence[int] | None = None) -> None:
        """The learning rate of some units' optimizers, of all by default."""
        for unit in range(len(self.optimizers)) if units is None else units:
            for group in self.optimizers[unit].param_groups:
                group["lr"] = lr

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """The accuracy, and that of every head."""
        logits, labels = [], []
        for index in torch.arange(len(self.evaluated)).split(AT_ONCE):
            # As a batch, so that images come as in training.
            batch = ImageData(self.evaluated[index], len(index), NOISE_SEED).batch(0)
            logits.append(self.predict(batch["images"].to(self.run.device)))
            labels.append(batch["labels"])
        heads = [
            accuracy(torch.cat(parts).cpu(), torch.cat(labels))
            for parts in zip(*logits, strict=True)
        ]
        return {"accuracy": heads[-1], "heads": heads}

    def progress(self, point: dict[str, Any]) -> str:
        """The accuracy."""
        return f"accuracy {100 * point['accuracy']:.1f} %"

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """The accuracy and that of every head; of what blocks have besides, nothing."""
        of_blocks = ("blocks_alone", "accuracy_by_denoising_steps", "accuracy_from_noise")
        found = {"accuracy": last["accuracy"], "heads": last["heads"], "adaln": False}
        return found | dict.fromkeys(of_blocks)

    def _step(self, step: int) -> tuple[int, float]:
        self.set_lr(self.run.lr_at(step))
        batch = self.batch(step)
        with self.autocast():
            return self.train_on(batch, step)
