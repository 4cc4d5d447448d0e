"""Sizes of models of images, and checks of batches of images and classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dblocks.blocks import Batch
from dblocks.config import JsonConfig


@dataclass(frozen=True)
class ImageModelConfig(JsonConfig):
    """Sizes of a transformer over patches of images."""

    image_size: int | tuple[int, int] = 32
    """Height and width in pixels; one number for a square."""
    channels: int = 3
    """Channels of the image."""
    patch_size: int = 4
    """Side of a patch in pixels; divides height and width."""
    width: int = 192
    """Width D of the tokens."""
    depth: int = 12
    """Number of layers."""
    heads: int = 3
    """Attention heads; a divisor of the width."""
    mlp_ratio: float = 4.0
    """Width inside the MLP over D."""
    num_classes: int = 10
    """Number of classes."""
    gate_init: float = 0.0
    """What the gates of conditioned layers start at: 0, as published, or 1, the plain layer."""

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        for name in ("channels", "patch_size", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 1 <= self.width * self.mlp_ratio < math.inf:
            raise ValueError(
                f"mlp_ratio must leave the MLP a finite width of at least 1, got {self.mlp_ratio}"
            )
        if not 0 <= self.gate_init < math.inf:
            raise ValueError(f"gate_init must be a finite number >= 0, got {self.gate_init}")
        size = self.height_width
        if len(size) != 2 or any(s < 1 or s % self.patch_size for s in size):
            raise ValueError(
                f"image_size must be multiples of patch_size={self.patch_size}, got {size}"
            )

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size


def entry(batch: Batch, key: str, *, of: str, sampling: str) -> Tensor:
    """The tensor `key` of a batch.

    Args:
        batch: what the network was given.
        key: "images" or "labels".
        of: the network, such as "a ViT".
        sampling: what sampling needs of the batch, such as "the images".

    Raises:
        ValueError: the batch has no such tensor.
    """
    value = batch.get(key)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{of}'s batch must hold a tensor {key!r}, got the keys {sorted(batch)}"
            f"{'' if value is None else f' with {key} of type {type(value).__name__}'}; "
            f"it is {{'images': [N, C, H, W], 'labels': [N]}}, of which sampling needs {sampling}"
        )
    return value


def check_floating(images: Tensor) -> None:
    """Raises TypeError unless images are floating point."""
    if not images.is_floating_point():
        raise TypeError(
            f"images must be floating point, got {images.dtype}; convert and scale them first"
        )


def check_labels(labels: Tensor) -> None:
    """Raises TypeError or ValueError unless labels are int64 [N]."""
    if labels.dtype != torch.int64:
        # uint8 and bool would select rows as masks do.
        raise TypeError(f"labels must be int64, got {labels.dtype}; call labels.long()")
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape [N], got {list(labels.shape)}; flatten them")


def check_label_values(labels: Tensor, num_classes: int) -> None:
    """Raises ValueError unless labels are classes, where looking at them costs nothing."""
    # On a GPU looking at the values would synchronise; there indexing itself asserts.
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or not labels.numel():
        return
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must be in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}"
        )


def check_pairs(images: Tensor, labels: Tensor) -> None:
    """Raises ValueError unless there are as many images as labels."""
    if len(images) != len(labels):
        raise ValueError(
            "images and labels must be of as many samples, "
            f"got {len(images)} images and {len(labels)} labels; pair them"
        )
