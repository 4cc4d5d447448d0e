"""euler_step: one step of the probability flow ODE towards the denoised estimate."""

import torch
from torch import Tensor

from dblocks.config import HIGHEST_LEVEL
from dblocks.kernels import reference
from dblocks.ops import _dispatch
from dblocks.ops._dispatch import Impl, check_first_order, constant, distinct, kept, widest
from dblocks.ops._levels import check_pair, check_sigma, check_sigma_value
from dblocks.ops._library import define
from dblocks.ops.edm_denoise import empty_grads

_LEVELS = "Tensor? sigma, Tensor? sigma_next, float sigma_value, float sigma_next_value"
_FORWARD = f"(Tensor z, Tensor denoised, {_LEVELS}) -> Tensor"
_BACKWARD = (
    f"(Tensor grad, {_LEVELS}, ScalarType? z_dtype, ScalarType? denoised_dtype)"
    " -> (Tensor dz, Tensor ddenoised)"
)


def _fwd_fake(z, denoised, sigma, sigma_next, sigma_value, sigma_next_value):
    return torch.empty(z.shape, dtype=torch.float32, device=z.device)


def _bwd_fake(grad, sigma, sigma_next, sigma_value, sigma_next_value, z_dtype, denoised_dtype):
    return empty_grads(grad, z_dtype, denoised_dtype)


_FWD = define("euler_step_fwd", _FORWARD, _fwd_fake, cpp=None, triton="edm.euler")
_BWD = define("euler_step_bwd", _BACKWARD, _bwd_fake, cpp=None, triton="edm.euler")


class _EulerStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, denoised, sigma, sigma_next, sigma_value, sigma_next_value, impl):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept(sigma, sigma_next))
        ctx.values, ctx.impl = (sigma_value, sigma_next_value), impl
        ctx.dtypes = z.dtype, denoised.dtype
        return _FWD[impl](z, denoised, sigma, sigma_next, sigma_value, sigma_next_value)

    @staticmethod
    def backward(ctx, grad):
        check_first_order("euler_step")
        needs = ctx.needs_input_grad[:2]
        if grad is None or not any(needs):
            return (None,) * 7
        dtypes = [d if n else None for d, n in zip(ctx.dtypes, needs, strict=True)]
        grads = _BWD[ctx.impl](grad, *ctx.saved_tensors, *ctx.values, *dtypes)
        return (*(g if n else None for g, n in zip(grads, needs, strict=True)), *(None,) * 5)


def _level(sigma: Tensor | float, z: Tensor) -> tuple[Tensor | None, float]:
    """A noise level as the tensor or the number that the op takes."""
    if isinstance(sigma, Tensor):
        return sigma, 1.0
    if torch.compiler.is_compiling():
        # A float in the schema, or in torch.full, would make a graph for each value.
        return torch.zeros((), dtype=torch.float32, device=z.device) + sigma, 1.0
    return None, sigma


def _check_level(name: str, sigma: Tensor | float, z: Tensor, *, zero: bool) -> None:
    if isinstance(sigma, Tensor):
        if not _dispatch.sigma_fits(sigma, z):
            check_sigma(name, sigma, "z", z, zero=zero)
    elif type(sigma) is not float or not (0 < sigma <= HIGHEST_LEVEL or (zero and sigma == 0)):
        check_sigma_value(name, sigma, zero=zero)


def _check_segments(sigma: Tensor | float, sigma_next: Tensor | float) -> None:
    """Raises unless two levels [N, S] have the same S."""
    if not isinstance(sigma, Tensor) or not isinstance(sigma_next, Tensor):
        return
    if sigma.ndim == sigma_next.ndim == 2:
        segments, given = sigma.shape[1], sigma_next.shape[1]
        if segments != given and 1 not in (segments, given):
            raise ValueError(
                f"sigma_next must have as many segments as sigma, {segments}, got {given}; "
                "expand one of them"
            )


def euler_step(
    z: Tensor,
    denoised: Tensor,
    sigma: Tensor | float,
    sigma_next: Tensor | float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Euler step from sigma to sigma_next: `z_next = a * z + (1 - a) * denoised`.

        a = sigma_next / sigma

    A perfect denoiser lands on `y + sigma_next * eps`; sigma_next = 0 gives `denoised`.

    Args:
        z: state at `sigma`, `[N, ...]`, strides as `y` of `noise_inject`.
        denoised: estimate of the clean target, of the shape of `z`; may differ in dtype.
        sigma: noise level > 0, at most 1e18: a float, or a tensor, 0-d, `[N]` or `[N, S]`. No
            gradient, but a tangent in forward mode.
        sigma_next: noise level >= 0, at most 1e18, likewise; if both are `[N, S]`, S must be the
            same.
        impl: "reference", "triton", "cpp" or "auto", which chooses as in `noise_inject`. Two floats
            are divided on the host in float64; in a compiled graph in float32, except by the
            reference.

    Returns:
        z_next of the shape of `z`, float32 (float64 if `z` or `denoised` is), contiguous.
        Arithmetic is in that dtype; `z` and `denoised` get gradients in their own dtypes.

    Raises:
        ValueError: for an invalid shape or value.
        TypeError: for an invalid dtype.
        RuntimeError: for tensors on several devices, or a named `impl` that cannot run here.
        ImportError: for impl="triton" without the package triton.

    Source: Karras et al. 2022, algorithm 1 with dx/dt = (x - D(x; t)) / t.
    """
    if not _dispatch.seen("samples", (z, denoised)):
        check_pair("z", z, "denoised", denoised)
    _check_level("sigma", sigma, z, zero=False)
    _check_level("sigma_next", sigma_next, z, zero=True)
    sigma, sigma_next = (
        constant(s) if isinstance(s, Tensor) else float(s) for s in (sigma, sigma_next)
    )
    _check_segments(sigma, sigma_next)
    impl = _dispatch.resolve_impl(impl, widest(z, denoised), "euler_step")
    if impl != "reference":
        (level, value), (level_next, value_next) = _level(sigma, z), _level(sigma_next, z)
        call = (z, denoised, level, level_next, value, value_next)
        if _dispatch.needs_autograd(z, denoised):
            return _EulerStep.apply(*distinct(*call, impl))
        return _FWD[impl](*call)
    return reference.euler_step(z, denoised, sigma, sigma_next)
