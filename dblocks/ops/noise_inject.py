"""noise_inject: add reproducible noise, and scale for the network."""

from typing import NamedTuple

import torch
from torch import Tensor

from dblocks.kernels import reference
from dblocks.ops import _dispatch
from dblocks.ops._dispatch import Impl, check_first_order, constant, distinct, kept
from dblocks.ops._levels import OffsetSeed, check_noised, split_seed
from dblocks.ops._library import define

_FORWARD = (
    "(Tensor y, Tensor sigma, Tensor? seed_tensor, SymInt seed, SymInt offset, float sigma_data, "
    "ScalarType dtype, bool need_z) -> (Tensor z, Tensor z_in)"
)
_BACKWARD = "(Tensor? dz, Tensor dz_in, Tensor sigma, float sigma_data, ScalarType dtype) -> Tensor"


class Noised(NamedTuple):
    """The noised target and the input of the network."""

    z: Tensor | None
    z_in: Tensor


def _empty_outputs(y: Tensor, dtype: torch.dtype, need_z: bool) -> tuple[Tensor, Tensor]:
    z = y.new_empty(y.shape if need_z else (0,), dtype=torch.float32)
    return z, torch.empty(y.shape, dtype=dtype, device=y.device)


def _fwd_fake(y, sigma, seed_tensor, seed, offset, sigma_data, dtype, need_z):
    return _empty_outputs(y, dtype, need_z)


def _bwd_fake(dz, dz_in, sigma, sigma_data, dtype):
    return torch.empty(dz_in.shape, dtype=dtype, device=dz_in.device)


_FWD = define("noise_inject_fwd", _FORWARD, _fwd_fake, cpp=None, triton="noise")
_BWD = define("noise_inject_bwd", _BACKWARD, _bwd_fake, cpp=None, triton="noise")


class _NoiseInject(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, sigma, seed_tensor, seed, offset, sigma_data, dtype, need_z, impl):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept(sigma))
        ctx.sigma_data, ctx.dtype, ctx.need_z, ctx.impl = sigma_data, y.dtype, need_z, impl
        z, z_in = _FWD[impl](y, sigma, seed_tensor, seed, offset, sigma_data, dtype, need_z)
        if not need_z:
            ctx.mark_non_differentiable(z)
        return z, z_in

    @staticmethod
    def backward(ctx, dz, dz_in):
        check_first_order("noise_inject")
        dz = dz if ctx.need_z else None
        if dz_in is None:
            return (None if dz is None else dz.to(ctx.dtype), *(None,) * 8)
        (sigma,) = ctx.saved_tensors
        return (_BWD[ctx.impl](dz, dz_in, sigma, ctx.sigma_data, ctx.dtype), *(None,) * 8)


def noise_inject(
    y: Tensor,
    sigma: Tensor,
    seed: int | Tensor | OffsetSeed,
    *,
    offset: int = 0,
    sigma_data: float = 0.5,
    dtype: torch.dtype | None = None,
    need_z: bool = True,
    impl: Impl = "auto",
) -> Noised:
    """Noised target and network input: `z = y + sigma * eps` and `z_in = c_in * z`.

        c_in = 1 / sqrt(sigma^2 + sigma_data^2)

    eps is standard normal and a function of `seed` and of the element's number alone, `offset` plus
    the row-major index in the shape of `y`: the same in every implementation, layout and dtype
    (Philox 4x32-10 and Box-Muller, |eps| <= 5.678). The gradient reaches `y` from both outputs.

    Args:
        y: clean target `[N, ...]`, `[N, T, D]` where `sigma` is `[N, S]`. `[N, T, D]` may have any
            strides of samples and tokens, zero and chunk views included; a last stride other than
            1, and other shapes whose samples are not contiguous, cost a copy.
        sigma: noise levels > 0, at most 1e18, 0-d, `[N]` or `[N, S]`: segment s covers T/S
            consecutive tokens. No gradient, but a tangent in forward mode. On the CPU its values
            are checked. In a compiled graph the reference alone does not allow a change in place
            before backward.
        seed: an int of 64 bits (two's complement), or a 0-d int64 tensor on the device; or an
            `OffsetSeed` of either, whose offset is added.
        offset: the number of the first element, >= 0; that of the last is < 2**63.
        sigma_data: standard deviation of the data.
        dtype: dtype of `z_in`; that of `y` by default.
        need_z: whether `z` is written.
        impl: "reference" (plain PyTorch: any device and dtype, any transform), "triton" (GPU; on
            the CPU under TRITON_INTERPRET=1), "cpp" (CPU), or "auto": Triton on a GPU, C++ on a CPU
            where it is built, else the reference; the reference too for float64 and inside
            torch.func transforms and forward-mode differentiation. Triton and C++ have first-order
            autograd only.

    Returns:
        `Noised(z, z_in)`, both of the shape of `y` and contiguous: `z` float32 (float64 for
        float64), or `None`; `z_in` rounded once to `dtype`. Arithmetic is float32 (float64 for
        float64 `y`; eps is float32 always).

    Raises:
        ValueError: for an invalid shape or value.
        TypeError: for an invalid dtype.
        RuntimeError: for tensors on several devices, or a named `impl` that cannot run here.
        ImportError: for impl="triton" without the package triton.

    Source: Karras et al. 2022, table 1 and eq. 7; Salmon et al. 2011 (Philox).
    """
    if not _dispatch.noised_fit((y,), sigma, sigma_data):
        check_noised({"y": y}, sigma, sigma_data)
    if dtype is not None and dtype not in _dispatch.FLOATS:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16, got {dtype}")
    if isinstance(seed, OffsetSeed):
        seed, offset = seed.seed, seed.offset + offset
    split = _dispatch.known_seed(seed, offset, y) or split_seed(seed, offset, y)
    seed_tensor, number = split
    sigma = constant(sigma)
    impl = _dispatch.resolve_impl(impl, y, "noise_inject")
    if impl != "reference":
        call = (y, sigma, seed_tensor, number, offset, float(sigma_data), dtype or y.dtype, need_z)
        watched = _dispatch.needs_autograd(y)
        z, z_in = _NoiseInject.apply(*distinct(*call, impl)) if watched else _FWD[impl](*call)
        return Noised(z if need_z else None, z_in)
    return Noised(
        *reference.noise_inject(
            y, sigma, number if seed_tensor is None else seed_tensor,
            offset=offset, sigma_data=sigma_data, dtype=dtype, need_z=need_z,
        )
    )  # fmt: skip
