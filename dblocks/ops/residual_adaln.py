"""residual_adaln: add a gated branch to the residual stream, then normalise and modulate it."""

from typing import NamedTuple

import torch
from torch import Tensor

from dblocks.kernels import reference
from dblocks.ops import _checks, _dispatch
from dblocks.ops._dispatch import Impl, Norm, check_first_order, distinct
from dblocks.ops.adaln import BACKWARD, FORWARD


class Residual(NamedTuple):
    """The residual stream and its normalised, modulated form."""

    x_new: Tensor
    y: Tensor


class _ResidualAdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, shift, scale, weight, bias, rms, eps, out_dtype, impl):
        x_new, y, mean, rstd = FORWARD[impl](
            x, branch, gate, shift, scale, weight, bias, True, rms, eps, out_dtype
        )
        ctx.set_materialize_grads(False)
        # Only dgate needs the values of the branch; its dtype is kept where it is not that of x.
        keeps_branch = ctx.needs_input_grad[2] or branch.dtype != x.dtype
        ctx.save_for_backward(
            x_new, branch if keeps_branch else None, gate, shift, scale, weight, bias, mean, rstd
        )
        ctx.rms, ctx.impl = rms, impl
        if not any(ctx.needs_input_grad[:3]):
            ctx.mark_non_differentiable(x_new)  # it depends on x, branch and gate only
        return x_new, y

    @staticmethod
    def backward(ctx, dx_new, dy):
        check_first_order("residual_adaln")
        if dx_new is None and dy is None:
            return (None,) * 11
        x_new, branch, *others = ctx.saved_tensors
        branch = x_new if branch is None else branch  # stands in for its shape and dtype
        needs = list(ctx.needs_input_grad[:7])
        if dy is None:
            # x_new passes its gradient on unchanged, and the norm has none.
            needs[0] = False
            needs[3:] = [False] * 4
        grads = [None] * 7
        if any(needs):
            outputs = BACKWARD[ctx.impl](dy, dx_new, x_new, branch, *others, ctx.rms, needs)
            grads = [g if n else None for g, n in zip(outputs, needs, strict=True)]
        if dy is None and ctx.needs_input_grad[0]:
            grads[0] = dx_new
        return (*grads, None, None, None, None)


def residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Residual:
    """Gated residual sum, and the AdaLN of the sum, in one pass.

        x_new = x + gate * branch
        y     = adaln(x_new, shift, scale)

    The norm sees x_new as it is stored, rounded to the dtype of `x`. The backward is one pass too:
    dx, dbranch and the sums for dgate, dshift and dscale.

    Args:
        x: `[N, T, D]`, strides as in `adaln`.
        branch: `[N, T, D]`, the output of attention or MLP; may differ from `x` in dtype.
        gate: `[N, D]` or `[N, S, D]`; `None` is 1 (a plain residual sum).
        shift: as `gate`, see `adaln`; `None` is 0.
        scale: as `gate`, see `adaln`; `None` is 0.
        weight: `[D]` of the norm; `None` is 1.
        bias: `[D]` of the norm; `None` is 0.
        norm: "layer" or "rms".
        eps: added to the variance.
        out_dtype: dtype of y; that of `x` by default.
        impl: "reference", "triton", "cpp" or "auto", which chooses as in `adaln`.

    Returns:
        Residual(x_new, y), both `[N, T, D]` and contiguous; x_new has the dtype of `x`. Arithmetic
        is float32 (float64 for float64 `x`).

    Raises:
        ValueError: for an invalid shape or value.
        TypeError: for a dtype that is not floating.
        RuntimeError: for tensors on several devices, or a named `impl` that cannot run here.
        ImportError: for impl="triton" without the package triton.

    Source: Peebles and Xie 2023 (DiT), adaLN-Zero block.
    """
    if not _dispatch.rows_fit(x, (branch,), (gate, shift, scale), (weight, bias), norm, eps):
        modulation = {"gate": gate, "shift": shift, "scale": scale}
        channels = {"weight": weight, "bias": bias}
        _checks.check_rows(x, {"branch": branch}, modulation, channels, norm, eps)
    if type(eps) is not float:
        eps = _checks.plain_number(eps)
    if out_dtype is not None:
        _checks.check_out_dtype(out_dtype)
    impl = _dispatch.resolve_impl(impl, x, "residual_adaln")
    if impl == "triton":
        _dispatch.check_triton_rows(x, "residual_adaln")
    if impl != "reference":
        call = (x, branch, gate, shift, scale, weight, bias)
        options = (norm == "rms", eps, out_dtype or x.dtype)
        if _dispatch.needs_autograd(*call):
            return Residual(*_ResidualAdaLN.apply(*distinct(*call, *options, impl)))
        return Residual(*FORWARD[impl](*call, True, *options)[:2])
    return Residual(
        *reference.residual_adaln(
            x, branch, gate, shift, scale,
            weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype,
        )
    )  # fmt: skip
