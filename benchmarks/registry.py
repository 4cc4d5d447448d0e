"""Every op once: shapes, inputs, its peers in their best plain form, bytes and operations.

Bytes are what an implementation that fuses everything reads and writes, counted per element of
[N, T, D] with `e` the size of the dtype; modulations and losses are left out as too small to count.
Operations are the additions and multiplications of the formula per element, a function counting as
one; of noise they are the 32-bit multiplications, additions and exclusive ors of Philox as well.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import dblocks.functional as D

Peer = Callable[..., Sequence[Tensor | None]]

SEED = 20_261_123
EPS = 1e-6


# The shapes [N, T, D] of each device; that of the GPU has 64M elements, 128 MiB in bfloat16.
SHAPES = {
    "cpu": ((4, 64, 192), (2, 512, 768), (4, 1024, 1024), (2, 2048, 2048)),
    "cuda": ((8, 4096, 2048), (4, 256, 768)),
}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}


class Op(NamedTuple):
    """`make` draws the inputs; `ours` and `eager` take them and return a sequence of outputs."""

    name: str
    make: Callable[[Sequence[int], torch.dtype, torch.device], dict[str, Tensor]]
    needs_grad: tuple[str, ...]
    ours: Peer
    eager: Peer
    bytes_forward: Callable[[int], int]
    bytes_backward: Callable[[int], int]
    operations: tuple[int, int]  # per element, forward and backward
    # Of an op whose peers draw other noise, so that only their size can be compared: plain PyTorch
    # with the noise of dblocks, which that is checked against.
    oracle: Peer | None = None
    others: tuple[str, ...] = ()  # names in benchmarks/peers.py, beside eager and torch.compile


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
    """Normal tensors [N, T, D] (z and denoised in float32) and one sigma a sample."""

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
        lambda e: 2 * e, lambda e: 3 * e, (7, 17),
        others=("liger_layer_norm", "flash_attn_layer_norm"),
    ),
    Op(
        "adaln_rms", _rows("x", "shift", "scale"), ("x", "shift", "scale"),
        lambda x, shift, scale: (D.adaln(x, shift, scale, norm="rms", eps=EPS),), _eager_rms,
        lambda e: 2 * e, lambda e: 3 * e, (5, 14),
        others=("liger_modulated_rms_norm",),
    ),
    Op(
        "residual_adaln", _rows("x", "branch", "gate", "shift", "scale"),
        ("x", "branch", "gate", "shift", "scale"),
        lambda **k: D.residual_adaln(**k, eps=EPS), _eager_residual,
        lambda e: 4 * e, lambda e: 6 * e, (9, 20),
    ),
    Op(
        "gated_residual", _rows("x", "branch", "gate"), ("x", "branch", "gate"),
        lambda **k: (D.gated_residual(**k),),
        lambda x, branch, gate: (torch.addcmul(x, gate[:, None], branch),),
        lambda e: 3 * e, lambda e: 3 * e, (2, 3),
    ),
    Op(
        "noise_inject", _diffusion("y"), ("y",),
        lambda y, sigma: D.noise_inject(y, sigma, SEED), _eager_noise,
        lambda e: 2 * e + 4, lambda e: 2 * e + 4, (47, 2),
        oracle=lambda y, sigma: D.noise_inject(y, sigma, SEED, impl="reference"),
    ),
    Op(
        "edm_denoise", _diffusion("f", "z"), ("f", "z"),
        lambda f, z, sigma: (D.edm_denoise(f, z, sigma),), _eager_denoise,
        lambda e: e + 8, lambda e: e + 8, (3, 2),
    ),
    Op(
        "edm_loss", _diffusion("f", "y"), ("f",),
        lambda f, y, sigma: (D.edm_loss(f, y, sigma, SEED),), _eager_loss,
        lambda e: 2 * e, lambda e: 3 * e, (50, 49),
        oracle=lambda f, y, sigma: (D.edm_loss(f, y, sigma, SEED, impl="reference"),),
    ),
    Op(
        "euler_step", _diffusion("z", "denoised"), (),
        lambda z, denoised, sigma: (D.euler_step(z, denoised, sigma, 0.5 * sigma),), _eager_euler,
        lambda e: 12, lambda e: 12, (3, 0),
    ),
)  # fmt: skip
