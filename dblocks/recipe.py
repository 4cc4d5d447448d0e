"""How the ViT is trained on digits, end to end or in blocks: the network, the steps, the answers.

Both ways share the data, its order, the optimizer, the learning rate's course and the evaluation,
so that two runs differ by the way of training only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dblocks._config import JsonConfig
from dblocks.blocks import BlocksConfig, DiffusionBlocks, Weighting
from dblocks.data import IMAGE_SIZE, NUM_CLASSES, Images, Part, batch_indices
from dblocks.metrics import evaluate
from dblocks.models.vit import ViT, ViTConfig, classify
from dblocks.nn import ConditioningKind
from dblocks.train import make_optimizers, train_step

NOISE_SEED = 7  # of the noise that evaluation starts from
BLOCK_SEED = 2**31  # added to a run's seed: of the blocks and noise levels drawn in training
SEED_END = 2**63


def check_seed(seed: int) -> None:
    """Raises ValueError unless PyTorch's generators take this seed, also with BLOCK_SEED added."""
    if not 0 <= seed < SEED_END:
        raise ValueError(f"seed must be at least 0 and less than 2**63, got {seed}")


@dataclass(frozen=True, kw_only=True)
class Run(JsonConfig):
    """Everything that decides the outcome of a run."""

    blocks: int = 3
    """Number of blocks."""
    end_to_end: bool = False
    """Train the plain network through all layers instead; `blocks` has no meaning then."""
    steps: int = 4500
    """Training steps, of one batch each."""
    lr: float = 1e-3
    """Peak learning rate."""
    seed: int = 0
    """Of weights, order of the data and noise."""
    part: Part = "final"
    """Which digits: see `dblocks.data.digits`."""
    batch_size: int = 128
    """Images in a batch."""
    width: int = 64
    """Width of the tokens."""
    depth: int = 12
    """Layers."""
    heads: int = 4
    """Attention heads."""
    mlp_ratio: float = 2.0
    """Width inside an MLP over that of the tokens."""
    weighting: Weighting = "clamped"
    """Weight of a noise level's loss in blocks; chosen on the validation part."""
    conditioning: ConditioningKind = "official"
    """AdaLN of the blocks; the network trained end to end has none."""
    gate_init: float = 1.0
    """Of the blocks' layers: they start as the plain layers of the network trained end to end."""
    patch_size: int = 2
    """Side of a patch."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.05
    """Of AdamW, for matrices."""
    clip: float = 1.0
    """Largest norm of the gradients of what a step trains."""
    points: int = 10
    """How often accuracy is measured on the way, evenly spaced."""

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
    def name(self) -> str:
        """What a table calls this way of training."""
        if self.end_to_end:
            return "end to end"
        return f"{self.blocks} block{'s' if self.blocks > 1 else ''}"

    def vit_config(self) -> ViTConfig:
        """The network: AdaLN where there is a noise level to follow, plain end to end."""
        return ViTConfig(
            image_size=IMAGE_SIZE,
            channels=1,
            patch_size=self.patch_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            num_classes=NUM_CLASSES,
            conditioning="none" if self.end_to_end else self.conditioning,
            gate_init=0.0 if self.end_to_end else self.gate_init,
        )

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: a linear rise, then a cosine to 0 over all steps.

        In blocks too it follows the global step, whichever block is drawn.
        """
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        fraction = (step - rise) / max(1, self.steps - rise)
        return self.lr * 0.5 * (1 + math.cos(math.pi * fraction))


class Classifier(NamedTuple):
    """How a trained network classifies."""

    vit: ViT
    blocks: DiffusionBlocks | None
    """None for a network trained end to end."""

    def logits(
        self,
        images: Tensor,
        num_steps: int | None = None,
        *,
        sigmas: Tensor | None = None,
        seed: int = NOISE_SEED,
    ) -> Tensor:
        """Logits [N, classes], by Euler steps from noise where the network is in blocks.

        Args:
            images: [N, C, H, W].
            num_steps: denoising steps; one for each block by default.
            sigmas: noise levels of the steps, to use instead.
            seed: of the noise.
        """
        if self.blocks is None:
            return self.vit(images)
        generator = torch.Generator().manual_seed(seed)
        return classify(
            self.blocks, images, num_steps=num_steps, sigmas=sigmas, generator=generator
        )

    def accuracy(
        self,
        data: Images,
        num_steps: int | None = None,
        *,
        sigmas: Tensor | None = None,
        seed: int = NOISE_SEED,
    ) -> float:
        """The accuracy on `data`; arguments as of `logits`."""

        def predict(images: Tensor) -> Tensor:
            return self.logits(images, num_steps, sigmas=sigmas, seed=seed)

        return evaluate(predict, data.images, data.labels, batch_size=len(data))


class Learner:
    """A network in training: `step` trains it on a batch, whichever way the run asks for."""

    def __init__(self, run: Run, data: Images) -> None:
        if run.batch_size > len(data):
            raise ValueError(
                f"batch_size must be at most the number of training images {len(data)}, "
                f"got {run.batch_size}"
            )
        self.run, self.data = run, data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.vit = ViT(run.vit_config())
        self.config = None
        if not run.end_to_end:
            self.config = BlocksConfig(num_blocks=run.blocks, weighting=run.weighting)
        self.model = None if self.config is None else DiffusionBlocks(self.vit, self.config)
        self.block_optimizers = (
            None if self.model is None else make_optimizers(self.model, self._adamw)
        )
        whole = self._adamw(list(self.vit.parameters())) if self.model is None else None
        self.optimizers: list[Optimizer] = [whole] if whole else list(self.block_optimizers or ())
        # Not the stream that the weights or the order of the data come from.
        self.generator = torch.Generator().manual_seed(BLOCK_SEED + run.seed)
        self.classifier = Classifier(self.vit, self.model)

    def _adamw(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        matrices = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.run.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.run.lr, fused=True)

    def step(self, step: int) -> tuple[int, float]:
        """Train on batch number `step`; returns the block (0 end to end) and its loss."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.run.lr_at(step)
        batch = self.batch(step)
        if self.model is None or self.block_optimizers is None:
            return 0, self._step_end_to_end(batch)
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

    def batch(self, step: int) -> dict[str, Tensor]:
        """Batch number `step`."""
        run, data = self.run, self.data
        chosen = data[batch_indices(len(data), run.batch_size, seed=run.seed, step=step)]
        return {"images": chosen.images, "labels": chosen.labels}

    def loss(self, batch: dict[str, Tensor], block: int) -> Tensor:
        """The loss of a block, or of the whole network end to end."""
        if self.model is None:
            return nn.functional.cross_entropy(self.vit(batch["images"]), batch["labels"])
        return self.model.loss(batch, block, generator=torch.Generator().manual_seed(0)).loss

    def _step_end_to_end(self, batch: dict[str, Tensor]) -> float:
        self.vit.zero_grad(set_to_none=True)
        loss = self.loss(batch, 0)
        loss.backward()
        nn.utils.clip_grad_norm_(self.vit.parameters(), self.run.clip)
        self.optimizers[0].step()
        self.vit.zero_grad(set_to_none=True)
        return loss.item()
