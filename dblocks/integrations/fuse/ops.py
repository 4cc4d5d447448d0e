"""Modulated norms and gated sums of other libraries' modules as dblocks' ops.

Dtypes and hooks are kept. Plain PyTorch runs where an op cannot: for a norm that is not known or
has hooks, and for tensors that are not [N, T, D].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dblocks import functional as F
from dblocks.integrations.norms import NormSpec, norm_spec
from dblocks.ops._dispatch import FLOATS, Impl


def modulate(
    norm: nn.Module, x: Tensor, shift: Tensor | None, scale: Tensor | None, impl: Impl = "auto"
) -> Tensor:
    """`norm(x) * (1 + scale) + shift` as one `adaln`.

    Args:
        norm: a layer or RMS norm over D; its weight, bias and eps are kept. Its own forward is
            called instead where it has hooks, or is not in `dblocks.integrations.norms`.
        x: [N, T, D].
        shift: [N, D] or [N, S, D], a first size of 1 or none at all standing for every sample;
            `None` is 0.
        scale: as `shift`; `None` is 0.
        impl: as in `dblocks.functional.adaln`.

    Returns:
        [N, T, D] in the dtype to which PyTorch promotes the norm's result and the modulation.
        Autocast takes no part: the norm's result has the dtype of `x` inside it too.
    """
    found, fitted = _spec(norm, x), _fitted(x, shift, scale)
    if found is None or fitted is None:
        y = norm(x)
        y = y if scale is None else y * (1 + _broadcast(scale))
        return y if shift is None else y + _broadcast(shift)
    return F.adaln(
        x, *fitted,
        weight=found.weight, bias=found.bias, norm=found.norm, eps=found.eps,
        out_dtype=_promoted(found.dtype, shift, scale), impl=impl,
    )  # fmt: skip


def gated_add(x: Tensor, branch: Tensor, gate: Tensor | None, impl: Impl = "auto") -> Tensor:
    """`x + gate * branch` as one `gated_residual`.

    Args:
        x: [N, T, D].
        branch: [N, T, D].
        gate: as `shift` of `modulate`; `None` is 1.
        impl: as in `dblocks.functional.gated_residual`.

    Returns:
        [N, T, D] in the dtype to which PyTorch promotes the three.
    """
    fitted = _fitted(x, gate)
    if fitted is None or branch.shape != x.shape:
        return x + (branch if gate is None else _broadcast(gate) * branch)
    return F.gated_residual(x.to(_promoted(x.dtype, branch, gate)), branch, *fitted, impl=impl)


def gated_add_and_modulate(
    norm: nn.Module,
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """`x_new = x + gate * branch` and `norm(x_new) * (1 + scale) + shift` as one `residual_adaln`.

    Arguments are as in `gated_add` and `modulate`, which are called one after the other where the
    single op cannot take their place.

    Returns:
        x_new and its modulated norm.
    """
    x = x.to(_promoted(x.dtype, branch, gate))
    found, fitted = _spec(norm, x), _fitted(x, gate, shift, scale)
    if found is None or fitted is None or branch.shape != x.shape:
        x = gated_add(x, branch, gate, impl)
        return x, modulate(norm, x, shift, scale, impl)
    return F.residual_adaln(
        x, branch, *fitted,
        weight=found.weight, bias=found.bias, norm=found.norm, eps=found.eps,
        out_dtype=_promoted(found.dtype, shift, scale), impl=impl,
    )  # fmt: skip


def _spec(norm: nn.Module, x: Tensor) -> NormSpec | None:
    """What `norm` computes of `x`; None where only its own forward can tell."""
    return None if _observed(norm) else norm_spec(norm, x.dtype)


def _observed(module: nn.Module) -> bool:
    """Whether a call of the module is more than the forward of its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def _fitted(x: Tensor, *modulation: Tensor | None) -> list[Tensor | None] | None:
    """The modulation with a row for each sample of `x`; None where the ops do not take them."""
    if x.ndim != 3 or x.dtype not in FLOATS:
        return None
    N, _, D = x.shape
    fitted: list[Tensor | None] = []
    segments = None
    for m in modulation:
        if m is not None:
            m = m[None] if m.ndim == 1 else m
            S = m.shape[1] if m.ndim == 3 else 1
            if m.ndim > 3 or m.shape[-1] != D or m.shape[0] not in (1, N):
                return None
            if segments not in (None, S):
                return None
            segments = S
            m = m if m.shape[0] == N else m.expand(N, *m.shape[1:])
        fitted.append(m)
    return fitted


def _broadcast(m: Tensor) -> Tensor:
    """A modulation as it multiplies [N, T, D] in plain PyTorch."""
    return m[:, None] if m.ndim == 2 else m


def _promoted(dtype: torch.dtype, *tensors: Tensor | None) -> torch.dtype:
    for tensor in tensors:
        if tensor is not None and tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
