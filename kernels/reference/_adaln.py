"""adaln, residual_adaln and gated_residual in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is active, that of torch.func too."""
    return forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result sets, without its import of the compiler: a graph takes
# the answer of the moment when it is traced, and guards on the level by itself.
in_forward_mode._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _segments(x: Tensor, modulation: Tensor) -> Tensor:
    """A modulation [N, D] or [N, S, D] as [N, T, D] (or [N, 1, D]) in the dtype of `x`."""
    modulation = modulation.to(x.dtype)
    if modulation.ndim == 2:
        return modulation[:, None]
    N, S, D = modulation.shape
    T = x.shape[1]
    if S == T:
        return modulation
    return modulation[:, :, None].expand(N, S, T // S, D).reshape(N, T, D)


def _layer_norm(h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if not in_forward_mode():
        return F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    # Gradients of PyTorch's tangent of layer_norm are wrong: they take mean and variance as given.
    h = h - h.mean(-1, keepdim=True)
    h = h * (h.square().mean(-1, keepdim=True) + eps).rsqrt()
    h = h if weight is None else h * weight
    return h if bias is None else h + bias


def adaln(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    weight, bias = (None if p is None else p.to(h.dtype) for p in (weight, bias))
    if norm == "layer":
        h = _layer_norm(h, weight, bias, eps)
    else:
        h = F.rms_norm(h, h.shape[-1:], weight, eps)
        h = h if bias is None else h + bias
    if scale is not None:
        h = h * (1 + _segments(h, scale))
    if shift is not None:
        h = h + _segments(h, shift)
    return h.to(out_dtype or x.dtype).contiguous()


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `x` after a round trip through `dtype`, its gradients as they are."""
    if x.dtype == dtype:
        return x
    # What is added is 0 and carries the gradient; inf - inf would be NaN.
    return x.detach().to(dtype).to(x.dtype) + (x - x.detach()).nan_to_num()


def _stream(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * branch before it is rounded."""
    h = branch.to(torch.promote_types(x.dtype, torch.float32))
    if gate is None:
        return x.to(h.dtype) + h
    return torch.addcmul(x.to(h.dtype), _segments(h, gate), h)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return _stream(x, branch, gate).to(x.dtype).contiguous()


def residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    h = _stream(x, branch, gate)
    # The norm sees x_new as it is stored, but no gradient passes through 16 bits on its way to h.
    y = adaln(
        _rounded(h, x.dtype), shift, scale,
        weight=weight, bias=bias, norm=norm, eps=eps, out_dtype=out_dtype or x.dtype,
    )  # fmt: skip
    return h.to(x.dtype).contiguous(), y
