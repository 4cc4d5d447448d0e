"""What the tests of the diffusion transformer set up in the same way."""

import torch

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.models import DiT, DiTConfig
from tools import DEVICE, randomized, seeded

SIZES = {
    "image_size": (4, 6),
    "channels": 3,
    "patch_size": 2,
    "width": 24,
    "depth": 6,
    "heads": 2,
    "num_classes": 5,
}


def dit_of(**options):
    torch.manual_seed(0)
    return DiT(DiTConfig(**{**SIZES, **options})).to(DEVICE)


def blocks_of(num_blocks=3, **options):
    return DiffusionBlocks(randomized(dit_of(**options)), BlocksConfig(num_blocks))


def batch_of(n=4, seed=0, size=(4, 6)):
    images = torch.randn(n, 3, *size, generator=seeded(seed)).to(DEVICE)
    return {"images": images, "labels": torch.arange(n, device=DEVICE) % 5}


def some_labels(n=4):
    return torch.arange(n, device=DEVICE) % 5
