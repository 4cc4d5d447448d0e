"""The loss of a diffusion transformer on held-out images."""

from __future__ import annotations

import torch

from dblocks.blocks import DiffusionBlocks, Draw
from dblocks.recipes.data.splits import Images, values
from dblocks.recipes.metrics import NOISE_SEED

LEVELS = 12  # noise levels at which the loss is measured
MOST = 2000  # images: of 10,000 a measurement would take as long as a third of the training


def measured(data: Images) -> Images:
    """The images whose loss is measured: all, or of more than `MOST` so many, evenly spaced."""
    if len(data) <= MOST:
        return data
    return data[torch.arange(MOST) * len(data) // MOST]


@torch.no_grad()
def held_out_loss(model: DiffusionBlocks, data: Images, *, batch_size: int = 512) -> float:
    """The mean L2 loss, in F space, at noise levels of equal probability, each by its block.

    The noise is the same for every model of the same images, so that losses compare across blocks.

    Args:
        model: the blocks of a `DiT`.
        data: the images, of which `measured` says the ones that are used.
        batch_size: images at a time.
    """
    data = measured(data)
    config = model.config
    device = next(model.parameters()).device
    levels = config.noise_schedule.steps(2 * LEVELS + 1)[1::2]
    owners = config.noise_schedule.block_of(levels, config.num_blocks).tolist()
    total = 0.0
    for first in range(0, len(data), batch_size):
        images = values(data.images[first : first + batch_size]).to(device)
        batch = {"images": images, "labels": data.labels[first : first + batch_size].to(device)}
        for i, (sigma, block) in enumerate(zip(levels.tolist(), owners, strict=True)):
            seed = torch.full((), NOISE_SEED + first + i, dtype=torch.int64, device=device)
            draw = Draw(torch.full((len(images),), sigma, device=device), seed, None)
            total += model.loss_at(batch, block, draw).losses.double().sum().item()
    return total / (len(data) * LEVELS)
