"""Accuracy, and the mean and spread of repeated runs."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction of rows whose largest logit is that of the label, in [0, 1].

    Args:
        logits: [N, classes].
        labels: int64 [N].
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must have shape [N, classes] and labels [N], got {list(logits.shape)} "
            f"and {list(labels.shape)}"
        )
    if len(labels) == 0:
        raise ValueError("accuracy needs at least one sample, got none")
    return (logits.argmax(-1) == labels).double().mean().item()


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, batch_size: int = 256
) -> float:
    """The accuracy of `predict`, images [n, C, H, W] -> logits [n, classes], in batches."""
    logits = [predict(chunk) for chunk in images.split(batch_size)]
    return accuracy(torch.cat(logits), labels)


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (divisor n-1; nan for a single value)."""
    if not values:
        raise ValueError("mean_std needs at least one value, got none")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
