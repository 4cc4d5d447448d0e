"""A small classifier of images, for the evaluation of generated images."""

from __future__ import annotations

import hashlib
import math

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dblocks.config import json_text
from dblocks.recipes.data.cache import cache_folder, replacing
from dblocks.recipes.data.splits import Images, batch_indices, values

FEATURES = 32  # few features, so that some hundred images suffice for their covariance
WIDTH = 16
POOLED = 2  # side of the last feature map
SEED = 77_000  # a seed that runs do not use
LEAST_STEPS, MOST_STEPS = 400, 4000  # bounds of the number of steps; one epoch in between
FORMAT = 1  # version of the cached weights
BATCH_SIZE = 64
LR = 3e-3
WEIGHT_DECAY = 0.5


class ImageClassifier(nn.Module):
    """Four convolutions and two linear layers, with features of norm sqrt(32).

    Args:
        channels: channels of the images, which may have any size.
        num_classes: number of classes.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        W = WIDTH
        self.features = nn.Sequential(
            nn.Conv2d(channels, W, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(W, 2 * W, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(2 * W, 2 * W, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(2 * W, 4 * W, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(POOLED),
            nn.Flatten(),
            nn.Linear(4 * W * POOLED**2, FEATURES),
            # Normalised, so that distances do not depend on the scale of features.
            nn.LayerNorm(FEATURES, elementwise_affine=False),
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W]."""
        return self.head(self.features(images))


def steps_of(data: Images) -> int:
    """Number of training steps of the classifier: one epoch, but 400 to 4,000."""
    return min(max(LEAST_STEPS, len(data) // BATCH_SIZE), MOST_STEPS)


def judge_of(data: Images, num_classes: int, *, device: str = "cpu") -> ImageClassifier:
    """The classifier of a data set: the cached result of `train_judge` with `steps_of` steps.

    All runs on a machine with the same data use the same classifier.

    Args:
        data: the training images.
        num_classes: number of classes.
        device: device of training and of the result.
    """
    about = [FORMAT, data.digest(), num_classes, steps_of(data), torch.__version__]
    key = hashlib.sha256(json_text([*about, torch.device(device).type]).encode()).hexdigest()
    path = cache_folder() / f"judge-{key}.safetensors"
    if path.is_file():
        judge = _untrained(data, num_classes)
        judge.load_state_dict(load_file(path))
        return judge.to(device).eval().requires_grad_(False)
    judge = train_judge(data, num_classes, steps=steps_of(data), device=device)
    state = {name: tensor.cpu().contiguous() for name, tensor in judge.state_dict().items()}
    with replacing(path) as file:
        file.write(save(state))
    return judge


def train_judge(
    data: Images, num_classes: int, *, steps: int = LEAST_STEPS, device: str = "cpu"
) -> ImageClassifier:
    """Trains a classifier on `data`; with its fixed seed, the result is the same in every call.

    Args:
        data: the training images.
        num_classes: number of classes.
        steps: number of steps, with batches of 64.
        device: device of training.
    """
    judge = _untrained(data, num_classes).to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    batch_size = min(BATCH_SIZE, len(data))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = data[batch_indices(len(data), batch_size, seed=SEED, step=step)]
        logits = judge(values(chosen.images).to(device))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, chosen.labels.to(device)).backward()
        optimizer.step()
    return judge.eval().requires_grad_(False)


def _untrained(data: Images, num_classes: int) -> ImageClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return ImageClassifier(data.images.shape[1], num_classes)
