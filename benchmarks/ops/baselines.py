"""Baselines: eager PyTorch, torch.compile, and libraries if installed.

A missing baseline is listed with the reason. torch.compile must produce one graph (`fullgraph`). It
is reset for every shape and dtype, so that its limit of recompilations, after which it silently
runs eager code, is never reached.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.ops.op import Absent, Baseline, Implementation, Op
from benchmarks.ops.registry import EPS


def compiled(function: Implementation, **options: bool) -> Implementation:
    """`function` compiled into one graph, with these options of Inductor."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # the backward is called repeatedly
    return torch.compile(function, fullgraph=True, dynamic=False, options=dict(options))


def liger_modulated_rms_norm() -> Implementation:
    """Liger's fused RMS norm and modulation, with one modulation row per sample."""
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_modulated_rms_norm as norm,
    )

    def call(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor]:
        return (norm(x, None, scale, shift, eps=EPS, in_place=False),)

    return call


def liger_layer_norm() -> Implementation:
    """Liger's layer norm, then the modulation as one addcmul."""
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_layer_norm as norm,
    )

    return _norm_then_modulate(lambda x, weight, bias: norm(x, weight, bias, EPS))


def flash_attn_layer_norm() -> Implementation:
    """flash-attn's Triton layer norm, then the modulation as one addcmul."""
    from flash_attn.ops.triton.layer_norm import (  # pyright: ignore[reportMissingImports]
        layer_norm_fn as norm,
    )

    return _norm_then_modulate(lambda x, weight, bias: norm(x, weight, bias, eps=EPS))


def _norm_then_modulate(norm: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Implementation:
    """Adapts norms that need a weight and a bias: ones and zeros, cached per width and dtype."""
    made: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def call(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor]:
        key = (x.shape[-1], x.dtype)
        if key not in made:
            made[key] = (x.new_ones(key[0]), x.new_zeros(key[0]))
        return (torch.addcmul(shift[:, None], norm(x, *made[key]), 1 + scale[:, None]),)

    return call


LIBRARIES: dict[str, tuple[str, Callable[[], Implementation]]] = {
    "liger_modulated_rms_norm": ("liger-kernel", liger_modulated_rms_norm),
    "liger_layer_norm": ("liger-kernel", liger_layer_norm),
    "flash_attn_layer_norm": ("flash-attn", flash_attn_layer_norm),
}


def implementations_of(
    op: Op, device: torch.device
) -> dict[str, Implementation | Absent | Baseline]:
    """The implementations in the benchmark of `op`: the function, or why it is absent."""
    found: dict[str, Implementation | Absent | Baseline] = {"dblocks": op.ours, "eager": op.eager}
    if op.baselines is not None:
        return found | op.baselines(device)
    found["torch.compile"] = compiled(op.eager)
    if op.oracle is not None:
        # On a CPU Inductor's random numbers are slower than PyTorch's own.
        found["torch.compile fallback_random"] = compiled(op.eager, fallback_random=True)
    for name in op.others:
        package, build = LIBRARIES[name]
        if device.type != "cuda":
            found[name] = "its kernels need a GPU"
            continue
        try:
            found[name] = build()
        except ImportError as error:
            found[name] = f"{package} is not installed ({error})"
    return found
