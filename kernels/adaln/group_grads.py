"""Sums over the rows of a group: the gradients of what those rows share.

The last pass of a backward that sums over rows (group_grads), and before it, for rows so wide that
adaln_bwd_kernel has no registers left for the sums, a pass that makes them (column_sums).

Partial sums are float32 [groups * chunks, 3, D]: A = sum dy xhat, B = sum dy and sum dh branch
(see adaln_bwd). Adding them in the order of the chunks makes two runs agree bit for bit.
"""

import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels._common import launches
from dblocks.kernels.adaln.rows import (
    load_channels,
    load_group,
    load_parts,
    offset_of,
    rows_of,
    token_of,
)

COLUMNS = 256  # of the second form for wide rows: 32 lanes of 8 elements
COLUMN_ROWS = 8
FINISH_COLUMNS = 16  # narrow, since there may be only one group to spread over the device
FINISH_CHUNKS = 256  # all at once where there are few programs to hide the latency of each other
FINISH_TILE = 4096  # elements of a program, or its columns would be few
FINISH_WARPS = 4


@triton.jit
def load_columns(ptr, i_n, i_t, stride_n, stride_t, m_l, o_d, D, STEP: tl.constexpr):
    """Columns `o_d` of rows in float32 [BLOCK_R, BLOCK_D]; zeros where `ptr` is None."""
    o_r = offset_of(i_n, i_t, stride_n, stride_t, STEP)
    return load_parts(ptr, o_r, m_l, o_d, D, 1, False, 0.0)[0]


_INTEGERS = (
    "dy_sn", "dy_st", "dx_new_sn", "dx_new_st", "x_sn", "x_st", "scale_sn", "scale_ss",
    "branch_sn", "branch_st", "T", "S", "L", "D", "chunk", "num_chunks",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def column_sums_kernel(
    dy_ptr, dx_new_ptr, x_ptr, scale_ptr, weight_ptr, mean_ptr, rstd_ptr, means_ptr, branch_ptr,
    partial_ptr,
    dy_sn, dy_st, dx_new_sn, dx_new_st, x_sn, x_st, scale_sn, scale_ss, branch_sn, branch_st,
    T, S, L, D, chunk, num_chunks,
    RMS: tl.constexpr, PER_TOKEN: tl.constexpr, SUM_NORM: tl.constexpr, STEP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D = D * STEP
    num_columns = tl.cdiv(D, BLOCK_D)
    # Programs of neighbouring columns follow one another, so that they read the same rows together.
    i_p = tl.program_id(0) // num_columns
    i_g = i_p // num_chunks
    start = (i_p - i_g * num_chunks) * chunk
    end = min(start + chunk, L)
    o_d = (tl.program_id(0) - i_p * num_columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_A = tl.full([BLOCK_R, BLOCK_D], 0, tl.float32)
    b_B = tl.full([BLOCK_R, BLOCK_D], 0, tl.float32)
    b_dgate = tl.full([BLOCK_R, BLOCK_D], 0, tl.float32)
    b_weight = load_channels(weight_ptr, o_d, D, 1, False, 1.0)[0]
    if not PER_TOKEN:
        b_scale = load_group(scale_ptr, i_g, S, scale_sn, scale_ss, o_d, D, STEP, 1, False, 0.0)[0]
    for first in range(start, end, BLOCK_R):
        o_l, m_l = rows_of(first, end, BLOCK_R)
        i_n, i_t = token_of(i_g, o_l, T, S, L, PER_TOKEN)
        row = tl.cast(i_g, tl.int64) * L + o_l
        if PER_TOKEN:
            b_scale = load_columns(scale_ptr, i_n, i_t, scale_sn, scale_ss, m_l, o_d, D, STEP)
        b_dh = load_columns(dx_new_ptr, i_n, i_t, dx_new_sn, dx_new_st, m_l, o_d, D, STEP)
        # Without dy only x_new was used: its gradient passes on unchanged.
        if dy_ptr is not None:
            b_dy = load_columns(dy_ptr, i_n, i_t, dy_sn, dy_st, m_l, o_d, D, STEP)
            b_xhat = load_columns(x_ptr, i_n, i_t, x_sn, x_st, m_l, o_d, D, STEP)
            b_rstd = tl.load(rstd_ptr + row, mask=m_l, other=0.0)[:, None]
            if not RMS:
                b_xhat -= tl.load(mean_ptr + row, mask=m_l, other=0.0)[:, None]
            b_xhat *= b_rstd
            # dgate needs dh, made again here in float32: that in dx is rounded.
            if branch_ptr is not None:
                b_a = b_dy * ((1 + b_scale) * b_weight)
                b_a -= b_xhat * tl.load(means_ptr + 2 * row + 1, mask=m_l, other=0.0)[:, None]
                if not RMS:
                    b_a -= tl.load(means_ptr + 2 * row, mask=m_l, other=0.0)[:, None]
                b_dh = b_a * b_rstd + b_dh
            if SUM_NORM:
                if PER_TOKEN:
                    b_dy *= 1 + b_scale
                b_A += b_dy * b_xhat
                b_B += b_dy
        if branch_ptr is not None:
            b_branch = load_columns(branch_ptr, i_n, i_t, branch_sn, branch_st, m_l, o_d, D, STEP)
            b_dgate += b_dh * b_branch
    p = partial_ptr + tl.cast(i_p, tl.int64) * 3 * D + o_d
    if SUM_NORM:
        tl.store(p, tl.sum(b_A, axis=0), mask=o_d < D)
        tl.store(p + D, tl.sum(b_B, axis=0), mask=o_d < D)
    if branch_ptr is not None:
        tl.store(p + 2 * D, tl.sum(b_dgate, axis=0), mask=o_d < D)


@triton.jit
def add_chunks(ptr, i_g, num_chunks, o_d, m_d, D, BLOCK_C: tl.constexpr):
    """One of the three sums of group `i_g` [1, BLOCK_D], its chunks added in their order."""
    # Lane c adds chunks c, c + BLOCK_C, ..: an order that depends on the number of chunks alone.
    b_sum = tl.zeros([BLOCK_C, o_d.shape[0]], tl.float32)
    for first in range(0, num_chunks, BLOCK_C):
        o_c, m_c = rows_of(first, num_chunks, BLOCK_C)
        p = ptr + (tl.cast(i_g, tl.int64) * num_chunks + o_c)[:, None] * 3 * D + o_d[None, :]
        b_sum += tl.load(p, mask=m_c[:, None] & m_d[None, :], other=0.0)
    return tl.sum(b_sum, axis=0)[None, :]


@triton.jit
def store_columns(ptr, o_g, o_d, m_d, b):
    tl.store(ptr + o_g + o_d[None, :], b.to(ptr.dtype.element_ty), mask=m_d[None, :])


@triton.jit(do_not_specialize=["scale_sn", "scale_ss", "S", "D", "num_chunks"])
def group_grads_kernel(
    partial_ptr, scale_ptr, weight_ptr, bias_ptr, dgate_ptr, dshift_ptr, dscale_ptr, affine_ptr,
    scale_sn, scale_ss, S, D, num_chunks,
    STEP: tl.constexpr, FIRST: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    D = D * STEP
    num_columns = tl.cdiv(D, BLOCK_D)
    # A program makes one sum: masks, not branches, choose what it stores. They compare columns with
    # D or 0, since interpreters of Triton 3.9 refuse the mask of a block and a scalar.
    i_s = FIRST + tl.program_id(0) % SUMS
    i_g = tl.program_id(0) // SUMS // num_columns
    o_d = (tl.program_id(0) // SUMS - i_g * num_columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_g = tl.cast(i_g, tl.int64) * D
    b_sum = add_chunks(partial_ptr + i_s * D, i_g, num_chunks, o_d, m_d, D, BLOCK_C)
    if dgate_ptr is not None:
        store_columns(dgate_ptr, o_g, o_d, o_d < tl.where(i_s == 2, D, 0), b_sum)
    if dshift_ptr is not None:
        store_columns(dshift_ptr, o_g, o_d, o_d < tl.where(i_s == 1, D, 0), b_sum)
    if dscale_ptr is not None:
        m_A = o_d < tl.where(i_s == 0, D, 0)
        b_dscale = b_sum * load_channels(weight_ptr, o_d, D, 1, False, 1.0)[0]
        # The one gradient of two sums. Other programs read nothing here: their mask is empty.
        if bias_ptr is not None:
            b_B = add_chunks(partial_ptr + D, i_g, num_chunks, o_d, m_A, D, BLOCK_C)
            b_dscale += b_B * load_channels(bias_ptr, o_d, D, 1, False, 0.0)[0]
        store_columns(dscale_ptr, o_g, o_d, m_A, b_dscale)
    if affine_ptr is not None:
        b_scale = load_group(scale_ptr, i_g, S, scale_sn, scale_ss, o_d, D, STEP, 1, False, 0.0)[0]
        store_columns(
            affine_ptr, 2 * o_g + i_s * D, o_d, o_d < tl.where(i_s < 2, D, 0), (1 + b_scale) * b_sum
        )  # fmt: skip


def column_sums(
    dy: Tensor | None,
    dx_new: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    branch: Tensor | None,
    chunk: int,
    rms: bool,
    sum_norm: bool,
    g: launches.Groups,
) -> launches.Launch:
    """Fills the partial sums of wide rows, without A and B or, where `branch` is None, dgate.

    The tensors of the launch are dy, dx_new, x, scale, weight, mean, rstd, means, branch and
    partial, where `means` [N, T, 2] are those of a and of a xhat (see adaln_bwd), of which dh is
    made again.
    """
    D = x.shape[-1]
    num_chunks = triton.cdiv(g.L, chunk)
    strides = launches.strides(dy, dx_new, x, scale, branch)
    step = launches.common_step(D, *strides)
    numbers = (
        *(s // step for s in strides),
        x.shape[1], g.S, g.L, D // step, chunk, num_chunks,
        rms, g.per_token, sum_norm, step, COLUMN_ROWS, COLUMNS,
    )  # fmt: skip
    programs = g.count * num_chunks * triton.cdiv(D, COLUMNS)
    return launches.Launch(column_sums_kernel, programs, numbers, num_warps=4)


def group_grads(
    D: int,
    num_chunks: int,
    scale: Tensor | None,
    dgate: bool,
    dshift: bool,
    dscale: bool,
    affine: bool,
    g: launches.Groups,
) -> launches.Launch:
    """Adds the chunks of every group and writes what they are the gradients of.

    The tensors of the launch are partial, scale, weight, bias, dgate, dshift, dscale and affine.
    """
    strides = launches.strides(scale)
    step = launches.common_step(D, *strides)
    BLOCK_C = min(FINISH_CHUNKS, launches.next_power_of_2(num_chunks))
    BLOCK_D = min(max(FINISH_TILE // BLOCK_C, FINISH_COLUMNS), COLUMNS)
    used = (dscale or affine, dshift or affine, dgate)  # A, B and that of the gate
    first, last = used.index(True), 2 - used[::-1].index(True)
    sums = last - first + 1
    numbers = (
        *(s // step for s in strides), g.S, D // step, num_chunks,
        step, first, sums, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    programs = g.count * triton.cdiv(D, BLOCK_D) * sums
    num_warps = min(max(BLOCK_C * BLOCK_D // 128, 1), FINISH_WARPS)  # 16 bytes a thread
    return launches.Launch(group_grads_kernel, programs, numbers, num_warps=num_warps)
