"""What several test files set up in the same way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dblocks.models import ViT, ViTConfig
from dblocks.ops import _extension

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO_CPP = _extension.MISSING or ("" if DEVICE.type == "cpu" else "the tensors are on a GPU")
needs_cpp = pytest.mark.skipif(bool(NO_CPP), reason=f"C++ ops: {NO_CPP}")
FUSED = ("triton", pytest.param("cpp", marks=needs_cpp))
IMPLS = ("reference", *FUSED)
SIZES = {"image_size": 8, "patch_size": 4, "width": 24, "depth": 6, "heads": 2, "num_classes": 5}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Elsewhere(torch.Generator):
    """A generator that says it is on another device, which need not be there."""

    device = torch.device("meta")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed)).to(DEVICE)


def vit(**options):
    torch.manual_seed(0)
    return ViT(ViTConfig(**{**SIZES, **options})).to(DEVICE)


def randomized(model):
    """Random parameters: gates that are zero would hide the layers."""
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def batch(n=8):
    return {"images": normal(n, 3, 8, 8, seed=2), "labels": torch.arange(n, device=DEVICE) % 5}


def op(name, impl):
    """An implementation of an op as it is registered."""
    return getattr(torch.ops.dblocks, f"{name}_{impl}").default


def compiled(module, *arguments, **more):
    """Runs a module that compiles for GPUs: the tests' interpreter must not be on in it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | more
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
