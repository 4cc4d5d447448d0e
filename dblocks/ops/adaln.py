"""adaln: normalise each row, then modulate it; and the pair of ops behind all of its family.

One forward and one backward serve residual_adaln and gated_residual too: `branch` is absent for
adaln, `normalise` is false for gated_residual. An output that was not asked for is None; from an op
it has no elements, and the dtype of x.
"""

from typing import Any

import torch
from torch import Tensor

from dblocks.kernels import reference
from dblocks.ops import _checks, _dispatch
from dblocks.ops._dispatch import Impl, Norm, apply, first_order
from dblocks.ops._library import define, triton_kernel

# Of kernels/_common/launches.py, which is not imported before it is used.
MAX_TRITON_WIDTH = 16384
MAX_TRITON_ROWS = 2**31 - 2**22  # rows of a group have int32 numbers, and a chunk may pass the last

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
    from dblocks.kernels.adaln.forward import adaln_fwd

    return adaln_fwd(x, branch, gate, shift, scale, weight, bias, normalise, rms, eps, out_dtype)


@triton_kernel("adaln_bwd", like=2)
def _bwd_triton(dy, dx_new, x, branch, gate, shift, scale, weight, bias, mean, rstd, rms, needs):
    from dblocks.kernels.adaln.backward import adaln_bwd

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


def _check_size(x: Tensor, op: str) -> None:
    """The Triton kernels hold a row in registers, which bounds its width, and count rows."""
    rows = x.shape[0] * x.shape[1]
    if rows >= MAX_TRITON_ROWS:
        raise ValueError(
            f"{op}: impl='triton' takes N * T < {MAX_TRITON_ROWS}, got N * T = {rows}; "
            "split the samples, or use impl='reference'"
        )
    if x.shape[-1] > MAX_TRITON_WIDTH:
        raise ValueError(
            f"{op}: impl='triton' takes D <= {MAX_TRITON_WIDTH}, got D = {x.shape[-1]}; "
            "use impl='reference'"
        )


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
    op: str,
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
    if impl == "triton":
        _check_size(x, op)
    tensors = (x, branch, gate, shift, scale, weight, bias)
    options = (normalise, rms, eps, out_dtype or x.dtype)
    if _dispatch.needs_autograd(*tensors):
        return apply(_AdaLN, *tensors, *options, impl)
    x_new, y, _, _ = _FWD[impl](*tensors, *options)
    if branch is None:
        return y
    return (x_new, y) if normalise else x_new


def adaln(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Norm over the last dimension followed by a noise-conditioned scale and shift (AdaLN).

        layer:  h = (x - mean(x)) / sqrt(var(x) + eps)         rms:  h = x / sqrt(mean(x^2) + eps)
        y = (h * weight + bias) * (1 + scale) + shift

    Args:
        x: `[N, T, D]`; any strides of the first two dimensions, zero and chunk views included, are
            taken without a copy. A last stride other than 1 costs one copy.
        shift: `[N, D]` per sample, or `[N, S, D]` per segment of T/S consecutive tokens (S = T is
            per token); `None` is 0. May differ from `x` in dtype, as may the other parameters.
        scale: as `shift`, with the same S.
        weight: `[D]` of the norm; `None` is 1.
        bias: `[D]` of the norm; `None` is 0.
        norm: "layer" (population variance, computed in two passes) or "rms".
        eps: added to the variance, >= 0. With 0, a row whose variance is 0 (on a GPU: subnormal,
            which its root takes for 0) gives NaN or inf.
        out_dtype: dtype of the result; that of `x` by default.
        impl: "reference" (plain PyTorch: any device and dtype, any transform), "triton" (GPU;
            D <= 16,384; not float64), "cpp" (CPU; not float64), or "auto": Triton on a GPU, C++ on
            a CPU where it is built, else the reference; the reference too for float64 and inside
            torch.func transforms and forward-mode differentiation. Triton and C++ have first-order
            autograd only.

    Returns:
        y `[N, T, D]`, contiguous. Arithmetic is float32 (float64 for float64 `x`), rounded once.
        Every gradient has its input's dtype and repeats bit for bit.

    Raises:
        ValueError: for a shape or value that does not fit.
        TypeError: for a dtype that is not floating.
        RuntimeError: for tensors on several devices, or a named `impl` that cannot run here.
        ImportError: for impl="triton" without the package triton.

    Source: Peebles and Xie 2023 (DiT), section 3.2; RMS norm: Zhang and Sennrich 2019.
    """
    if not _dispatch.rows_fit(x, (), (shift, scale), (weight, bias), norm, eps):
        modulation, channels = {"shift": shift, "scale": scale}, {"weight": weight, "bias": bias}
        _checks.check_rows(x, {}, modulation, channels, norm, eps)
    if out_dtype is not None:
        _checks.check_out_dtype(out_dtype)
    impl = _dispatch.resolve_impl(impl, x, "adaln")
    if impl != "reference":
        return fused(
            "adaln", impl, x, None, None, shift, scale, weight, bias,
            rms=norm == "rms", eps=eps, out_dtype=out_dtype,
        )  # fmt: skip
    return reference.adaln(
        x, shift, scale, weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype
    )
