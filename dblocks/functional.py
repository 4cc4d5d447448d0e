"""The public ops of dblocks."""

from dblocks.ops._levels import OffsetSeed
from dblocks.ops.adaln import adaln
from dblocks.ops.doubled_attention import doubled_attention
from dblocks.ops.edm_denoise import edm_denoise
from dblocks.ops.edm_loss import edm_loss
from dblocks.ops.euler_step import euler_step
from dblocks.ops.gated_residual import gated_residual
from dblocks.ops.linear_cross_entropy import linear_cross_entropy
from dblocks.ops.noise_inject import Noised, noise_inject
from dblocks.ops.residual_adaln import Residual, residual_adaln

__all__ = [
    "Noised",
    "OffsetSeed",
    "Residual",
    "adaln",
    "doubled_attention",
    "edm_denoise",
    "edm_loss",
    "euler_step",
    "gated_residual",
    "linear_cross_entropy",
    "noise_inject",
    "residual_adaln",
]
