"""euler_step: a z + (1 - a) denoised with a = sigma_next / sigma, and its gradients."""

import torch
from torch import Tensor

from dblocks.kernels.edm.mix import EULER, GIVEN, mix, mix_bwd


def _factors(sigma: Tensor | None, sigma_next: Tensor | None, value: float, value_next: float):
    """Tensors, numbers and kind for `mix`: two numbers are divided here, in double."""
    if sigma is None and sigma_next is None:
        return [None, None], value_next / value, (value - value_next) / value, GIVEN
    return [sigma, sigma_next], value, value_next, EULER


def euler_step_fwd(
    z: Tensor, denoised: Tensor, sigma: Tensor | None, sigma_next: Tensor | None,
    sigma_value: float, sigma_next_value: float,
) -> Tensor:  # fmt: skip
    """a z + (1 - a) denoised in float32; the value replaces a sigma of None."""
    return mix(z, denoised, *_factors(sigma, sigma_next, sigma_value, sigma_next_value))


def euler_step_bwd(
    grad: Tensor, sigma: Tensor | None, sigma_next: Tensor | None,
    sigma_value: float, sigma_next_value: float,
    z_dtype: torch.dtype | None, denoised_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients to z and denoised, empty where no dtype is given."""
    factors = _factors(sigma, sigma_next, sigma_value, sigma_next_value)
    return mix_bwd(grad, *factors, z_dtype, denoised_dtype)
