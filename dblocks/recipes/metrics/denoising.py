"""The loss of a diffusion transformer on held-out images."""

from __future__ import annotations

import torch

from dblocks.blocks import DiffusionBlocks, Draw
from dblocks.recipes.data.splits import Images, values
from dblocks.recipes.metrics import NOISE_SEED

LEVELS = 12  # noise levels at which the loss is measured
MOST = 2000  # images; evaluation on 10,000 would take a third of the training time


def measured(data: Images) -> Images:
    """The images to evaluate on: all, or at most `MOST`, evenly spaced."""
    if len(data) <= MOST:
        return data
    return data[torch.arange(MOST) * len(data) // MOST]


@torch.no_grad()
def held_out_loss(model: DiffusionBlocks, data: Images, *, batch_size: int = 512) -> float:
    """The mean L2 loss of F at noise levels of equal probability, each by the block that owns it.

    The noise is the same for every model of the same images, so that losses are comparable.

    Args:
        model: the blocks of a `DiT`.
        data: the images; those selected by `measured` are used.
        batch_size: images per batch.
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
