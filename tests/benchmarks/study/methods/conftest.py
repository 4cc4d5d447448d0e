import dataclasses

import pytest
import torch

from benchmarks.study.methods.run import TRAINERS, MethodRun
from dblocks.recipes.data.splits import Images
from dblocks.recipes.vit import PUBLISHED, ViTRun, ViTTrainer

CLASSES = 4
TINY = {"width": 16, "depth": 4, "heads": 2, "patch_size": 4, "batch_size": 32, "points": 1}
METHODS = {
    "greedy_4": MethodRun(method="greedy", blocks=4, steps=40, lr=5e-3, **TINY),
    "greedy_2": MethodRun(method="greedy", blocks=2, steps=40, lr=5e-3, **TINY),
    "forward_forward": MethodRun(method="forward_forward", blocks=4, steps=40, lr=5e-3, **TINY),
    "noprop_4": MethodRun(method="noprop", blocks=4, steps=160, lr=1e-2, warmup=0.0, **TINY),
    "noprop_2": MethodRun(method="noprop", blocks=2, steps=120, lr=1e-2, warmup=0.0, **TINY),
    "ensemble": MethodRun(method="ensemble", blocks=2, steps=60, lr=5e-3, **TINY),
}
OTHERS = {
    "end_to_end": ViTRun(end_to_end=True, steps=40, lr=5e-3, **TINY),
    "blocks": ViTRun(blocks=2, steps=60, lr=5e-3, **TINY),
    "published": dataclasses.replace(ViTRun(blocks=2, steps=60, lr=5e-3, **TINY), **PUBLISHED),
}


def quadrants(count, seed=0, *, scrambled=False):
    """Noisy 8x8 images, one quadrant brighter: its number is the class, or nothing tells it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = -0.6 + 0.2 * torch.randn(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
    if scrambled:
        labels = torch.randint(CLASSES, (count,), generator=generator)
    return Images(images.clamp(-1, 1), labels)


def trainer_of(run, *, scrambled=False, held_out=200):
    """The trainer of a run on such images."""
    data = quadrants(256, scrambled=scrambled), quadrants(held_out, 1, scrambled=scrambled)
    if isinstance(run, MethodRun):
        return TRAINERS[run.method](run, *data)
    return ViTTrainer(run, *data)


@pytest.fixture(params=METHODS)
def run(request):
    """A run of each method."""
    return METHODS[request.param]
