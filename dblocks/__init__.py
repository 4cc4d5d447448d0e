"""dblocks: fused noise-conditioned layers, and residual networks trained one block at a time.

Names are imported on first use: `import dblocks` loads no network and no other library than torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dblocks._version import __version__ as __version__

if TYPE_CHECKING:
    from dblocks import blocks as blocks
    from dblocks import checkpoint as checkpoint
    from dblocks import functional as functional
    from dblocks import integrations as integrations
    from dblocks import models as models
    from dblocks import nn as nn
    from dblocks import sampling as sampling
    from dblocks import scale as scale
    from dblocks import schedules as schedules
    from dblocks.blocks import BlockOptimizers as BlockOptimizers
    from dblocks.blocks import BlocksConfig as BlocksConfig
    from dblocks.blocks import DiffusionBlocks as DiffusionBlocks
    from dblocks.blocks import Loss as Loss
    from dblocks.blocks import StepResult as StepResult
    from dblocks.blocks import make_optimizers as make_optimizers
    from dblocks.blocks import train_step as train_step
    from dblocks.checkpoint import load_model as load_model
    from dblocks.checkpoint import save_model as save_model
    from dblocks.integrations.convert import ConvertedBlocks as ConvertedBlocks
    from dblocks.integrations.convert import convert as convert
    from dblocks.integrations.fuse import fuse_ as fuse_
    from dblocks.integrations.fuse import unfuse_ as unfuse_
    from dblocks.sampling import generate as generate
    from dblocks.sampling import initial_noise as initial_noise
    from dblocks.sampling import sample_euler as sample_euler
    from dblocks.sampling import sample_heun as sample_heun
    from dblocks.sampling import sample_logits as sample_logits
    from dblocks.sampling import unmask as unmask
    from dblocks.schedules import CosineNoiseSchedule as CosineNoiseSchedule
    from dblocks.schedules import LogUniformNoiseSchedule as LogUniformNoiseSchedule
    from dblocks.schedules import MaskSchedule as MaskSchedule
    from dblocks.schedules import NoiseSchedule as NoiseSchedule

_MODULE_OF = {
    **dict.fromkeys(
        (
            "BlockOptimizers",
            "BlocksConfig",
            "DiffusionBlocks",
            "Loss",
            "StepResult",
            "make_optimizers",
            "train_step",
        ),
        "dblocks.blocks",
    ),
    **dict.fromkeys(("load_model", "save_model"), "dblocks.checkpoint"),
    **dict.fromkeys(("ConvertedBlocks", "convert"), "dblocks.integrations.convert"),
    **dict.fromkeys(("fuse_", "unfuse_"), "dblocks.integrations.fuse"),
    **dict.fromkeys(
        ("generate", "initial_noise", "sample_euler", "sample_heun", "sample_logits", "unmask"),
        "dblocks.sampling",
    ),
    **dict.fromkeys(
        ("CosineNoiseSchedule", "LogUniformNoiseSchedule", "MaskSchedule", "NoiseSchedule"),
        "dblocks.schedules",
    ),
}
_MODULES = (
    "blocks",
    "checkpoint",
    "functional",
    "integrations",
    "models",
    "nn",
    "sampling",
    "scale",
    "schedules",
)

__all__ = ["__version__", *_MODULE_OF, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    elif name in _MODULES:
        value = import_module(f"dblocks.{name}")
    else:
        raise AttributeError(f"module 'dblocks' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, *_MODULES})
