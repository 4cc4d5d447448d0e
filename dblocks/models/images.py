"""Sizes of image models, and images as targets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dblocks.blocks import Batch, L2Target
from dblocks.blocks.targets.base import missing
from dblocks.blocks.targets.classes import check_label_values, check_labels
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
    """Width inside the MLP divided by D."""
    num_classes: int = 10
    """Number of classes."""
    gate_init: float = 0.0
    """Initial value of the gates of conditioned layers: 0, as published, or 1, the plain layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        for name in ("channels", "patch_size", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads, got {self.width} and {self.heads}"
            )
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


class ImageTarget(L2Target):
    """Images [N, C, H, W], conditioned on a class, with the L2 loss.

    A batch holds "images" and, with classes, "labels", int64 [N]; without classes, "labels" may be
    present and are ignored.

    Args:
        channels: C.
        patch_size: a divisor of H and W.
        num_classes: number of classes; 0 for images without classes.
    """

    def __init__(self, channels: int, patch_size: int, num_classes: int) -> None:
        super().__init__("images")
        self.channels = channels
        self.patch_size = patch_size
        self.num_classes = num_classes

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Target.reads`."""
        return ("images", "labels")

    def check(self, batch: Batch) -> Batch:
        """See `Target.check`."""
        checked = super().check(batch)
        images = batch["images"]
        self.check_shape(images.shape)
        if self.num_classes and len(labels := self.labels(batch)) != len(images):
            raise ValueError(
                "images and labels must have the same number of samples, "
                f"got {len(images)} images and {len(labels)} labels; pair them"
            )
        return checked

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raises ValueError unless `shape` is that of images for this target."""
        C, patch = self.channels, self.patch_size
        if len(shape) != 4 or shape[1] != C or any(s < patch or s % patch for s in shape[2:]):
            raise ValueError(
                f"images must have shape [N, C, H, W] = [N, {C}, H, W], with C = {C} and H and W "
                f"multiples of patch_size={patch}, got {list(shape)}; resize or crop them"
            )

    def labels(self, batch: Batch) -> Tensor:
        """`batch["labels"]` [N], checked."""
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            content = "{'images': [N, C, H, W], 'labels': [N]}, of which sampling needs the labels"
            raise missing(batch, "labels", content, of="a DiT's")
        check_labels(labels)
        check_label_values(labels, self.num_classes)
        return labels
