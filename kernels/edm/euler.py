"""euler_step: a z + (1 - a) denoised with a = sigma_next / sigma, and its gradients."""

import torch
from torch import Tensor

from dblocks.kernels._common.launches import Plan
from dblocks.kernels._common.runs import copies
from dblocks.kernels.edm.mix import EULER, GIVEN, mix, mix_bwd


def _kind(sigma: Tensor | None, sigma_next: Tensor | None):
    return GIVEN if sigma is None and sigma_next is None else EULER


def _numbers(
    sigma: Tensor | None, sigma_next: Tensor | None, value: float, value_next: float
) -> tuple[float, float]:
    """Those for `mix`: of two given ones the factors, divided here, in double."""
    if sigma is None and sigma_next is None:
        return value_next / value, (value - value_next) / value
    return value, value_next


def euler_step_fwd(
    z: Tensor, denoised: Tensor, sigma: Tensor | None, sigma_next: Tensor | None,
    sigma_value: float, sigma_next_value: float,
) -> Plan:  # fmt: skip
    """a z + (1 - a) denoised in float32; the value replaces a sigma of None."""
    launch = mix(z, denoised, [sigma, sigma_next], _kind(sigma, sigma_next))

    def run(z, denoised, sigma, sigma_next, value, value_next):
        out = z.new_empty(z.shape, dtype=torch.float32)
        if launch is not None:
            values = _numbers(sigma, sigma_next, value, value_next)
            launch.start(z, denoised, out, sigma, sigma_next, *values, *launch.numbers)
        return out

    return copies(z, denoised), run


def euler_step_bwd(
    grad: Tensor, sigma: Tensor | None, sigma_next: Tensor | None,
    sigma_value: float, sigma_next_value: float,
    z_dtype: torch.dtype | None, denoised_dtype: torch.dtype | None,
) -> Plan:  # fmt: skip
    """The gradients to z and denoised, empty where no dtype is given."""
    needs = (z_dtype is not None, denoised_dtype is not None)
    launch = mix_bwd(grad, [sigma, sigma_next], _kind(sigma, sigma_next), *needs)

    def run(grad, sigma, sigma_next, value, value_next, z_dtype, denoised_dtype):
        dz, dw = (
            grad.new_empty(0) if dtype is None else grad.new_empty(grad.shape, dtype=dtype)
            for dtype in (z_dtype, denoised_dtype)
        )
        if launch is not None:
            values = _numbers(sigma, sigma_next, value, value_next)
            launch.start(grad, dz, dw, sigma, sigma_next, *values, *launch.numbers)
        return dz, dw

    return copies(grad), run
