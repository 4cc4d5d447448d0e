"""edm_denoise: the denoised estimate c_skip z + c_out f, and its gradients."""

import torch
from torch import Tensor

from dblocks.kernels.edm.mix import DENOISE, mix, mix_bwd


def edm_denoise_fwd(f: Tensor, z: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """c_skip z + c_out f in float32."""
    return mix(z, f, [sigma, None], 1.0, sigma_data, DENOISE)


def edm_denoise_bwd(
    grad: Tensor, sigma: Tensor, sigma_data: float,
    f_dtype: torch.dtype | None, z_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients to f and z, empty where no dtype is given."""
    dz, df = mix_bwd(grad, [sigma, None], 1.0, sigma_data, DENOISE, z_dtype, f_dtype)
    return df, dz
