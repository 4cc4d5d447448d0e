"""All ops: shapes, inputs, eager PyTorch in its best form, bytes and operations.

Bytes are those read and written by a fully fused implementation, for most ops per element of
[N, T, D] with `e` the size of the dtype; modulations and losses are small and not counted.
Operations are the additions and multiplications of the formula, where a function counts as one; for
noise they include the 32-bit multiplications, additions and exclusive ors of Philox.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import dblocks.functional as D
from benchmarks.ops import attention, cross_entropy
from benchmarks.ops.op import SEED, Op, Work

EPS = 1e-6


def _per_element(
    bytes_forward: Callable[[int], int], bytes_backward: Callable[[int], int],
    operations: tuple[int, int],
) -> Callable[[Sequence[int], int], Work]:  # fmt: skip
    """The work of an op with the same cost for every element."""

    def work(shape: Sequence[int], size: int) -> Work:
        each = (bytes_forward(size), bytes_backward(size), *operations)
        return Work(*(math.prod(shape) * count for count in each))

    return work


def _rows(*names: str) -> Callable[..., dict[str, Tensor]]:
    """Normal tensors [N, T, D], and shift, scale, gate as chunks of one [N, 3 D]."""

    def make(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        N, _, width = shape
        g = torch.Generator(device).manual_seed(SEED)
        modulation = torch.randn(N, 3 * width, generator=g, device=device, dtype=dtype)
        chunks = dict(zip(("shift", "scale", "gate"), modulation.chunk(3, -1), strict=True))
        return {
            name: chunks[name]
            if name in chunks
            else torch.randn(*shape, generator=g, device=device, dtype=dtype)
            for name in names
        }

    return make


def _diffusion(*names: str) -> Callable[..., dict[str, Tensor]]:
    """Normal tensors [N, T, D] (z and denoised in float32) and one sigma per sample."""

    def make(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        g = torch.Generator(device).manual_seed(SEED)
        wide = {"z": torch.float32, "denoised": torch.float32}
        tensors = {
            name: torch.randn(*shape, generator=g, device=device, dtype=wide.get(name, dtype))
            for name in names
        }
        return tensors | {"sigma": torch.logspace(-2, 1, shape[0], device=device)}

    return make


def _eager_adaln(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor]:
    return (
        torch.addcmul(shift[:, None], F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale[:, None]),
    )


def _eager_rms(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor]:
    return (
        torch.addcmul(shift[:, None], F.rms_norm(x, x.shape[-1:], eps=EPS), 1 + scale[:, None]),
    )


def _eager_residual(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    x_new = torch.addcmul(x, gate[:, None], branch)
    return x_new, *_eager_adaln(x_new, shift, scale)


def _eager_noise(y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    s = sigma[:, None, None]
    z = torch.addcmul(y.float(), s, torch.randn_like(y, dtype=torch.float32))
    return z, (z * torch.rsqrt(s.square() + 0.25)).to(y.dtype)


def _eager_denoise(f: Tensor, z: Tensor, sigma: Tensor) -> tuple[Tensor]:
    s = sigma[:, None, None]
    total = s.square() + 0.25
    return (torch.addcmul(0.25 / total * z, s * 0.5 * torch.rsqrt(total), f.float()),)


def _eager_loss(f: Tensor, y: Tensor, sigma: Tensor) -> tuple[Tensor]:
    s = sigma[:, None, None]
    eps = torch.randn_like(y, dtype=torch.float32)
    target = torch.rsqrt(s.square() + 0.25) * (2 * s * y.float() - 0.5 * eps)
    return ((f.float() - target).square().flatten(1).mean(1),)


def _eager_euler(z: Tensor, denoised: Tensor, sigma: Tensor) -> tuple[Tensor]:
    return (torch.lerp(denoised, z, (0.5 * sigma / sigma)[:, None, None]),)


OPS = (
    Op(
        "adaln", _rows("x", "shift", "scale"), ("x", "shift", "scale"),
        lambda x, shift, scale: (D.adaln(x, shift, scale, eps=EPS),), _eager_adaln,
        _per_element(lambda e: 2 * e, lambda e: 3 * e, (7, 17)),
        others=("liger_layer_norm", "flash_attn_layer_norm"),
    ),
    Op(
        "adaln_rms", _rows("x", "shift", "scale"), ("x", "shift", "scale"),
        lambda x, shift, scale: (D.adaln(x, shift, scale, norm="rms", eps=EPS),), _eager_rms,
        _per_element(lambda e: 2 * e, lambda e: 3 * e, (5, 14)),
        others=("liger_modulated_rms_norm",),
    ),
    Op(
        "residual_adaln", _rows("x", "branch", "gate", "shift", "scale"),
        ("x", "branch", "gate", "shift", "scale"),
        lambda **k: D.residual_adaln(**k, eps=EPS), _eager_residual,
        _per_element(lambda e: 4 * e, lambda e: 6 * e, (9, 20)),
    ),
    Op(
        "gated_residual", _rows("x", "branch", "gate"), ("x", "branch", "gate"),
        lambda **k: (D.gated_residual(**k),),
        lambda x, branch, gate: (torch.addcmul(x, gate[:, None], branch),),
        _per_element(lambda e: 3 * e, lambda e: 3 * e, (2, 3)),
    ),
    Op(
        "noise_inject", _diffusion("y"), ("y",),
        lambda y, sigma: D.noise_inject(y, sigma, SEED), _eager_noise,
        _per_element(lambda e: 2 * e + 4, lambda e: 2 * e + 4, (47, 2)),
        oracle=lambda y, sigma: D.noise_inject(y, sigma, SEED, impl="reference"),
    ),
    Op(
        "edm_denoise", _diffusion("f", "z"), ("f", "z"),
        lambda f, z, sigma: (D.edm_denoise(f, z, sigma),), _eager_denoise,
        _per_element(lambda e: e + 8, lambda e: e + 8, (3, 2)),
    ),
    Op(
        "edm_loss", _diffusion("f", "y"), ("f",),
        lambda f, y, sigma: (D.edm_loss(f, y, sigma, SEED),), _eager_loss,
        _per_element(lambda e: 3 * e, lambda e: 2 * e, (50, 1)),
        oracle=lambda f, y, sigma: (D.edm_loss(f, y, sigma, SEED, impl="reference"),),
    ),
    Op(
        "euler_step", _diffusion("z", "denoised"), (),
        lambda z, denoised, sigma: (D.euler_step(z, denoised, sigma, 0.5 * sigma),), _eager_euler,
        _per_element(lambda e: 12, lambda e: 12, (3, 0)),
    ),
    attention.OP,
    cross_entropy.OP,
)  # fmt: skip
