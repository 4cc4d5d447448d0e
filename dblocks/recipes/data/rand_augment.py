"""RandAugment on batches: two operations per image, drawn uniformly from 14.

Magnitudes are those of bin 9 of 31, the default of torchvision's `RandAugment`, which the released
code of the paper uses; signs are drawn at random. Operations are as in Pillow, with nearest-pixel
sampling and black borders for rotations, translations and shears.

Source: Cubuk et al. 2020 (RandAugment); ranges from AutoAugment, Cubuk et al. 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as nnf
from torch import Tensor

OPERATIONS_EACH = 2
SHARE = 9 / 30  # of the largest magnitude
SHEAR, TRANSLATE, DEGREES, COLOUR = 0.3, 150 / 331, 30, 0.9  # the largest ones
POSTERIZED = 2 ** round(4 * SHARE)  # levels merged into one: 7 bits remain
SOLARIZED = 255 * (1 - SHARE)
LUMA = (0.299, 0.587, 0.114)
SMOOTHED = 13.0  # sum of the kernel

Operation = Callable[[Tensor, Tensor], Tensor]


def rand_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Augments images [N, C, H, W] with values in [-1, 1]; C is 1 or 3.

    Args:
        images: float32, on any device.
        generator: CPU generator of operations and signs.
    """
    levels = ((images + 1) * 127.5).round_()
    for _ in range(OPERATIONS_EACH):
        which = torch.randint(len(OPERATIONS), (len(images),), generator=generator)
        signs = 2.0 * torch.randint(2, (len(images),), generator=generator) - 1
        changed = levels.clone()
        for number, operation in enumerate(OPERATIONS.values()):
            chosen = (which == number).nonzero()[:, 0]
            if len(chosen):
                places = chosen.to(images.device)
                signs_here = signs[chosen].to(images.device)
                changed[places] = operation(levels[places], signs_here)
        levels = changed
    return levels / 127.5 - 1


def affine(x: Tensor, matrix: Tensor) -> Tensor:
    """The image whose pixel at (x, y) is that of `x` at `matrix` [N, 2, 3] times (x, y, 1).

    Coordinates are those of `torch.nn.functional.affine_grid`: -1 and 1 are the edges.
    """
    grid = nnf.affine_grid(matrix, list(x.shape), align_corners=False)
    return nnf.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def _matrix(*rows: tuple[Tensor | float, ...], like: Tensor) -> Tensor:
    """[N, 2, 3] of numbers and tensors [N]."""
    return torch.stack(
        [torch.stack([torch.zeros_like(like) + v for v in row], -1) for row in rows], 1
    )


def _shear_x(x: Tensor, signs: Tensor) -> Tensor:
    """Shears about the top left corner, as Pillow's transform does."""
    m = SHEAR * SHARE * signs * (x.shape[2] / x.shape[3])
    return affine(x, _matrix((1.0, m, m), (0.0, 1.0, 0.0), like=signs))


def _shear_y(x: Tensor, signs: Tensor) -> Tensor:
    m = SHEAR * SHARE * signs * (x.shape[3] / x.shape[2])
    return affine(x, _matrix((1.0, 0.0, 0.0), (m, 1.0, m), like=signs))


def _pixels(side: int) -> float:
    """A translation by whole pixels, in the coordinates of `affine`."""
    return 2 * math.floor(TRANSLATE * SHARE * side) / side


def _translate_x(x: Tensor, signs: Tensor) -> Tensor:
    shift = _pixels(x.shape[3]) * signs
    return affine(x, _matrix((1.0, 0.0, shift), (0.0, 1.0, 0.0), like=signs))


def _translate_y(x: Tensor, signs: Tensor) -> Tensor:
    shift = _pixels(x.shape[2]) * signs
    return affine(x, _matrix((1.0, 0.0, 0.0), (0.0, 1.0, shift), like=signs))


def _rotate(x: Tensor, signs: Tensor) -> Tensor:
    angle = math.radians(DEGREES * SHARE)
    cos, sin = math.cos(angle), math.sin(angle) * signs
    ratio = x.shape[2] / x.shape[3]
    return affine(x, _matrix((cos, -sin * ratio, 0.0), (sin / ratio, cos, 0.0), like=signs))


def _blended(base: Callable[[Tensor], Tensor], x: Tensor, signs: Tensor) -> Tensor:
    """`base + f*(x - base)`, with f slightly below or above 1."""
    other = base(x)
    factor = 1 + COLOUR * SHARE * signs[:, None, None, None]
    return (other + factor * (x - other)).clamp_(0, 255).floor_()


def _grey(x: Tensor) -> Tensor:
    """[N, 1, H, W]."""
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True).round_()


def _mean_grey(x: Tensor) -> Tensor:
    return _grey(x).mean((1, 2, 3), keepdim=True).round_()


def _smooth(x: Tensor) -> Tensor:
    """A 3x3 blur with weight 5 at the centre; pixels at the edges do not change."""
    if min(x.shape[2:]) < 3:
        return x
    kernel = x.new_ones(3, 3)
    kernel[1, 1] = SMOOTHED - 8
    channels = x.shape[1]
    blurred = nnf.conv2d(x, (kernel / SMOOTHED).expand(channels, 1, 3, 3), groups=channels)
    out = x.clone()
    out[:, :, 1:-1, 1:-1] = blurred.round_()
    return out


def _posterize(x: Tensor, signs: Tensor) -> Tensor:
    return (x / POSTERIZED).floor_() * POSTERIZED


def _solarize(x: Tensor, signs: Tensor) -> Tensor:
    return torch.where(x >= SOLARIZED, 255 - x, x)


def _auto_contrast(x: Tensor, signs: Tensor) -> Tensor:
    """Stretches each channel to 0..255."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    stretched = ((x - low) * (255 / (high - low).clamp(min=1))).floor_()
    return torch.where(high > low, stretched, x)


def _equalize(x: Tensor, signs: Tensor) -> Tensor:
    """Equalises each channel by its cumulative histogram, in integers."""
    levels = x.flatten(2).long()
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.long, device=x.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    last = counts.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - last) // 255
    before = counts.cumsum(2) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    equalized = table.gather(2, levels).to(x.dtype).view_as(x)
    return torch.where((step > 0).unsqueeze(-1), equalized, x)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda x, signs: x,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "brightness": partial(_blended, torch.zeros_like),
    "color": partial(_blended, _grey),
    "contrast": partial(_blended, _mean_grey),
    "sharpness": partial(_blended, _smooth),
    "posterize": _posterize,
    "solarize": _solarize,
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
}
