"""residual_adaln: add a gated branch to the residual stream, then normalise and modulate it."""

from typing import NamedTuple

import torch
from torch import Tensor

from dblocks.kernels import reference
from dblocks.ops import _checks, _dispatch
from dblocks.ops._dispatch import Impl, Norm
from dblocks.ops.adaln import fused


class Residual(NamedTuple):
    """The residual stream and its normalised, modulated form."""

    x_new: Tensor
    y: Tensor


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
        ValueError: for a shape or value that does not fit.
        TypeError: for a dtype that is not floating.
        RuntimeError: for tensors on several devices, or a named `impl` that cannot run here.
        ImportError: for impl="triton" without the package triton.

    Source: Peebles and Xie 2023 (DiT), adaLN-Zero block.
    """
    if not _dispatch.rows_fit(x, (branch,), (gate, shift, scale), (weight, bias), norm, eps):
        modulation = {"gate": gate, "shift": shift, "scale": scale}
        channels = {"weight": weight, "bias": bias}
        _checks.check_rows(x, {"branch": branch}, modulation, channels, norm, eps)
    if out_dtype is not None:
        _checks.check_out_dtype(out_dtype)
    impl = _dispatch.resolve_impl(impl, x, "residual_adaln")
    if impl != "reference":
        out = fused(
            "residual_adaln", impl, x, branch, gate, shift, scale, weight, bias,
            rms=norm == "rms", eps=eps, out_dtype=out_dtype,
        )  # fmt: skip
    else:
        out = reference.residual_adaln(
            x, branch, gate, shift, scale,
            weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype,
        )  # fmt: skip
    return Residual(*out)
