"""Augmentation of images: random crops, flips and RandAugment.

The augmentation of an image depends only on the seed, the step and its index in the batch, so
resumed runs and runs of several processes see the same images.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dblocks.recipes.data.rand_augment import rand_augment
from dblocks.recipes.data.splits import Images, generator_of

Crop = Literal["none", "pad", "resize"]
SEED = 411_000  # added to a run's seed, for a stream of its own
PADDING = 4  # pixels
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a resized crop, as in torchvision
TRIES = 10


class Augment(NamedTuple):
    """Augmentations of the images of a batch, in this order."""

    crop: Crop = "none"
    """"pad": shift by up to 4 pixels, with black borders; "resize": a crop of 8 % to 100 % of the
    area, with an aspect ratio of 3/4 to 4/3, resized to the size of the image."""
    flip: bool = False
    """Flip half of the images horizontally."""
    rand_augment: bool = False
    """Apply two operations to each image; see `rand_augment`."""

    def check(self, images: Images) -> None:
        """Raises ValueError if `rand_augment` is on and the images are not pictures."""
        if not self.rand_augment or images.images.dtype == torch.uint8:
            return
        low, high = (value.item() for value in images.images.aminmax())
        channels = images.images.shape[1]
        if low < -1 or high > 1 or channels not in (1, 3):
            raise ValueError(
                "rand_augment needs images of 1 or 3 channels with values in [-1, 1], got "
                f"{channels} channels with values from {low:.3g} to {high:.3g}; leave it out"
            )

    def __call__(self, images: Tensor, *, seed: int, step: int) -> Tensor:
        """Augments the images of batch `step`, float32 [N, C, H, W]; the shape does not change.

        Images may be on any device; random numbers are drawn on the CPU.
        """
        if self == Augment():
            return images
        generator = generator_of(SEED + seed, step)
        if self.crop == "pad":
            images = padded_crop(images, generator)
        if self.crop == "resize":
            images = resized_crop(images, generator)
        if self.flip:
            turned = torch.randint(2, (len(images), 1, 1, 1), generator=generator).bool()
            images = torch.where(turned.to(images.device), images.flip(3), images)
        return rand_augment(images, generator) if self.rand_augment else images


def padded_crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of images [N, C, H, W] padded with 4 black pixels."""
    N, _, H, W = images.shape
    padded = nnf.pad(images, (PADDING,) * 4, value=-1.0)
    top, left = torch.randint(2 * PADDING + 1, (2, N), generator=generator)
    rows = (top[:, None] + torch.arange(H)).to(images.device)
    columns = (left[:, None] + torch.arange(W)).to(images.device)
    moved = padded.gather(
        2, rows[:, None, :, None].expand(-1, images.shape[1], -1, W + 2 * PADDING)
    )
    return moved.gather(3, columns[:, None, None, :].expand(-1, images.shape[1], H, -1))


def resized_crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of images [N, C, H, W], resized to H and W.

    An image is not cropped if 10 draws do not fit.
    """
    N, _, H, W = images.shape
    area, ratio, place = torch.rand(3, N, TRIES, generator=generator)
    area = H * W * (AREA[0] + (AREA[1] - AREA[0]) * area)
    low, high = (math.log(value) for value in RATIO)
    ratio = (low + (high - low) * ratio).exp()
    widths, heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (widths >= 1) & (widths <= W) & (heights >= 1) & (heights <= H)
    first = fits.int().argmax(1, keepdim=True)
    one = fits.any(1)
    width = torch.where(one, widths.gather(1, first)[:, 0], W)
    height = torch.where(one, heights.gather(1, first)[:, 0], H)
    left = (place[:, 0] * (W - width + 1)).floor().minimum(W - width)
    top = (place[:, 1] * (H - height + 1)).floor().minimum(H - height)
    matrix = torch.zeros(N, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 2] = width / W, (2 * left + width) / W - 1
    matrix[:, 1, 1], matrix[:, 1, 2] = height / H, (2 * top + height) / H - 1
    grid = nnf.affine_grid(matrix.to(images.device), list(images.shape), align_corners=False)
    return nnf.grid_sample(images, grid, padding_mode="border", align_corners=False)
