"""doubled_attention in the benchmark: shapes [N, H, Hkv, T, Dh], baselines, allowed pairs.

Each baseline computes doubled_attention with `block_size=1`, except `causal_2T`: one causal
attention over both halves, with twice the pairs, for comparison of times only. It is checked
against its own definition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import (
    FlexKernelOptions,
    create_block_mask,
    flex_attention,
)
from torch.utils.checkpoint import checkpoint

import dblocks.functional as D
from benchmarks.ops.op import SEED, Absent, Baseline, Implementation, Op, Work
from dblocks.kernels.reference import doubled_mask
from dblocks.ops.doubled_attention import Backend

SHAPES = {
    "cpu": (
        *((1, 8, 8, T, 64) for T in (256, 512, 1024, 2048)),
        (1, 4, 4, 1024, 128),
        (1, 8, 2, 1024, 64),
    ),
    # Most important first: a budget may leave out the last ones.
    "cuda": (
        (4, 16, 16, 4096, 128),
        (4, 32, 32, 4096, 64),
        (4, 16, 4, 4096, 128),
        (4, 16, 16, 1024, 128),
        (4, 32, 32, 1024, 64),
        (4, 32, 8, 4096, 64),
        (4, 16, 16, 8192, 128),
        (4, 32, 32, 512, 64),
        (4, 16, 16, 16384, 128),
    ),
}
# On a CPU without bfloat16 instructions, the baselines' backward is ten times slower in bfloat16;
# dblocks always computes in float32. `--dtype bfloat16` times it.
DTYPES = {"cpu": ("float32",), "cuda": ("bfloat16",)}
# Smaller tiles than FlexAttention's defaults, as others set by hand for such masks, which have many
# partial blocks.
TUNED_FLEX: FlexKernelOptions = {
    "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 64, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 64,
}  # fmt: skip


def make(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Normal q, k and v."""
    N, H, heads, T, width = shape
    g = torch.Generator(device).manual_seed(SEED)
    draw = lambda h: torch.randn(N, h, 2 * T, width, generator=g, device=device).to(dtype)
    return {"q": draw(H), "k": draw(heads), "v": draw(heads)}


def work(shape: Sequence[int], size: int) -> Work:
    """Matrix products over the T (T + 1) allowed pairs: two forward, five backward."""
    N, H, heads, T, width = shape
    pairs = N * H * T * (T + 1)
    rows = 2 * N * T * width * size
    return Work(
        bytes_forward=rows * (2 * H + 2 * heads),
        bytes_backward=rows * (4 * H + 4 * heads),
        operations_forward=4 * width * pairs,
        operations_backward=10 * width * pairs,
    )


MAX_BASELINE_BYTES = 20e9  # baselines that need more on a GPU are left out


def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    """The reference, which stores all scores; on a GPU only if they fit."""
    needed = 4 * q.element_size() * q.shape[0] * q.shape[1] * q.shape[2] ** 2
    if q.is_cuda and needed > MAX_BASELINE_BYTES:
        raise torch.OutOfMemoryError(f"{needed / 1e9:.0f} GB of scores")
    return (D.doubled_attention(q, k, v, impl="reference"),)


_masks: dict[tuple[int, torch.device], Tensor] = {}


def _mask(q: Tensor) -> Tensor:
    key = (q.shape[2] // 2, q.device)
    if key not in _masks:
        _masks.clear()
        _masks[key] = doubled_mask(key[0], device=q.device)
    return _masks[key]


def _by_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Dense float64 attention, one head at a time, recomputed in the backward."""

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -math.inf)
        return scores.softmax(-1) @ v

    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).flatten(0, 1) for x in (k, v))
    heads = zip(q.flatten(0, 1), k, v, strict=True)
    outputs = [checkpoint(one, *head, use_reentrant=False) for head in heads]
    return torch.stack([o for o in outputs if o is not None]).view_as(q)


def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    """PyTorch's attention with the mask; on GPUs, with the backend that is correct at every T."""
    if q.dtype == torch.float64:
        return (_by_head(q, k, v, _mask(q)),)
    if q.is_cpu:
        return (F.scaled_dot_product_attention(q, k, v, _mask(q), enable_gqa=True),)
    # For some lengths of the mask, cuDNN's gradients are NaN (pytorch issue 196678).
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return (F.scaled_dot_product_attention(q, k, v, _mask(q)),)


def causal_2T(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    """One causal attention over both halves."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),)


def _causal_definition(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    if q.dtype == torch.float64:
        return (_by_head(q, k, v, mask),)
    return (F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),)


def flex(options: FlexKernelOptions | None = None) -> Implementation:
    """Compiled FlexAttention; the block mask is created once for each T."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # the backward is called repeatedly
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    masks = {}

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        T = q.shape[2] // 2
        if T not in masks:

            def allowed(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
                to_clean = (key < T) & (key <= row - T * (row >= T) - (row >= T).int())
                return to_clean | ((row >= T) & (row == key))

            masks[T] = create_block_mask(allowed, None, None, 2 * T, 2 * T, device=q.device.type)
        o = compiled(
            q, k, v, block_mask=masks[T], enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=options,
        )  # fmt: skip
        return (o,)

    return call


def composed(backend: Backend) -> Implementation:
    """Composed attention with one backend's causal attention."""
    return lambda q, k, v: (D.doubled_attention(q, k, v, impl="composed", backend=backend),)


def baselines(device: torch.device) -> dict[str, Implementation | Absent | Baseline]:
    """Baselines in addition to the dense mask."""
    found: dict[str, Implementation | Absent | Baseline] = {
        "causal_2T": Baseline(causal_2T, definition=_causal_definition),
        "reference": reference,
    }
    if device.type != "cuda":
        found["flex"] = Baseline(flex(), forward_only="FlexAttention has no backward on CPUs")
        return found
    return found | {
        "flex": flex(),
        "flex tuned": flex(TUNED_FLEX),
        "composed_sdpa": composed("sdpa"),
        "composed_cudnn": composed("cudnn"),
    }


OP = Op(
    "doubled_attention", make, ("q", "k", "v"),
    lambda q, k, v: (D.doubled_attention(q, k, v),), dense, work,
    shapes=SHAPES, dtypes=DTYPES, baselines=baselines,
)  # fmt: skip
