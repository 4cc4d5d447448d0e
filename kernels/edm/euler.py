"""euler_step: a z + (1 - a) denoised with a = sigma_next / sigma, and its gradients."""

import torch
from torch import Tensor

from dblocks.kernels.edm.mix import EULER, GIVEN, mix, mix_bwd


def _factors(sigmas: list[Tensor | None], values: list[float]):
    """Tensors, numbers and kind for `mix`: two numbers are divided here, in double."""
    s, after = values
    if sigmas == [None, None]:
        return sigmas, after / s, (s - after) / s, GIVEN
    return sigmas, s, after, EULER


def euler_step_fwd(
    z: Tensor, denoised: Tensor, sigmas: list[Tensor | None], values: list[float]
) -> Tensor:
    """a z + (1 - a) denoised of non-empty tensors; an absent sigma is the value beside it."""
    return mix(z, denoised, *_factors(sigmas, values))


def euler_step_bwd(
    grad: Tensor, sigmas: list[Tensor | None], values: list[float],
    z_dtype: torch.dtype | None, denoised_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients to z and denoised, empty where no dtype is given."""
    return mix_bwd(grad, *_factors(sigmas, values), z_dtype, denoised_dtype)
