"""edm_denoise: the estimate of the clean target from the network's output."""

import torch
from torch import Tensor

from dblocks.kernels import reference
from dblocks.ops import _dispatch
from dblocks.ops._dispatch import Impl, check_first_order, constant, distinct, kept, widest
from dblocks.ops._levels import check_noised
from dblocks.ops._library import define

_FORWARD = "(Tensor f, Tensor z, Tensor sigma, float sigma_data) -> Tensor"
_BACKWARD = (
    "(Tensor grad, Tensor sigma, float sigma_data, ScalarType? f_dtype, ScalarType? z_dtype)"
    " -> (Tensor df, Tensor dz)"
)


def empty_grads(grad: Tensor, *dtypes: torch.dtype | None) -> tuple[Tensor, ...]:
    """A tensor like `grad` in each dtype, without elements for an absent one."""
    return tuple(
        grad.new_empty(0) if d is None else torch.empty(grad.shape, dtype=d, device=grad.device)
        for d in dtypes
    )


def _fwd_fake(f, z, sigma, sigma_data):
    return torch.empty(z.shape, dtype=torch.float32, device=z.device)


def _bwd_fake(grad, sigma, sigma_data, f_dtype, z_dtype):
    return empty_grads(grad, f_dtype, z_dtype)


_FWD = define("edm_denoise_fwd", _FORWARD, _fwd_fake, cpp=None, triton="edm.denoise")
_BWD = define("edm_denoise_bwd", _BACKWARD, _bwd_fake, cpp=None, triton="edm.denoise")


class _Denoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, z, sigma, sigma_data, impl):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept(sigma))
        ctx.sigma_data, ctx.f_dtype, ctx.z_dtype, ctx.impl = sigma_data, f.dtype, z.dtype, impl
        return _FWD[impl](f, z, sigma, sigma_data)

    @staticmethod
    def backward(ctx, grad):
        check_first_order("edm_denoise")
        need_f, need_z = ctx.needs_input_grad[:2]
        if grad is None or not (need_f or need_z):
            return (None,) * 5
        (sigma,) = ctx.saved_tensors
        df, dz = _BWD[ctx.impl](
            grad, sigma, ctx.sigma_data,
            ctx.f_dtype if need_f else None, ctx.z_dtype if need_z else None,
        )  # fmt: skip
        return df if need_f else None, dz if need_z else None, None, None, None


def edm_denoise(
    f: Tensor, z: Tensor, sigma: Tensor, *, sigma_data: float = 0.5, impl: Impl = "auto"
) -> Tensor:
    """Denoised estimate from the network's output: `denoised = c_skip * z + c_out * f`.

        c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)
        c_out  = sigma * sigma_data / sqrt(sigma^2 + sigma_data^2)

    Args:
        f: network output `[N, ...]`, strides as `y` of `noise_inject`.
        z: noised target of the shape of `f`; may differ in dtype.
        sigma: noise levels > 0, at most 1e18, 0-d, `[N]` or `[N, S]`. No gradient, but a
            tangent in forward mode.
        sigma_data: standard deviation of the data.
        impl: "reference", "triton", "cpp" or "auto", which chooses as in `noise_inject`.

    Returns:
        denoised of the shape of `f`, float32 (float64 if `f` or `z` is), contiguous. Arithmetic is
        in that dtype; `f` and `z` get gradients in their own dtypes.

    Raises:
        ValueError: for an invalid shape or value.
        TypeError: for an invalid dtype.
        RuntimeError: for tensors on several devices, or a named `impl` that cannot run here.
        ImportError: for impl="triton" without the package triton.

    Source: Karras et al. 2022, eq. 7 and table 1.
    """
    if not _dispatch.noised_fit((f, z), sigma, sigma_data):
        check_noised({"f": f, "z": z}, sigma, sigma_data)
    sigma = constant(sigma)
    impl = _dispatch.resolve_impl(impl, widest(f, z), "edm_denoise")
    if impl != "reference":
        call = (f, z, sigma, float(sigma_data))
        if _dispatch.needs_autograd(f, z):
            return _Denoise.apply(*distinct(*call, impl))
        return _FWD[impl](*call)
    return reference.edm_denoise(f, z, sigma, sigma_data=sigma_data)
