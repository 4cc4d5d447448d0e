"""adaln: normalise each row, then modulate it."""

import torch
from torch import Tensor

from dblocks.kernels import reference
from dblocks.ops import _common
from dblocks.ops._adaln_op import fused
from dblocks.ops._common import Impl, Norm


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
    _common.check_norm(norm, eps)
    if not _common.rows_fit(x, (), (shift, scale), (weight, bias)):
        _common.check_tensor(x=x)
        _common.check_tokens("x", x)
        tensors = {"shift": shift, "scale": scale, "weight": weight, "bias": bias}
        _common.check_float(x=x, **tensors)
        _common.check_device(x, **tensors)
        _common.check_modulation(x, shift=shift, scale=scale)
        _common.check_channels(x, weight=weight, bias=bias)
    if out_dtype is not None:
        _common.check_out_dtype(out_dtype)
    impl = _common.resolve_impl(impl, x, "adaln")
    if impl != "reference":
        _common.check_size(x, "adaln", impl)
        return fused(
            impl, x, None, None, shift, scale, weight, bias,
            rms=norm == "rms", eps=eps, out_dtype=out_dtype,
        )  # fmt: skip
    return reference.adaln(
        x, shift, scale, weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype
    )
