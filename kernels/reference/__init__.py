"""Every op in plain PyTorch: the definition that each other implementation is tested against.

Arithmetic is float32, and float64 for float64 inputs. Formulas, shapes and sources stand in the
docstrings of the public functions (`dblocks.functional`); arguments are taken as already checked.
"""

from dblocks.kernels.reference._adaln import (
    adaln,
    gated_residual,
    in_forward_mode,
    residual_adaln,
)
from dblocks.kernels.reference._attention import doubled_attention, doubled_mask
from dblocks.kernels.reference._cross_entropy import linear_cross_entropy
from dblocks.kernels.reference._noise import (
    edm_denoise,
    edm_loss,
    euler_step,
    noise_inject,
    normals,
    philox,
    uniform,
)

__all__ = [
    "adaln",
    "doubled_attention",
    "doubled_mask",
    "edm_denoise",
    "edm_loss",
    "euler_step",
    "gated_residual",
    "in_forward_mode",
    "linear_cross_entropy",
    "noise_inject",
    "normals",
    "philox",
    "residual_adaln",
    "uniform",
]
