"""A run of a DiT in blocks with one choice changed, and its samples by other samplers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from dblocks.blocks import BlocksConfig
from dblocks.models.dit import generate_images
from dblocks.recipes.data.images import load_images
from dblocks.recipes.data.splits import Images
from dblocks.recipes.dit import DiTRun, DiTTrainer, Sampled
from dblocks.recipes.metrics import NOISE_SEED
from dblocks.sampling.steps import Sampler
from dblocks.schedules.noise import Partition

STEPS: Mapping[Sampler, tuple[int, ...]] = {
    "euler": (6, 12, 25, 50, 100),
    "heun": (6, 12, 25, 50),  # which calls the layers twice a step, but for the first
}
PIXELS = (-1.0, 1.0)  # the least and the largest value of the images


@dataclass(frozen=True, kw_only=True)
class AblationRun(DiTRun):
    """Train a DiT in blocks, with what the command `dblocks train dit` leaves at its default."""

    partition: Partition = "equal_mass"
    """How blocks share the noise levels."""
    layers: tuple[int, ...] | None = None
    """Layers of each block; even by default."""
    overlap: float = 0.05
    """Widening of each block's range in training."""
    top_share: float = 0.0
    """Share of every block's draws that are at sigma_max."""
    samplers: bool = False
    """Whether samples of other steps and samplers are judged at the end."""

    def blocks_config(self, data: Images) -> BlocksConfig:
        """How the network is cut, and how its blocks are trained."""
        config = super().blocks_config(data)
        return replace(
            config,
            schedule=replace(cast(Any, config.schedule), partition=self.partition),
            layers_per_block=None if self.end_to_end else self.layers,
            overlap=self.overlap,
            top_share=self.top_share,
        )

    def trainer(self) -> AblationTrainer:
        """The network of this run with its data, ready to train."""
        data = load_images(self.data, self.part, size=self.image_size, scale=self.scale)
        return AblationTrainer(self, *data)


class AblationTrainer(DiTTrainer):
    """A DiT in training whose samples are judged by several samplers, where the run asks for it."""

    sampler: Sampler = "euler"
    num_steps: int | None = None

    def results(self, last: dict[str, Any]) -> dict[str, Any]:
        """As of a DiT, and by sampler and steps what the classifier says of guided samples."""
        found = super().results(last)
        run = cast(AblationRun, self.dit_run)
        if run.samplers and run.part == "final":
            found["by_sampler"] = {
                sampler: {str(n): self._judged_by(sampler, n) for n in steps}
                for sampler, steps in STEPS.items()
            }
        return found

    def sample(self, guidance_scale: float) -> Sampled:
        """As of a DiT; by the sampler that is tried."""
        if self.num_steps is None:
            return super().sample(guidance_scale)
        run, config = self.dit_run, self.network.config
        labels = torch.arange(run.samples) % config.num_classes
        generator = torch.Generator().manual_seed(NOISE_SEED)
        with warnings.catch_warnings(), self.autocast():
            warnings.simplefilter("ignore", UserWarning)  # few steps skip blocks: what is asked
            images = [
                generate_images(
                    self.trained, chunk.to(run.device), num_steps=self.num_steps,
                    guidance_scale=guidance_scale, sampler=self.sampler, generator=generator,
                ).cpu()
                for chunk in labels.split(run.batch_size)
            ]  # fmt: skip
        return Sampled(torch.cat(images).clamp(*PIXELS), labels, 0.0)

    def _judged_by(self, sampler: Sampler, steps: int) -> dict[str, Any] | None:
        self.sampler, self.num_steps = sampler, steps
        try:
            return self._judged(self.sample(self.dit_run.guidance_scale))
        finally:
            self.num_steps = None
