"""edm_denoise, edm_loss and euler_step in plain PyTorch."""

import math

import torch
from torch import Tensor

from dblocks.kernels.reference._arithmetic import compute_dtype
from dblocks.kernels.reference._noise import broadcast_levels, normals


def edm_denoise(f: Tensor, z: Tensor, sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    z = z.to(compute_dtype(z if z.dtype == torch.float64 else f))
    s = broadcast_levels(sigma, z)
    total = s.square() + sigma_data**2
    denoised = sigma_data**2 / total * z + s * sigma_data * torch.rsqrt(total) * f.to(z.dtype)
    return denoised.contiguous()


def edm_loss(
    f: Tensor,
    y: Tensor,
    sigma: Tensor,
    seed: int | Tensor,
    *,
    offset: int = 0,
    sigma_data: float = 0.5,
    row_weight: Tensor | None = None,
) -> Tensor:
    f = f.to(compute_dtype(f if f.dtype == torch.float64 else y))
    s = broadcast_levels(sigma, f)
    eps = normals(y.numel(), seed, offset, y.device).reshape(y.shape).to(f.dtype)
    c_in = torch.rsqrt(s.square() + sigma_data**2)
    target = c_in * (s / sigma_data * y.to(f.dtype) - sigma_data * eps)
    squared = (f - target).square()
    if row_weight is not None:
        w = row_weight.to(f.dtype)
        squared = squared * w.reshape(w.shape + (1,) * (f.ndim - w.ndim))
    squared = squared[:, None] if f.ndim == 1 else squared.flatten(1)
    return squared.sum(1) / max(math.prod(f.shape[1:]), 1)


def euler_step(
    z: Tensor, denoised: Tensor, sigma: Tensor | float, sigma_next: Tensor | float
) -> Tensor:
    dtype = compute_dtype(z if z.dtype == torch.float64 else denoised)
    z, denoised = z.to(dtype), denoised.to(dtype)
    levels = (sigma, sigma_next)
    sigma, sigma_next = (broadcast_levels(s, z) if isinstance(s, Tensor) else s for s in levels)
    a = sigma_next / sigma
    return (a * z + (1 - a) * denoised).contiguous()
