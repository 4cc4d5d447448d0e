"""Sums over the rows of a group: the gradients of what those rows share.

Partial sums are float32 [groups * chunks, 3, D]: A = sum dy xhat, B = sum dy and sum dh branch
(see adaln_bwd). Adding them in the order of the chunks makes two runs agree bit for bit.
"""

import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels import _launch
from dblocks.kernels._rows import (
    load_channels,
    load_group,
    load_rows,
    load_tokens,
    store_rows,
    token_of,
)

COLUMNS = 256  # of the second form for wide rows: 32 lanes of 8 elements
COLUMN_ROWS = 8
FINISH_COLUMNS = 64  # narrow, since there may be only one group to spread over the device
FINISH_CHUNKS = 32


@triton.jit(do_not_specialize=["T", "S", "L", "chunk", "num_chunks"])
def column_sums_kernel(
    dy_ptr, dx_new_ptr, x_ptr, scale_ptr, weight_ptr, mean_ptr, rstd_ptr, means_ptr, branch_ptr,
    partial_ptr,
    dy_sn, dy_st, dx_new_sn, dx_new_st, x_sn, x_st, scale_sn, scale_ss, branch_sn, branch_st,
    T, S, L, D, chunk, num_chunks,
    RMS: tl.constexpr, PER_TOKEN: tl.constexpr, SUM_NORM: tl.constexpr, SUM_GATE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_columns = tl.cdiv(D, BLOCK_D)
    i_p = tl.program_id(0) // num_columns
    i_g = i_p // num_chunks
    start = (i_p - i_g * num_chunks) * chunk
    o_d = (tl.program_id(0) - i_p * num_columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_A = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_B = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_dgate = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_weight = load_channels(weight_ptr, o_d, m_d, 1.0)
    if not PER_TOKEN:
        b_scale = load_group(scale_ptr, i_g, S, scale_sn, scale_ss, o_d, m_d, 0.0)
    for first in range(start, min(start + chunk, L), BLOCK_R):
        o_l = first + tl.arange(0, BLOCK_R)
        m_l = o_l < L
        m = m_l[:, None] & m_d[None, :]
        i_n, i_t = token_of(i_g, o_l, T, S, L, PER_TOKEN)
        row = tl.cast(i_g, tl.int64) * L + o_l
        if PER_TOKEN:
            b_scale = load_tokens(scale_ptr, i_n, i_t, scale_sn, scale_ss, o_d, m, 0.0)
        b_dh = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        if dy_ptr is not None:
            b_dy = load_rows(dy_ptr, i_n, i_t, dy_sn, dy_st, o_d, m)
            b_xhat = load_rows(x_ptr, i_n, i_t, x_sn, x_st, o_d, m)
            b_rstd = tl.load(rstd_ptr + row, mask=m_l, other=0.0)[:, None]
            if not RMS:
                b_xhat -= tl.load(mean_ptr + row, mask=m_l, other=0.0)[:, None]
            b_xhat *= b_rstd
            if SUM_GATE:
                b_dh = b_dy * (1 + b_scale) * b_weight
                b_dh -= b_xhat * tl.load(means_ptr + 2 * row + 1, mask=m_l, other=0.0)[:, None]
                if not RMS:
                    b_dh -= tl.load(means_ptr + 2 * row, mask=m_l, other=0.0)[:, None]
                b_dh *= b_rstd
            if SUM_NORM:
                if PER_TOKEN:
                    b_dy *= 1 + b_scale
                b_A += b_dy * b_xhat
                b_B += b_dy
        if SUM_GATE:
            if dx_new_ptr is not None:
                b_dh += load_rows(dx_new_ptr, i_n, i_t, dx_new_sn, dx_new_st, o_d, m)
            b_dgate += b_dh * load_rows(branch_ptr, i_n, i_t, branch_sn, branch_st, o_d, m)
    p = partial_ptr + tl.cast(i_p, tl.int64) * 3 * D + o_d
    if SUM_NORM:
        tl.store(p, tl.sum(b_A, axis=0), mask=m_d)
        tl.store(p + D, tl.sum(b_B, axis=0), mask=m_d)
    if SUM_GATE:
        tl.store(p + 2 * D, tl.sum(b_dgate, axis=0), mask=m_d)


@triton.jit(do_not_specialize=["S", "num_chunks"])
def group_grads_kernel(
    partial_ptr, scale_ptr, weight_ptr, bias_ptr, dgate_ptr, dshift_ptr, dscale_ptr, affine_ptr,
    scale_sn, scale_ss, S, D, num_chunks,
    SUM_NORM: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_columns = tl.cdiv(D, BLOCK_D)
    i_g = tl.program_id(0) // num_columns
    o_d = (tl.program_id(0) - i_g * num_columns) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_A = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    b_B = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    b_dgate = tl.zeros([BLOCK_C, BLOCK_D], tl.float32)
    for first in range(0, num_chunks, BLOCK_C):
        o_c = first + tl.arange(0, BLOCK_C)
        m = (o_c < num_chunks)[:, None] & m_d[None, :]
        p = partial_ptr + (tl.cast(i_g, tl.int64) * num_chunks + o_c)[:, None] * 3 * D
        if SUM_NORM:
            b_A += tl.load(p + o_d[None, :], mask=m, other=0.0)
            b_B += tl.load(p + D + o_d[None, :], mask=m, other=0.0)
        if dgate_ptr is not None:
            b_dgate += tl.load(p + 2 * D + o_d[None, :], mask=m, other=0.0)
    o_g = tl.cast(i_g, tl.int64) * D + o_d
    if dgate_ptr is not None:
        tl.store(dgate_ptr + o_g, tl.sum(b_dgate, 0).to(dgate_ptr.dtype.element_ty), mask=m_d)
    if SUM_NORM:
        b_A = tl.sum(b_A, axis=0)
        b_B = tl.sum(b_B, axis=0)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + o_g, b_B.to(dshift_ptr.dtype.element_ty), mask=m_d)
    if dscale_ptr is not None:
        b_dscale = b_A
        if weight_ptr is not None:
            b_dscale *= tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            b_dscale += b_B * tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
        tl.store(dscale_ptr + o_g, b_dscale.to(dscale_ptr.dtype.element_ty), mask=m_d)
    if affine_ptr is not None:
        b_scale = load_group(scale_ptr, i_g, S, scale_sn, scale_ss, o_d, m_d, 0.0)
        m = m_d[None, :]
        store_rows(affine_ptr, 2 * i_g + tl.arange(0, 1), D, o_d, m, (1 + b_scale) * b_A[None, :])
        store_rows(
            affine_ptr, 2 * i_g + 1 + tl.arange(0, 1), D, o_d, m, (1 + b_scale) * b_B[None, :]
        )


def column_sums(
    dy: Tensor | None,
    dx_new: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    means: Tensor | None,
    branch: Tensor | None,
    partial: Tensor,
    g: _launch.Groups,
    chunk: int,
    rms: bool,
    sum_norm: bool,
) -> None:
    """Fills the partial sums of wide rows, without A and B or, where `branch` is None, dgate.

    `means` [N, T, 2] are those of a and of a xhat (see adaln_bwd), of which dh is made again.
    """
    D = x.shape[-1]
    num_chunks = triton.cdiv(g.L, chunk)
    column_sums_kernel[(g.count * num_chunks * triton.cdiv(D, COLUMNS),)](
        dy, dx_new, x, scale, weight, mean, rstd, means, branch, partial,
        *_launch.strides(dy, dx_new, x, scale, branch),
        x.shape[1], g.S, g.L, D, chunk, num_chunks,
        rms, g.per_token, sum_norm, branch is not None, COLUMN_ROWS, COLUMNS, num_warps=4,
    )  # fmt: skip


def group_grads(
    partial: Tensor,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dgate: Tensor | None,
    dshift: Tensor | None,
    dscale: Tensor | None,
    affine: Tensor | None,
    g: _launch.Groups,
) -> None:
    """Adds the chunks of every group and writes what they are the gradients of."""
    D = partial.shape[-1]
    num_chunks = partial.shape[0] // g.count
    norm = any(a is not None for a in (dshift, dscale, affine))
    group_grads_kernel[(g.count * triton.cdiv(D, FINISH_COLUMNS),)](
        partial, scale, weight, bias, dgate, dshift, dscale, affine,
        *_launch.strides(scale), g.S, D, num_chunks,
        norm, min(FINISH_CHUNKS, _launch.next_power_of_2(num_chunks)), FINISH_COLUMNS,
        num_warps=4,
    )  # fmt: skip
