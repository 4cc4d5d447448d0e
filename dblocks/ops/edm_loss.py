"""edm_loss: the L2 denoising loss in the space of the network's output."""

import torch
from torch import Tensor

from dblocks.kernels import reference
from dblocks.ops import _common
from dblocks.ops._autograd import apply, constant, first_order
from dblocks.ops._common import Impl
from dblocks.ops._library import define, triton_kernel
from dblocks.ops._noise_args import (
    check_pair,
    check_sigma,
    check_sigma_data,
    keep,
    kept,
    split_seed,
    widest,
)

_INPUTS = (
    "Tensor f, Tensor y, Tensor sigma, Tensor? seed_tensor, SymInt seed, SymInt offset, "
    "float sigma_data, Tensor? row_weight"
)
_FORWARD = f"({_INPUTS}) -> Tensor"
_BACKWARD = f"(Tensor grad, {_INPUTS}) -> Tensor"


@triton_kernel("edm_loss_fwd")
def _fwd_triton(f, y, sigma, seed_tensor, seed, offset, sigma_data, row_weight):
    if y.numel() == 0:
        return torch.zeros(y.shape[0], dtype=torch.float32, device=y.device)
    from dblocks.kernels.edm import edm_loss_fwd

    return edm_loss_fwd(f, y, sigma, seed_tensor, seed, offset, sigma_data, row_weight)


@triton_kernel("edm_loss_bwd")
def _bwd_triton(grad, f, y, sigma, seed_tensor, seed, offset, sigma_data, row_weight):
    if y.numel() == 0:
        return torch.empty(f.shape, dtype=f.dtype, device=f.device)
    from dblocks.kernels.edm import edm_loss_bwd

    return edm_loss_bwd(grad, f, y, sigma, seed_tensor, seed, offset, sigma_data, row_weight)


def _fwd_fake(f, y, sigma, seed_tensor, seed, offset, sigma_data, row_weight):
    return torch.empty(y.shape[0], dtype=torch.float32, device=y.device)


def _bwd_fake(grad, f, y, sigma, seed_tensor, seed, offset, sigma_data, row_weight):
    return torch.empty(f.shape, dtype=f.dtype, device=f.device)


_FWD = define("edm_loss_fwd", _FORWARD, _fwd_fake)
_BWD = define("edm_loss_bwd", _BACKWARD, _bwd_fake)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, y, sigma, seed_tensor, seed, offset, sigma_data, row_weight, impl):
        ctx.set_materialize_grads(False)
        # A counter may be stepped before backward, so the seed is copied in eager mode as well.
        used_seed = None if seed_tensor is None else keep(seed_tensor)
        used_sigma, used_weight = kept(sigma, row_weight)
        ctx.save_for_backward(f, y, used_sigma, used_seed, used_weight)
        ctx.seed, ctx.offset, ctx.sigma_data, ctx.impl = seed, offset, sigma_data, impl
        return _FWD[impl](f, y, sigma, seed_tensor, seed, offset, sigma_data, row_weight)

    @staticmethod
    @first_order("edm_loss")
    def backward(ctx, grad):
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 9
        f, y, sigma, seed_tensor, row_weight = ctx.saved_tensors
        df = _BWD[ctx.impl](
            grad, f, y, sigma, seed_tensor, ctx.seed, ctx.offset, ctx.sigma_data, row_weight
        )
        return (df, *(None,) * 8)


def _check_row_weight(row_weight: Tensor | None, y: Tensor) -> None:
    if row_weight is None:
        return
    _common.check_float(row_weight=row_weight)
    _common.check_device(y, row_weight=row_weight)
    if row_weight.shape == y.shape[:1]:
        return
    if y.ndim != 3 or row_weight.shape != y.shape[:2]:
        tokens = f" or [N, T] = {list(y.shape[:2])}" if y.ndim == 3 else ""
        raise ValueError(
            f"row_weight must have shape [N] = [{y.shape[0]}]{tokens}, "
            f"got {list(row_weight.shape)}; reshape or expand it"
        )


def edm_loss(
    f: Tensor,
    y: Tensor,
    sigma: Tensor,
    seed: int | Tensor,
    *,
    offset: int = 0,
    sigma_data: float = 0.5,
    row_weight: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """L2 loss of a network output against the clean target: `mean(row_weight * (f - target)^2)`.

        target = c_in * (sigma / sigma_data * y - sigma_data * eps),   c_in as in noise_inject

    This is the EDM-weighted `w * mean((denoised - y)^2)` without its cancellation at small sigma
    and without its weight, up to 250,004. eps is not stored: `seed`, `offset` and `y` that
    `noise_inject` had give it again, in backward too.

    Args:
        f: Network output `[N, ...]`, strides as `y` of `noise_inject`. Alone gets a gradient.
        y: Clean target of the shape of `f`; may differ in dtype. It is saved: a compiled graph must
            not change `f` or `y` in place after the loss.
        sigma: Noise levels > 0, 0-d, `[N]` or `[N, S]`.
        seed: As in `noise_inject`. A tensor is copied, and may be changed before backward.
        offset: As in `noise_inject`.
        sigma_data: Standard deviation of the data.
        row_weight: Factors `[N]`, or `[N, T]` for y `[N, T, D]`: other weightings, or 0 for
            padding (the mean divides by all elements).
        impl: "reference", "triton", "cpp" or "auto", which chooses as in `noise_inject`.

    Returns:
        loss `[N]`, float32 (float64 if `f` or `y` is), the mean over each sample. Arithmetic is in
        that dtype, sums have a fixed order: two runs are equal bit for bit.

    Raises:
        ValueError: for a shape or value that does not fit.
        TypeError: for a dtype that does not fit.
        RuntimeError: for tensors on several devices, or a named `impl` that cannot run here.
        ImportError: for impl="triton" without the package triton.

    Source: Karras et al. 2022, eq. 8; Salmon et al. 2011 (Philox).
    """
    check_pair("f", f, "y", y)
    check_sigma("sigma", sigma, "f", f)
    check_sigma_data(sigma_data)
    _check_row_weight(row_weight, y)
    seed_tensor, number = split_seed(seed, offset, f)
    y, sigma = constant(y), constant(sigma)
    row_weight = None if row_weight is None else constant(row_weight)
    impl = _common.resolve_impl(impl, widest(f, y), "edm_loss")
    if impl != "reference":
        call = (f, y, sigma, seed_tensor, number, offset, float(sigma_data), row_weight)
        return apply(_Loss, *call, impl) if _common.needs_autograd(f) else _FWD[impl](*call)
    return reference.edm_loss(
        f, y, sigma, seed, offset=offset, sigma_data=sigma_data, row_weight=row_weight
    )
