"""The vision transformer on images: the network, the answers, what is measured."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dblocks.blocks import BlocksConfig, DiffusionBlocks, Weighting
from dblocks.blocks.targets.classes import Head
from dblocks.models.vit import Noise, ViT, ViTConfig, classify
from dblocks.nn import ConditioningKind
from dblocks.recipes.data.digits import Images, batch_indices
from dblocks.recipes.data.images import load_images
from dblocks.recipes.metrics.classes import accuracy, evaluate
from dblocks.recipes.run import Batch, Learner, Run

NOISE_SEED = 7  # of the noise that evaluation starts from
DENOISING_STEPS = (1, 2, 3, 6, 12)  # with which the final accuracy is measured too
AT_ONCE = 2000  # images that are classified at a time
MOST_PATCH = 7  # side of a patch that is taken by default


@dataclass(frozen=True, kw_only=True)
class ViTRun(Run):
    """Everything that decides the outcome of a run on images; see `load_images`."""

    data: str = "digits"
    """digits, fashion-mnist, cifar10, hf:NAME, or a folder or file as `load_images` takes it."""
    image_size: int | None = None
    """Height and width to scale and crop the images of a folder to."""
    steps: int = 4500
    """Training steps, of one batch each."""
    batch_size: int = 128
    """Images in a batch."""
    width: int = 64
    """Width of the tokens."""
    heads: int = 4
    """Attention heads."""
    mlp_ratio: float = 2.0
    """Width inside an MLP over that of the tokens."""
    head: Head = "posterior"
    """What the blocks' logits are; see `ViTConfig`."""
    noise_scale: float | None = 0.1
    """What the noisy label's factor starts at; see `ViTConfig`."""
    top_share: float = 0.6
    """Share of every block's draws that are at sigma_max."""
    noise: Noise = "none"
    """What Euler steps start from, where blocks classify by steps; see `classify`."""
    weighting: Weighting = "none"
    """Weight of a noise level's loss in blocks."""
    conditioning: ConditioningKind = "official"
    """AdaLN of the blocks; the network trained end to end has none."""
    gate_init: float = 1.0
    """Of the blocks' layers: they start as the plain layers of the network trained end to end."""
    patch_size: int | None = None
    """Side of a patch; by default of the images' size, see `patch_size_of`."""

    def images(self) -> tuple[Images, Images]:
        """What to train on and what to evaluate on."""
        return load_images(self.data, self.part, size=self.image_size)

    def vit_config(self, data: Images, evaluated: Images) -> ViTConfig:
        """The network for such images: AdaLN where there is a noise level, plain end to end.

        Raises:
            ValueError: all images are of one class.
        """
        num_classes = 1 + max(int(part.labels.max()) for part in (data, evaluated))
        if num_classes < 2:
            raise ValueError(
                "images must be of at least 2 classes to learn them, got 1; "
                "give each class a sub-folder, or an array file its labels"
            )
        _, channels, height, width = data.images.shape
        patch_size = patch_size_of(height, width) if self.patch_size is None else self.patch_size
        return ViTConfig(
            image_size=height if height == width else (height, width),
            channels=channels,
            patch_size=patch_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            num_classes=num_classes,
            conditioning="none" if self.end_to_end else self.conditioning,
            gate_init=0.0 if self.end_to_end else self.gate_init,
            head="learned" if self.end_to_end else self.head,
            noise_scale=None if self.end_to_end else self.noise_scale,
        )

    def blocks_config(self) -> BlocksConfig:
        """How the network is cut and trained."""
        return BlocksConfig(
            num_blocks=self.blocks, weighting=self.weighting, top_share=self.top_share
        )

    def learner(self) -> ViTLearner:
        """The network of this run with its data, ready to train."""
        return ViTLearner(self, *self.images())


# How the paper's blocks differ.
PUBLISHED: dict[str, Any] = {
    "head": "learned", "noise_scale": None, "top_share": 0.0, "weighting": "batch_mean",
    "noise": "paper",
}  # fmt: skip


def patch_size_of(height: int, width: int) -> int:
    """The largest side up to 7 that divides both and leaves at least 4 patches along each.

    2 for digits of 8x8, 7 for 28x28, 4 for 32x32 and 64x64; 1 where there is none.
    """
    sides = range(1, min(MOST_PATCH, height // 4, width // 4) + 1)
    return max((p for p in sides if math.gcd(height, width) % p == 0), default=1)


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
        noise: Noise = "none",
        seed: int = NOISE_SEED,
    ) -> Tensor:
        """Logits [N, classes], by `classify` where the network is in blocks.

        Images are taken 2,000 at a time, which draw their noise one after another.

        Args:
            images: [N, C, H, W].
            num_steps: denoising steps; by default as of `classify`.
            noise: what steps start from, see `classify`.
            seed: of the noise.
        """
        generator = torch.Generator().manual_seed(seed)

        def some(images: Tensor) -> Tensor:
            if self.blocks is None:
                return self.vit(images)
            return classify(
                self.blocks, images, num_steps=num_steps, noise=noise, generator=generator
            )

        return torch.cat([some(chunk.float()) for chunk in images.split(AT_ONCE)])

    def alone(self, images: Tensor, block: int) -> Tensor:
        """Logits of one block alone, by one call from the mean of the noise at sigma_max."""
        blocks = cast(DiffusionBlocks, self.blocks)
        top = blocks.config.noise_schedule.sigma_max

        def some(images: Tensor) -> Tensor:
            z = torch.zeros(len(images), self.vit.config.width, device=images.device)
            return blocks.logits(z, z.new_full((len(z),), top), block=block, images=images)

        return torch.cat([some(chunk.float()) for chunk in images.split(AT_ONCE)])

    def accuracy(
        self,
        data: Images,
        num_steps: int | None = None,
        *,
        noise: Noise = "none",
        seed: int = NOISE_SEED,
    ) -> float:
        """The accuracy on `data`; arguments as of `logits`."""

        def predict(images: Tensor) -> Tensor:
            return self.logits(images, num_steps, noise=noise, seed=seed)

        return evaluate(predict, data.images, data.labels, batch_size=len(data))


class ViTLearner(Learner):
    """A ViT in training on images.

    Args:
        run: what to train.
        data: the images to train on.
        evaluated: the images to measure accuracy on.
    """

    def __init__(self, run: ViTRun, data: Images, evaluated: Images) -> None:
        if run.batch_size > len(data):
            raise ValueError(
                f"batch_size must be at most the number of training images {len(data)}, "
                f"got {run.batch_size}"
            )
        if not len(evaluated):
            raise ValueError(f"images must be enough to hold some out, got {len(data)}; give more")
        super().__init__(
            run,
            lambda: ViT(run.vit_config(data, evaluated)),
            run.blocks_config,
            lambda vit, batch: nn.functional.cross_entropy(vit(batch["images"]), batch["labels"]),
        )
        self.data, self.evaluated = data, evaluated
        self.noise: Noise = run.noise
        self.classifier = Classifier(self.network, self.model)

    def host_batch(self, step: int) -> Batch:
        """Batch number `step`, on the CPU."""
        run, data = self.run, self.data
        chosen = data[batch_indices(len(data), run.batch_size, seed=run.seed, step=step)]
        return {"images": chosen.images.float(), "labels": chosen.labels}

    def measure(self) -> dict[str, Any]:
        """The accuracy, and in blocks that of each alone."""
        reached = self.classifier.accuracy(self.evaluated, noise=self.noise)
        return {"accuracy": reached, "blocks_alone": self._alone()}

    def progress(self, point: dict[str, Any]) -> str:
        """The accuracy."""
        return f"accuracy {100 * point['accuracy']:.1f} %"

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """The accuracy, also with several numbers of denoising steps, from their mean and noise."""
        by_steps = self.model is not None and self.run.part == "final"
        return {
            "accuracy": last["accuracy"],
            "blocks_alone": last["blocks_alone"],
            "adaln": self.network.config.conditioning != "none",
            "accuracy_by_denoising_steps": self._by_denoising_steps("none") if by_steps else None,
            "accuracy_from_noise": self._by_denoising_steps("paper") if by_steps else None,
        }

    @torch.no_grad()
    def _alone(self) -> list[float] | None:
        if self.model is None:
            return None
        data = self.evaluated
        return [
            accuracy(self.classifier.alone(data.images, block), data.labels)
            for block in range(self.num_blocks)
        ]

    def _by_denoising_steps(self, noise: Noise) -> dict[str, float]:
        with warnings.catch_warnings():
            # Fewer steps than blocks skip some of them: that is what is asked here.
            warnings.simplefilter("ignore", UserWarning)
            return {
                str(n): self.classifier.accuracy(self.evaluated, n, noise=noise)
                for n in DENOISING_STEPS
            }
