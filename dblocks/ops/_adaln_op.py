"""adaln, residual_adaln and gated_residual in Triton and C++: schema, fake kernel, autograd.

One pair of ops serves all three: `branch` is absent for adaln, `normalise` is false for
gated_residual. An output that was not asked for is None; from an op it has no elements, and the
dtype of x.
"""

from typing import Any

import torch
from torch import Tensor

from dblocks.ops import _common
from dblocks.ops._autograd import apply, first_order
from dblocks.ops._library import define, triton_kernel

_INPUTS = (
    "Tensor x, Tensor? branch, Tensor? gate, Tensor? shift, Tensor? scale, "
    "Tensor? weight, Tensor? bias"
)
_FORWARD = (
    f"({_INPUTS}, bool normalise, bool rms, float eps, ScalarType out_dtype)"
    " -> (Tensor x_new, Tensor y, Tensor mean, Tensor rstd)"
)
_BACKWARD = (
    f"(Tensor? dy, Tensor? dx_new, {_INPUTS}, Tensor? mean, Tensor? rstd, bool rms, bool[] needs)"
    " -> (Tensor dx, Tensor dbranch, Tensor dgate, Tensor dshift, Tensor dscale, Tensor dweight,"
    " Tensor dbias)"
)


@triton_kernel("adaln_fwd")
def _fwd_triton(x, branch, gate, shift, scale, weight, bias, normalise, rms, eps, out_dtype):
    from dblocks.kernels.adaln_fwd import adaln_fwd

    return adaln_fwd(x, branch, gate, shift, scale, weight, bias, normalise, rms, eps, out_dtype)


@triton_kernel("adaln_bwd", like=2)
def _bwd_triton(dy, dx_new, x, branch, gate, shift, scale, weight, bias, mean, rstd, rms, needs):
    from dblocks.kernels.adaln_bwd import adaln_bwd

    return adaln_bwd(
        dy, dx_new, x, branch, gate, shift, scale, weight, bias, mean, rstd, rms, needs
    )


def _fwd_fake(x, branch, gate, shift, scale, weight, bias, normalise, rms, eps, out_dtype):
    N, T, D = x.shape
    return (
        x.new_empty((N, T, D)) if branch is not None else x.new_empty(0),
        x.new_empty((N, T, D), dtype=out_dtype) if normalise else x.new_empty(0),
        x.new_empty((N, T), dtype=torch.float32) if normalise and not rms else x.new_empty(0),
        x.new_empty((N, T), dtype=torch.float32) if normalise else x.new_empty(0),
    )


def _bwd_fake(dy, dx_new, x, branch, gate, shift, scale, weight, bias, mean, rstd, rms, needs):
    inputs = (x, branch, gate, shift, scale, weight, bias)
    return tuple(
        torch.empty(a.shape, dtype=a.dtype, device=a.device)
        if n and a is not None
        else x.new_empty(0)
        for a, n in zip(inputs, needs, strict=True)
    )


_FWD = define("adaln_fwd", _FORWARD, _fwd_fake)
_BWD = define("adaln_bwd", _BACKWARD, _bwd_fake)


def _name(ctx: Any) -> str:
    if not ctx.has_branch:
        return "adaln"
    return "residual_adaln" if ctx.normalise else "gated_residual"


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, branch, gate, shift, scale, weight, bias, normalise, rms, eps, out_dtype, impl
    ):
        x_new, y, mean, rstd = _FWD[impl](
            x, branch, gate, shift, scale, weight, bias, normalise, rms, eps, out_dtype
        )
        ctx.set_materialize_grads(False)
        ctx.impl = impl
        ctx.rms, ctx.normalise, ctx.has_branch = rms, normalise, branch is not None
        normalised = None if not normalise else x if branch is None else x_new
        # The values of the branch are needed for dgate only, its dtype is x's or must be kept.
        keeps_branch = ctx.needs_input_grad[2] or (branch is not None and branch.dtype != x.dtype)
        ctx.save_for_backward(
            normalised, branch if keeps_branch else None, gate, shift, scale, weight, bias,
            mean, rstd,
        )  # fmt: skip
        if branch is None:
            return y
        if not any(ctx.needs_input_grad[:3]):
            ctx.mark_non_differentiable(x_new)  # it depends on x, branch and gate only
        return (x_new, y) if normalise else x_new

    @staticmethod
    @first_order(_name)
    def backward(ctx, *upstream):
        dx_new = upstream[0] if ctx.has_branch else None
        dy = upstream[-1] if ctx.normalise else None
        if dx_new is None and dy is None:
            return (None,) * 12
        x, branch, gate, shift, scale, weight, bias, mean, rstd = ctx.saved_tensors
        x = dx_new if x is None else x
        if ctx.has_branch and branch is None:
            branch = x  # stands in for its shape and dtype
        needs = list(ctx.needs_input_grad[:7])
        if dy is None:
            # x_new passes its gradient on unchanged, and the norm has none.
            needs[0] = False
            needs[3:] = [False] * 4
        grads = [None] * 7
        if any(needs):
            outputs = _BWD[ctx.impl](
                dy, dx_new, x, branch, gate, shift, scale, weight, bias, mean, rstd, ctx.rms, needs
            )
            grads = [g if n else None for g, n in zip(outputs, needs, strict=True)]
        if dy is None and ctx.needs_input_grad[0]:
            grads[0] = dx_new
        return (*grads, None, None, None, None, None)


def fused(
    impl: str,
    x: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    normalise: bool = True,
    rms: bool = False,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """(x_new, y), y without a branch, or x_new without a norm; see the public functions."""
    tensors = (x, branch, gate, shift, scale, weight, bias)
    options = (normalise, rms, eps, out_dtype or x.dtype)
    if _common.needs_autograd(*tensors):
        return apply(_AdaLN, *tensors, *options, impl)
    x_new, y, _, _ = _FWD[impl](*tensors, *options)
    if branch is None:
        return y
    return (x_new, y) if normalise else x_new
