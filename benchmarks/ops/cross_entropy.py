"""linear_cross_entropy in the benchmark: shapes [R, V, D], baselines, matrix products.

dblocks computes gradients in the forward, if they are needed: `both` is the cost of a training
step, and `backward` only a multiplication. Losses of other libraries have no weight per row: they
are compared in time and memory and checked against their own definition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import dblocks.functional as D
from benchmarks.ops.op import SEED, Absent, Baseline, Implementation, Op, Work

# A vocabulary of words, and one of characters, whose logits are small.
SHAPES = {
    "cpu": ((2048, 50_304, 768), (2048, 103, 192)),
    "cuda": ((16_384, 50_257, 2048), (8192, 128_256, 4096), (2048, 103, 192)),
}
# On a CPU without 16-bit matrix instructions, eager PyTorch's 16-bit products take minutes.
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16",)}


def make(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Rows, a weight for normally distributed logits, classes, and weights of the rows."""
    R, V, width = shape
    g = torch.Generator(device).manual_seed(SEED)
    return {
        "h": torch.randn(R, width, generator=g, device=device).to(dtype),
        "weight": (torch.randn(V, width, generator=g, device=device) * width**-0.5).to(dtype),
        "target": torch.randint(0, V, (R,), generator=g, device=device),
        "row_weight": torch.rand(R, generator=g, device=device),
    }


def work(shape: Sequence[int], size: int) -> Work:
    """One product forward and two backward; logits need not be in memory and are not counted."""
    R, V, width = shape
    read = (R + V) * width * size
    return Work(
        bytes_forward=read,
        bytes_backward=2 * read,
        operations_forward=2 * R * V * width,
        operations_backward=4 * R * V * width,
    )


def _logits(h: Tensor, weight: Tensor) -> Tensor:
    return F.linear(h, weight).to(torch.promote_types(h.dtype, torch.float32))


def eager(h: Tensor, weight: Tensor, target: Tensor, row_weight: Tensor) -> tuple[Tensor]:
    """Logits of all rows."""
    losses = F.cross_entropy(_logits(h, weight), target.long(), reduction="none")
    return ((row_weight * losses).sum() / len(target),)


def mean(h: Tensor, weight: Tensor, target: Tensor, row_weight: Tensor) -> tuple[Tensor]:
    """The unweighted mean, as computed by losses of other libraries."""
    return (F.cross_entropy(_logits(h, weight), target.long()),)


def torch_chunked() -> Implementation:
    """PyTorch's own chunked loss; the graph is kept, as its backward is called repeatedly."""
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)

    def call(h: Tensor, weight: Tensor, target: Tensor, row_weight: Tensor) -> tuple[Tensor]:
        return (F.linear_cross_entropy(h, weight, target, options=options),)

    return call


def liger() -> Implementation:
    """Liger's fused loss."""
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy as loss,
    )

    return lambda h, weight, target, row_weight: (loss(h, weight, target),)


def cut_cross_entropy() -> Implementation:
    """Apple's loss, which stores no logits."""
    from cut_cross_entropy import (  # pyright: ignore[reportMissingImports]
        linear_cross_entropy as loss,
    )

    return lambda h, weight, target, row_weight: (loss(h, weight, target),)


LIBRARIES = {
    "liger": ("liger-kernel", liger),
    "cut_cross_entropy": ("cut-cross-entropy", cut_cross_entropy),
}


def baselines(device: torch.device) -> dict[str, Implementation | Absent | Baseline]:
    """Baselines in addition to eager PyTorch."""
    from benchmarks.ops.baselines import compiled

    found: dict[str, Implementation | Absent | Baseline] = {"torch.compile": compiled(eager)}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["torch_chunked"] = Baseline(torch_chunked(), definition=mean)
    else:
        found["torch_chunked"] = "this PyTorch has no linear_cross_entropy"
    for name, (package, build) in LIBRARIES.items():
        if device.type != "cuda":
            found[name] = "its kernels need a GPU"
            continue
        try:
            found[name] = Baseline(build(), definition=mean)
        except ImportError as error:
            found[name] = f"{package} is not installed ({error})"
    return found


OP = Op(
    "linear_cross_entropy", make, ("h", "weight"),
    lambda **k: (D.linear_cross_entropy(**k),), eager, work,
    shapes=SHAPES, dtypes=DTYPES, baselines=baselines,
)  # fmt: skip
