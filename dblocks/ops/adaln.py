"""adaln: normalise each row, then modulate it; and the pair of ops behind all of its family.

FORWARD and BACKWARD also serve residual_adaln and gated_residual: `branch` is None for adaln,
`normalise` is false for gated_residual. An output that is not needed is None; from an op it has no
elements, and the dtype of x.
"""

import torch
from torch import Tensor

from dblocks.kernels import reference
from dblocks.ops import _checks, _dispatch
from dblocks.ops._dispatch import Impl, Norm, check_first_order, distinct
from dblocks.ops._library import define

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


FORWARD = define("adaln_fwd", _FORWARD, _fwd_fake, cpp=None, triton="adaln.forward")
BACKWARD = define("adaln_bwd", _BACKWARD, _bwd_fake, cpp=None, triton="adaln.backward")


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, weight, bias, rms, eps, out_dtype, impl):
        _, y, mean, rstd = FORWARD[impl](
            x, None, None, shift, scale, weight, bias, True, rms, eps, out_dtype
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, shift, scale, weight, bias, mean, rstd)
        ctx.rms, ctx.impl = rms, impl
        return y

    @staticmethod
    def backward(ctx, dy):
        check_first_order("adaln")
        if dy is None:
            return (None,) * 9
        x, shift, scale, weight, bias, mean, rstd = ctx.saved_tensors
        need_x, *need_others = ctx.needs_input_grad[:5]
        dx, _, _, *others = BACKWARD[ctx.impl](
            dy, None, x, None, None, shift, scale, weight, bias, mean, rstd, ctx.rms,
            [need_x, False, False, *need_others],
        )  # fmt: skip
        others = [g if n else None for g, n in zip(others, need_others, strict=True)]
        return (dx if need_x else None, *others, None, None, None, None)


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
        eps: added to the variance, >= 0. With 0, a row with variance 0 (on a GPU also subnormal)
            gives NaN or inf.
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
        ValueError: for an invalid shape or value.
        TypeError: for a dtype that is not floating.
        RuntimeError: for tensors on several devices, or a named `impl` that cannot run here.
        ImportError: for impl="triton" without the package triton.

    Source: Peebles and Xie 2023 (DiT), section 3.2; RMS norm: Zhang and Sennrich 2019.
    """
    if not _dispatch.rows_fit(x, (), (shift, scale), (weight, bias), norm, eps):
        modulation, channels = {"shift": shift, "scale": scale}, {"weight": weight, "bias": bias}
        _checks.check_rows(x, {}, modulation, channels, norm, eps)
    if type(eps) is not float:
        eps = _checks.plain_number(eps)
    if out_dtype is not None:
        _checks.check_out_dtype(out_dtype)
    impl = _dispatch.resolve_impl(impl, x, "adaln")
    if impl == "triton":
        _dispatch.check_triton_rows(x, "adaln")
    if impl != "reference":
        call = (shift, scale, weight, bias)
        options = (norm == "rms", eps, out_dtype or x.dtype)
        if _dispatch.needs_autograd(x, *call):
            return _AdaLN.apply(*distinct(x, *call, *options, impl))
        return FORWARD[impl](x, None, None, *call, True, *options)[1]
    return reference.adaln(
        x, shift, scale, weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype
    )
