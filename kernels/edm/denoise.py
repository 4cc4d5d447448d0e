"""edm_denoise: the denoised estimate c_skip z + c_out f, and its gradients."""

import torch
from torch import Tensor

from dblocks.kernels._common.launches import Plan
from dblocks.kernels._common.runs import copies
from dblocks.kernels.edm.mix import DENOISE, mix, mix_bwd


def edm_denoise_fwd(f: Tensor, z: Tensor, sigma: Tensor, sigma_data: float) -> Plan:
    """c_skip z + c_out f in float32."""
    launch = mix(z, f, [sigma, None], DENOISE)

    def run(f, z, sigma, sigma_data):
        out = z.new_empty(z.shape, dtype=torch.float32)
        if launch is not None:
            launch.start(z, f, out, sigma, None, 1.0, sigma_data, *launch.numbers)
        return out

    return copies(f, z), run


def edm_denoise_bwd(
    grad: Tensor, sigma: Tensor, sigma_data: float,
    f_dtype: torch.dtype | None, z_dtype: torch.dtype | None,
) -> Plan:  # fmt: skip
    """The gradients to f and z, empty where no dtype is given."""
    launch = mix_bwd(grad, [sigma, None], DENOISE, z_dtype is not None, f_dtype is not None)

    def run(grad, sigma, sigma_data, f_dtype, z_dtype):
        df, dz = (
            grad.new_empty(0) if dtype is None else grad.new_empty(grad.shape, dtype=dtype)
            for dtype in (f_dtype, z_dtype)
        )
        if launch is not None:
            launch.start(grad, dz, df, sigma, None, 1.0, sigma_data, *launch.numbers)
        return df, dz

    return copies(grad), run
