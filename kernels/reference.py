"""Every op in plain PyTorch: the definition that each other implementation is tested against.

Arithmetic is float32, and float64 for float64 inputs. Formulas, shapes and sources stand in the
docstrings of the public functions (`dblocks.functional`); arguments are taken as already checked.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dblocks.kernels._arithmetic import compute_dtype, without_autocast
from dblocks.kernels._reference_attention import doubled_attention, doubled_mask

__all__ = [
    "adaln",
    "compute_dtype",
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
    "without_autocast",
]

PHILOX_ROUND_A = 0xD2511F53  # Salmon et al. 2011, table 2 (multipliers and Weyl increments)
PHILOX_ROUND_B = 0xCD9E8D57
PHILOX_KEY_A = 0x9E3779B9
PHILOX_KEY_B = 0xBB67AE85
PHILOX_ROUNDS = 10
UNIFORM_SCALE = float.fromhex("0x1.fffffep-32")  # maps 31 bits to [0, 1)
UNIFORM_MIN = 1e-7  # keeps the logarithm finite, so |eps| <= sqrt(-2 ln 1e-7) = 5.678
TWO_PI = 6.2831855  # 2 pi in float32
_LOW32 = 0xFFFFFFFF


def _segments(x: Tensor, modulation: Tensor) -> Tensor:
    """A modulation [N, D] or [N, S, D] as [N, T, D] (or [N, 1, D]) in the dtype of `x`."""
    modulation = modulation.to(x.dtype)
    if modulation.ndim == 2:
        return modulation[:, None]
    N, S, D = modulation.shape
    T = x.shape[1]
    if S == T:
        return modulation
    return modulation[:, :, None].expand(N, S, T // S, D).reshape(N, T, D)


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is active, that of torch.func too."""
    return forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result sets, without its import of the compiler: a graph takes
# the answer of the moment when it is traced, and guards on the level by itself.
in_forward_mode._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _layer_norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if not in_forward_mode():
        return F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    # Gradients of PyTorch's tangent of layer_norm are wrong: they take mean and variance as given.
    h = h - h.mean(-1, keepdim=True)
    h = h * (h.square().mean(-1, keepdim=True) + eps).rsqrt()
    h = h if weight is None else h * weight
    return h if bias is None else h + bias


def adaln(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    h = x.to(compute_dtype(x))
    weight, bias = (None if p is None else p.to(h.dtype) for p in (weight, bias))
    if norm == "layer":
        h = _layer_norm(h, weight, bias, eps)
    else:
        h = F.rms_norm(h, h.shape[-1:], weight, eps)
        h = h if bias is None else h + bias
    if scale is not None:
        h = h * (1 + _segments(h, scale))
    if shift is not None:
        h = h + _segments(h, shift)
    return h.to(out_dtype or x.dtype).contiguous()


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `x` after a round trip through `dtype`, its gradients as they are."""
    if x.dtype == dtype:
        return x
    # What is added is 0 and carries the gradient; inf - inf would be NaN.
    return x.detach().to(dtype).to(x.dtype) + (x - x.detach()).nan_to_num()


def _stream(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * branch before it is rounded."""
    h = branch.to(compute_dtype(x))
    if gate is None:
        return x.to(h.dtype) + h
    return torch.addcmul(x.to(h.dtype), _segments(h, gate), h)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return _stream(x, branch, gate).to(x.dtype).contiguous()


def residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    h = _stream(x, branch, gate)
    # The norm sees x_new as it is stored, but no gradient passes through 16 bits on its way to h.
    y = adaln(
        _rounded(h, x.dtype), shift, scale,
        weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype or x.dtype,
    )  # fmt: skip
    return h.to(x.dtype).contiguous(), y


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


def _like(value: Tensor, x: Tensor) -> Tensor:
    """sigma [N] or [N, S] shaped to broadcast against `x` [N, ...], in `x`'s arithmetic."""
    value = value.to(compute_dtype(x))
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
    s = _like(sigma, y)
    eps = normals(y.numel(), seed, offset, y.device).reshape(y.shape)
    z = (y.to(s.dtype) + s * eps.to(s.dtype)).contiguous()
    z_in = (z * torch.rsqrt(s.square() + sigma_data**2)).to(dtype or y.dtype)
    return (z if need_z else None), z_in


def edm_denoise(f: Tensor, z: Tensor, sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    z = z.to(compute_dtype(z if z.dtype == torch.float64 else f))
    s = _like(sigma, z)
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
    s = _like(sigma, f)
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
    sigma, sigma_next = (_like(s, z) if isinstance(s, Tensor) else s for s in (sigma, sigma_next))
    a = sigma_next / sigma
    return (a * z + (1 - a) * denoised).contiguous()


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    dtype, shape = compute_dtype(h), target.shape
    h, target = h.reshape(target.numel(), h.shape[-1]), target.flatten()
    counted = target != ignore_index
    factors = counted.to(dtype)
    if row_weight is not None:
        factors = row_weight.flatten().to(dtype).where(counted, 0)
    used = factors != 0
    rows = h.to(dtype).masked_fill(~used[:, None], 0)
    with without_autocast(h.device):
        logits = F.linear(
            rows, weight.to(h.dtype).to(dtype), None if bias is None else bias.to(dtype)
        )
        losses = F.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index)
    losses = losses.where(used, 0) * factors
    if reduction == "none":
        return losses.view(shape)
    return losses.sum() / counted.sum().clamp(min=1)
