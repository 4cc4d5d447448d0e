"""Cross-entropy of rows of logits and its gradient, one program a row."""

import functools
from collections.abc import Hashable

import triton
import triton.language as tl

from dblocks.kernels._common import launches

MAX_BLOCK_V = 2048  # 8 elements a thread of 8 warps: 16 bytes of a 16-bit dtype
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that a block of -inf leaves no NaN


@triton.jit
def load_logits(logits_ptr, bias_ptr, o_v, V, MASKED: tl.constexpr):
    """Logits and bias of the classes `o_v` [BLOCK_V], -inf past the last."""
    if MASKED:
        b_x = tl.load(logits_ptr + o_v, mask=o_v < V, other=-float("inf"))
    else:
        b_x = tl.load(logits_ptr + o_v)
    if bias_ptr is not None:
        if MASKED:
            b_x += tl.load(bias_ptr + o_v, mask=o_v < V, other=0.0).to(tl.float32)
        else:
            b_x += tl.load(bias_ptr + o_v).to(tl.float32)
    return b_x


@triton.jit
def add_exponentials(b_x, b_peak, b_total):
    """Lane-wise: the largest logit so far, and the sum of exponentials below it, with `b_x`."""
    b_largest = tl.maximum(b_peak, b_x)
    return b_largest, b_total * tl.exp(b_peak - b_largest) + tl.exp(b_x - b_largest)


@triton.jit
def store_gradient(
    logits_ptr, grad_ptr, b_x, o_v, V, target, peak, total,
    IN_PLACE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """softmax - onehot(target), over the logits in float32, in a tensor of its own, or both."""
    b_grad = tl.exp(b_x - peak) / total - tl.where(o_v == target, 1.0, 0.0)
    if IN_PLACE:
        if MASKED:
            tl.store(logits_ptr + o_v, b_grad, mask=o_v < V)
        else:
            tl.store(logits_ptr + o_v, b_grad)
    if grad_ptr is not None:
        if MASKED:
            tl.store(grad_ptr + o_v, b_grad.to(grad_ptr.dtype.element_ty), mask=o_v < V)
        else:
            tl.store(grad_ptr + o_v, b_grad.to(grad_ptr.dtype.element_ty))


# The stride is specialised: a multiple of 16 elements lets whole blocks move 16 bytes at once.
@triton.jit(do_not_specialize=["V"])
def cross_entropy_kernel(
    logits_ptr, grad_ptr, bias_ptr, target_ptr, loss_ptr,
    row_sn: tl.int64, V: tl.int32,
    BLOCK_V: tl.constexpr, HAS_GRAD: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    logits_ptr += i_r * row_sn
    if grad_ptr is not None:
        grad_ptr += i_r * row_sn
    target = tl.load(target_ptr + i_r)
    own = tl.load(logits_ptr + target)
    if bias_ptr is not None:
        own += tl.load(bias_ptr + target).to(tl.float32)
    # Whole blocks go without a mask, which would cut their accesses into single elements.
    whole = V // BLOCK_V * BLOCK_V
    o_block = tl.arange(0, BLOCK_V)
    b_peak = tl.full([BLOCK_V], LOWEST, tl.float32)
    b_total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, whole, BLOCK_V):
        b_x = load_logits(logits_ptr, bias_ptr, start + o_block, V, False)
        b_peak, b_total = add_exponentials(b_x, b_peak, b_total)
    o_rest = whole + o_block
    b_rest = load_logits(logits_ptr, bias_ptr, o_rest, V, True)
    b_peak, b_total = add_exponentials(b_rest, b_peak, b_total)
    peak = tl.max(b_peak, 0)
    total = tl.sum(b_total * tl.exp(b_peak - peak), 0)
    tl.store(loss_ptr + i_r, tl.log(total) + (peak - own))
    if HAS_GRAD:
        for start in range(0, whole, BLOCK_V):
            o_v = start + o_block
            b_x = load_logits(logits_ptr, bias_ptr, o_v, V, False)
            store_gradient(
                logits_ptr, grad_ptr, b_x, o_v, V, target, peak, total, IN_PLACE, False
            )  # fmt: skip
        store_gradient(logits_ptr, grad_ptr, b_rest, o_rest, V, target, peak, total, IN_PLACE, True)


@functools.lru_cache(1024)
def rows_launch(
    R: int, V: int, row_sn: int, has_grad: bool, in_place: bool, layouts: Hashable
) -> launches.Launch:
    """Writes the losses [R] of logits [R, V], softmax - onehot to `grad`, or over the logits.

    The gradients are those of the logits plus `bias`, before any weight. Rows of logits and grad
    have unit last stride and the same distance; targets are in [0, V). Arguments are logits, grad,
    bias, target and losses; `layouts` are their device, dtypes and alignments.
    """
    BLOCK_V = min(launches.next_power_of_2(V), MAX_BLOCK_V)
    numbers = (row_sn, V, BLOCK_V, has_grad or in_place, in_place)
    num_warps = min(max(BLOCK_V // 256, 1), 8)
    return launches.Launch(cross_entropy_kernel, R, numbers, num_warps=num_warps)
