"""Classification with a trained vision transformer, in blocks or end to end."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from dblocks.blocks import DiffusionBlocks
from dblocks.models.vit import Noise, ViT, classify
from dblocks.recipes.data.splits import Images, values
from dblocks.recipes.metrics import NOISE_SEED
from dblocks.recipes.metrics.classes import evaluate

AT_ONCE = 2000  # batch size


class Classifier(NamedTuple):
    """A trained network as a classifier."""

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
        """Logits [N, classes]; in blocks, by `classify`.

        Images are classified in batches of 2,000, which draw their noise one after another.

        Args:
            images: [N, C, H, W].
            num_steps: number of denoising steps; for the default see `classify`.
            noise: initial state of the steps, see `classify`.
            seed: seed of the noise.
        """
        generator = torch.Generator().manual_seed(seed)

        def some(images: Tensor) -> Tensor:
            if self.blocks is None:
                return self.vit(images)
            return classify(
                self.blocks, images, num_steps=num_steps, noise=noise, generator=generator
            )

        return torch.cat([some(values(chunk)) for chunk in images.split(AT_ONCE)])

    def alone(self, images: Tensor, block: int) -> Tensor:
        """Logits of one block alone: one call at sigma_max with the mean of the noise."""
        blocks = cast(DiffusionBlocks, self.blocks)
        top = blocks.config.noise_schedule.sigma_max

        def some(images: Tensor) -> Tensor:
            z = torch.zeros(len(images), self.vit.config.width, device=images.device)
            return blocks.logits(z, z.new_full((len(z),), top), block=block, images=images)

        return torch.cat([some(values(chunk)) for chunk in images.split(AT_ONCE)])

    def accuracy(
        self,
        data: Images,
        num_steps: int | None = None,
        *,
        noise: Noise = "none",
        seed: int = NOISE_SEED,
    ) -> float:
        """The accuracy on `data`; for the arguments see `logits`."""

        def predict(images: Tensor) -> Tensor:
            return self.logits(images, num_steps, noise=noise, seed=seed)

        return evaluate(predict, data.images, data.labels, batch_size=len(data))
