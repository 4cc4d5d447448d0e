"""Counter-based normals (Philox 4x32-10 and Box-Muller), noise_inject and the edm ops.

In plain PyTorch. The ops of edm stand here too, since edm_loss draws the same normals again.
"""

import math

import torch
from torch import Tensor

PHILOX_ROUND_A = 0xD2511F53  # Salmon et al. 2011, table 2 (multipliers and Weyl increments)
PHILOX_ROUND_B = 0xCD9E8D57
PHILOX_KEY_A = 0x9E3779B9
PHILOX_KEY_B = 0xBB67AE85
PHILOX_ROUNDS = 10
UNIFORM_SCALE = float.fromhex("0x1.fffffep-32")  # maps 31 bits to [0, 1)
UNIFORM_MIN = 1e-7  # keeps the logarithm finite, so |eps| <= sqrt(-2 ln 1e-7) = 5.678
TWO_PI = 6.2831855  # 2 pi in float32
_LOW32 = 0xFFFFFFFF


def philox(seed: int | Tensor, quad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 at counter (quad mod 2^32, quad >> 32, 0, 0), each word in an int64 tensor."""
    # int64 products wrap modulo 2^64, so shifting and masking still yields both 32-bit halves.
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    c0, c1 = quad & _LOW32, (quad >> 32) & _LOW32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(PHILOX_ROUNDS):
        a, b = c0 * PHILOX_ROUND_A, c2 * PHILOX_ROUND_B
        c0, c2 = ((b >> 32) & _LOW32) ^ c1 ^ k0, ((a >> 32) & _LOW32) ^ c3 ^ k1
        c1, c3 = b & _LOW32, a & _LOW32
        k0, k1 = (k0 + PHILOX_KEY_A) & _LOW32, (k1 + PHILOX_KEY_B) & _LOW32
    return c0, c1, c2, c3


def uniform(bits: Tensor) -> Tensor:
    """32 random bits (in int64) to a float32 in [0, 1)."""
    folded = torch.where(bits < 2**31, bits, _LOW32 - bits)
    return folded.to(torch.float32) * UNIFORM_SCALE


def normals(count: int, seed: int | Tensor, offset: int = 0, device=None) -> Tensor:
    """The float32 normals of elements offset .. offset + count - 1 of the stream of `seed`."""
    first = offset >> 2
    quads = ((offset + count + 3) >> 2) - first
    quad = torch.arange(first, first + quads, dtype=torch.int64, device=device)
    u0, u1, u2, u3 = (uniform(bits) for bits in philox(seed, quad))
    lanes = []
    for u_a, u_b in ((u0, u1), (u2, u3)):
        r = torch.sqrt(-2 * torch.log(u_a.clamp(min=UNIFORM_MIN)))
        theta = TWO_PI * u_b
        lanes += [r * torch.cos(theta), r * torch.sin(theta)]
    start = offset & 3
    return torch.stack(lanes, dim=-1).flatten()[start : start + count]


def broadcast_levels(value: Tensor, x: Tensor) -> Tensor:
    """sigma [N] or [N, S] shaped to broadcast against `x` [N, ...], in `x`'s arithmetic."""
    value = value.to(torch.promote_types(x.dtype, torch.float32))
    if value.ndim == 0:
        return value
    if value.ndim == 2:
        value = value.repeat_interleave(x.shape[1] // max(value.shape[1], 1), dim=1)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


def noise_inject(
    y: Tensor,
    sigma: Tensor,
    seed: int | Tensor,
    *,
    offset: int = 0,
    sigma_data: float = 0.5,
    dtype: torch.dtype | None = None,
    need_z: bool = True,
) -> tuple[Tensor | None, Tensor]:
    s = broadcast_levels(sigma, y)
    eps = normals(y.numel(), seed, offset, y.device).reshape(y.shape)
    z = (y.to(s.dtype) + s * eps.to(s.dtype)).contiguous()
    z_in = (z * torch.rsqrt(s.square() + sigma_data**2)).to(dtype or y.dtype)
    return (z if need_z else None), z_in


def _wide(a: Tensor, b: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: float64 if one of the two is, else float32."""
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def edm_denoise(f: Tensor, z: Tensor, sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    z = z.to(_wide(f, z))
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
    f = f.to(_wide(f, y))
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
    dtype = _wide(z, denoised)
    z, denoised = z.to(dtype), denoised.to(dtype)
    levels = (sigma, sigma_next)
    sigma, sigma_next = (broadcast_levels(s, z) if isinstance(s, Tensor) else s for s in levels)
    a = sigma_next / sigma
    return (a * z + (1 - a) * denoised).contiguous()
