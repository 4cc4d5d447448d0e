"""Checks of batches of images and classes."""

from __future__ import annotations

import torch
from torch import Tensor

from dblocks._parts import Batch


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
