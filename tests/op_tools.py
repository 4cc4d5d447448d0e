"""Every public op with small arguments of its own, for what must hold of all of them."""

import pytest
import torch

from dblocks.functional import (
    adaln,
    doubled_attention,
    edm_denoise,
    edm_loss,
    euler_step,
    gated_residual,
    linear_cross_entropy,
    noise_inject,
    residual_adaln,
)
from tools import DEVICE, FUSED, normal

N, T, D = 2, 4, 16
ROWS = ("x", "branch", "gate", "shift", "scale", "weight", "bias", "f", "z", "y", "denoised")
SHAPES = dict.fromkeys(ROWS, (N, T, D)) | {
    "weight": (D,), "bias": (D,), "sigma": (N, T), "sigma_next": (N, T), "row_weight": (N, T),
    "q": (1, 2, 2 * T, D), "k": (1, 2, 2 * T, D), "v": (1, 2, 2 * T, D),
    "h": (D, D), "head": (D, D), "class_bias": (D,), "loss_weight": (D,),
}  # fmt: skip
POSITIVE = ("sigma", "sigma_next", "row_weight", "loss_weight")
PLAIN = ("sigma", "sigma_next", "row_weight", "loss_weight")  # no gradient


def cross_entropy(h, head, class_bias, loss_weight, impl, reduction="mean"):
    return linear_cross_entropy(
        h, head, torch.arange(D, device=DEVICE), bias=class_bias, row_weight=loss_weight,
        reduction=reduction, impl=impl,
    )  # fmt: skip


def row_losses(h, head, class_bias, loss_weight, impl):
    return cross_entropy(h, head, class_bias, loss_weight, impl, "none")


# Of each op, under its name in messages: the call, and the names of its tensors.
OPS = {
    "adaln": (adaln, ("x", "shift", "scale", "weight", "bias")),
    "residual_adaln": (
        residual_adaln, ("x", "branch", "gate", "shift", "scale", "weight", "bias"),
    ),
    "gated_residual": (gated_residual, ("x", "branch", "gate")),
    "noise_inject": (lambda y, sigma, impl: noise_inject(y, sigma, 3, impl=impl), ("y", "sigma")),
    "edm_denoise": (edm_denoise, ("f", "z", "sigma")),
    "edm_loss": (
        lambda f, y, sigma, row_weight, impl: edm_loss(
            f, y, sigma, 3, row_weight=row_weight, impl=impl
        ),
        ("f", "y", "sigma", "row_weight"),
    ),
    "euler_step": (euler_step, ("z", "denoised", "sigma", "sigma_next")),
    "doubled_attention": (doubled_attention, ("q", "k", "v")),
    "linear_cross_entropy": (cross_entropy, ("h", "head", "class_bias", "loss_weight")),
    "linear_cross_entropy, rows": (row_losses, ("h", "head", "class_bias", "loss_weight")),
}  # fmt: skip
IMPLS = {
    "doubled_attention": ("triton", "composed"),
    "linear_cross_entropy": ("triton", "chunked"),
    "linear_cross_entropy, rows": ("triton", "chunked"),
}
CASES = [
    pytest.param(op, *getattr(impl, "values", [impl]), marks=getattr(impl, "marks", ()))
    for op in OPS
    for impl in IMPLS.get(op, FUSED)
]


def arguments(op, dtype=torch.float32):
    """The tensors of an op by their names; those with a gradient require it."""
    found = {}
    for i, name in enumerate(OPS[op][1]):
        value = normal(*SHAPES[name], seed=i).to(dtype)
        value = value.abs() + 0.1 if name in POSITIVE else value
        has_gradient = name not in PLAIN and not (op == "edm_loss" and name == "y")
        found[name] = value.requires_grad_(has_gradient)
    return found


def total(outputs):
    """A number that every element of the outputs has its own part in."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(
        (o * torch.linspace(1, 2, o.numel(), device=o.device).view(o.shape)).sum() for o in outputs
    )
