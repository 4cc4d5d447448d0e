"""edm_loss: the L2 denoising loss in the space of the network's output."""

import torch
from torch import Tensor

from dblocks.kernels import reference
from dblocks.ops import _checks, _dispatch
from dblocks.ops._dispatch import Impl, check_first_order, constant, distinct, kept, widest
from dblocks.ops._levels import OffsetSeed, check_noised, split_seed
from dblocks.ops._library import define

_INPUTS = (
    "Tensor f, Tensor y, Tensor sigma, Tensor? seed_tensor, SymInt seed, SymInt offset, "
    "float sigma_data, Tensor? row_weight"
)
# rest is f - target, without elements where it is not needed.
_FORWARD = f"({_INPUTS}, bool need_rest) -> (Tensor loss, Tensor rest)"
_BACKWARD = "(Tensor grad, Tensor rest, Tensor? row_weight, ScalarType dtype) -> Tensor"


def _empty_rest(f: Tensor, need_rest: bool) -> Tensor:
    # The range of float16 is too small for f - target.
    dtype = torch.bfloat16 if f.dtype == torch.bfloat16 else torch.float32
    return torch.empty(f.shape if need_rest else 0, dtype=dtype, device=f.device)


def _fwd_fake(f, y, sigma, seed_tensor, seed, offset, sigma_data, row_weight, need_rest):
    loss = torch.empty(y.shape[0], dtype=torch.float32, device=y.device)
    return loss, _empty_rest(f, need_rest)


def _bwd_fake(grad, rest, row_weight, dtype):
    return torch.empty(rest.shape, dtype=dtype, device=rest.device)


_FWD = define("edm_loss_fwd", _FORWARD, _fwd_fake, cpp=None, triton="edm.loss")
_BWD = define("edm_loss_bwd", _BACKWARD, _bwd_fake, cpp=None, triton="edm.loss")


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, y, sigma, seed_tensor, seed, offset, sigma_data, row_weight, impl):
        ctx.set_materialize_grads(False)
        loss, rest = _FWD[impl](
            f, y, sigma, seed_tensor, seed, offset, sigma_data, row_weight, True
        )
        ctx.save_for_backward(rest, *kept(row_weight))
        ctx.dtype, ctx.impl = f.dtype, impl
        return loss

    @staticmethod
    def backward(ctx, grad):
        check_first_order("edm_loss")
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 9
        df = _BWD[ctx.impl](grad, *ctx.saved_tensors, ctx.dtype)
        return (df, *(None,) * 8)


def _check_row_weight(row_weight: Tensor, y: Tensor) -> None:
    _checks.check_float(row_weight=row_weight)
    _checks.check_device(y, row_weight=row_weight)
    by_token = y.ndim == 3 and row_weight.shape == y.shape[:2]
    if row_weight.shape != y.shape[:1] and not by_token:
        tokens = f" or [N, T] = {list(y.shape[:2])}" if y.ndim == 3 else ""
        raise ValueError(
            f"row_weight must have shape [N] = [{y.shape[0]}]{tokens}, "
            f"got {list(row_weight.shape)}; reshape or expand it"
        )
    _dispatch.remember("row_weight", (y, row_weight))


def edm_loss(
    f: Tensor,
    y: Tensor,
    sigma: Tensor,
    seed: int | Tensor | OffsetSeed,
    *,
    offset: int = 0,
    sigma_data: float = 0.5,
    row_weight: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """L2 loss of a network output against the clean target: `mean(row_weight * (f - target)^2)`.

        target = c_in * (sigma / sigma_data * y - sigma_data * eps),   c_in as in noise_inject

    This equals the EDM-weighted `w * mean((denoised - y)^2)`, but without cancellation at small
    sigma and without the factor w, up to 250,004. eps is not stored: it is regenerated from the
    `seed`, `offset` and `y` of `noise_inject`. The only tensor of the size of `f` saved for the
    backward is `f - target`: in bfloat16 if `f` is (a gradient is then rounded twice), else in
    float32.

    Args:
        f: network output `[N, ...]`, strides as `y` of `noise_inject`. The only input with a
            gradient.
        y: clean target of the shape of `f`; may differ in dtype.
        sigma: noise levels > 0, at most 1e18, 0-d, `[N]` or `[N, S]`.
        seed: as in `noise_inject`. A tensor may be changed before backward.
        offset: as in `noise_inject`.
        sigma_data: standard deviation of the data.
        row_weight: factors `[N]`, or `[N, T]` for y `[N, T, D]`: for other weightings, or 0 for
            padding (the mean still divides by all elements).
        impl: "reference", "triton", "cpp" or "auto", which chooses as in `noise_inject`.

    Returns:
        loss `[N]`, float32 (float64 if `f` or `y` is), the mean over each sample. Arithmetic is in
        that dtype. Sums have a fixed order, so results repeat bit for bit.

    Raises:
        ValueError: for an invalid shape or value.
        TypeError: for an invalid dtype.
        RuntimeError: for tensors on several devices, or a named `impl` that cannot run here.
        ImportError: for impl="triton" without the package triton.

    Source: Karras et al. 2022, eq. 8; Salmon et al. 2011 (Philox).
    """
    if not _dispatch.noised_fit((f, y), sigma, sigma_data):
        check_noised({"f": f, "y": y}, sigma, sigma_data)
    if row_weight is not None and not _dispatch.seen("row_weight", (y, row_weight)):
        _check_row_weight(row_weight, y)
    if isinstance(seed, OffsetSeed):
        seed, offset = seed.seed, seed.offset + offset
    split = _dispatch.known_seed(seed, offset, f) or split_seed(seed, offset, f)
    seed_tensor, number = split
    y, sigma = constant(y), constant(sigma)
    row_weight = None if row_weight is None else constant(row_weight)
    impl = _dispatch.resolve_impl(impl, widest(f, y), "edm_loss")
    if impl != "reference":
        call = (f, y, sigma, seed_tensor, number, offset, float(sigma_data), row_weight)
        if _dispatch.needs_autograd(f):
            return _Loss.apply(*distinct(*call, impl))
        return _FWD[impl](*call, False)[0]
    return reference.edm_loss(
        f, y, sigma, number if seed_tensor is None else seed_tensor,
        offset=offset, sigma_data=sigma_data, row_weight=row_weight,
    )  # fmt: skip
