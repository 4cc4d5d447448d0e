"""Checks of the noise levels of a call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dblocks.ops._checks import values_known


def check_sigma(z: Tensor, sigma: Tensor, *, masks: bool) -> None:
    """Raises unless sigma, or t for masks, is a valid level of z; checks values on the CPU only."""
    if not sigma.is_floating_point():
        raise TypeError(f"sigma must be floating point, got {sigma.dtype}; convert it first")
    transformed = torch._C._are_functorch_transforms_active()
    if values_known(sigma) and not transformed and sigma.numel():
        low, high = (end.item() for end in sigma.detach().aminmax())
        fits = (low >= 0 and high <= 1) if masks else (low > 0 and high < math.inf)
        if not fits:
            allowed = "t must be in [0, 1]" if masks else "sigma must be positive and finite"
            raise ValueError(f"{allowed}, got {low} to {high}; see the schedule's steps()")
    if sigma.ndim == 0 or sigma.shape == z.shape[:1]:
        return
    if sigma.ndim != 2 or len(sigma) != len(z):
        raise ValueError(
            f"sigma must be a number or have shape [N] = [{len(z)}] or [N, S] = [{len(z)}, S], "
            f"got {list(sigma.shape)}; give each sample its level"
        )
    S = sigma.shape[1]
    if z.ndim != 3 or S == 0 or z.shape[1] % S:
        raise ValueError(
            "z must have shape [N, T, D] with T a multiple of S where sigma is [N, S] = "
            f"{list(sigma.shape)}, got {list(z.shape)}; reshape z, or give sigma [N]"
        )


def sigma_for(z: Tensor, sigma: Tensor) -> Tensor:
    """sigma [N] or [N, S] on the device of z, float32 (float64)."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    if sigma.ndim == 0:
        # Filling in a number from the host does not synchronise, copying it would.
        if sigma.device.type == "cpu" and z.device.type != "cpu":
            return torch.full((len(z),), sigma.item(), dtype=dtype, device=z.device)
        sigma = sigma.expand(len(z))
    return sigma.to(z.device, dtype)
