"""gated_residual: add a gated branch to the residual stream."""

import torch
from torch import Tensor

from dblocks.kernels import reference
from dblocks.ops import _checks, _dispatch
from dblocks.ops._dispatch import Impl, check_first_order, distinct
from dblocks.ops.adaln import BACKWARD, FORWARD


def _x_new(x: Tensor, branch: Tensor, gate: Tensor | None, impl: str) -> Tensor:
    absent = (None,) * 4  # shift, scale, weight, bias
    return FORWARD[impl](x, branch, gate, *absent, False, False, 0.0, x.dtype)[0]


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, gate, impl):
        ctx.set_materialize_grads(False)
        # Only dgate needs the values of the branch; its dtype is kept where it is not that of x.
        keeps_branch = ctx.needs_input_grad[2] or branch.dtype != x.dtype
        ctx.save_for_backward(branch if keeps_branch else None, gate)
        ctx.impl = impl
        return _x_new(x, branch, gate, impl)

    @staticmethod
    def backward(ctx, dx_new):
        check_first_order("gated_residual")
        if dx_new is None:
            return (None,) * 4
        branch, gate = ctx.saved_tensors
        need_x, need_branch, need_gate = ctx.needs_input_grad[:3]
        dbranch = dgate = None
        if need_branch or need_gate:
            branch = dx_new if branch is None else branch  # stands in for its shape and dtype
            absent = (None,) * 6  # shift, scale, weight, bias, mean, rstd
            _, dbranch, dgate, *_ = BACKWARD[ctx.impl](
                None, dx_new, dx_new, branch, gate, *absent, False,
                [False, need_branch, need_gate, False, False, False, False],
            )  # fmt: skip
        dx = dx_new if need_x else None  # x passes its gradient on unchanged
        return dx, dbranch if need_branch else None, dgate if need_gate else None, None


def gated_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None, *, impl: Impl = "auto"
) -> Tensor:
    """Gated residual sum: `x_new = x + gate * branch`.

    Args:
        x: `[N, T, D]`, strides as in `adaln`.
        branch: `[N, T, D]`; may differ from `x` in dtype.
        gate: `[N, D]`, or `[N, S, D]` per segment of T/S consecutive tokens; `None` is 1.
        impl: "reference", "triton", "cpp" or "auto", which chooses as in `adaln`.

    Returns:
        x_new `[N, T, D]` in the dtype of `x`, contiguous. Arithmetic is float32 (float64 for
        float64 `x`), rounded once.

    Raises:
        ValueError: for an invalid shape.
        TypeError: for a dtype that is not floating.
        RuntimeError: for tensors on several devices, or a named `impl` that cannot run here.
        ImportError: for impl="triton" without the package triton.

    Source: Peebles and Xie 2023 (DiT), adaLN-Zero block.
    """
    if not _dispatch.rows_fit(x, (branch,), (gate,)):
        _checks.check_rows(x, {"branch": branch}, {"gate": gate}, {})
    impl = _dispatch.resolve_impl(impl, x, "gated_residual")
    if impl == "triton":
        _dispatch.check_triton_rows(x, "gated_residual")
    if impl != "reference":
        if _dispatch.needs_autograd(x, branch, gate):
            return _GatedResidual.apply(*distinct(x, branch, gate, impl))
        return _x_new(x, branch, gate, impl)
    return reference.gated_residual(x, branch, gate)
