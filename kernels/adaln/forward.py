"""Forward of adaln, residual_adaln and gated_residual: one kernel, one pass over the rows.

The branch is left out for adaln, the normalised output for gated_residual; a tensor that is `None`
is decided when the kernel is compiled.
"""

# ruff: noqa: RUF005  (Triton has no unpacking in tuples)

import torch
import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels._common import launches
from dblocks.kernels.adaln.rows import (
    load_channels,
    load_group,
    load_parts,
    load_raw,
    mask_of,
    offset_of,
    plus_product,
    rows_of,
    standardised,
    store_parts,
    sum_both,
    token_of,
    widen,
)


@triton.jit
def fetch(
    x_ptr, branch_ptr, x_sn, x_st, branch_sn, branch_st, i_g, first, end, T, S, L, o_d, D,
    PER_TOKEN: tl.constexpr, STEP: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """x and branch of the tile that begins at row `first` of group `i_g`, as they are stored."""
    o_l, m_l = rows_of(first, end, BLOCK_R)
    i_n, i_t = token_of(i_g, o_l, T, S, L, PER_TOKEN)
    o_x = offset_of(i_n, i_t, x_sn, x_st, STEP)
    o_branch = offset_of(i_n, i_t, branch_sn, branch_st, STEP)
    return (
        load_raw(x_ptr, o_x, m_l, o_d, D, PARTS, FULL),
        load_raw(branch_ptr, o_branch, m_l, o_d, D, PARTS, FULL),
    )


@triton.jit
def rounded(x, dtype: tl.constexpr):
    parts = ()
    for k in tl.static_range(len(x)):
        parts = parts + (x[k].to(dtype).to(tl.float32),)
    return parts


@triton.jit
def fold(scale, shift, weight, bias):
    """`factor` and `term` with (h weight + bias) (1 + scale) + shift = h factor + term."""
    factor, term = (), ()
    for k in tl.static_range(len(scale)):
        factor = factor + (weight[k] * (1 + scale[k]),)
        term = term + (bias[k] * (1 + scale[k]) + shift[k],)
    return factor, term


@triton.jit
def modulated(h, factor, term):
    parts = ()
    for k in tl.static_range(len(h)):
        parts = parts + (h[k] * factor[k] + term[k],)
    return parts


@triton.jit
def mean_square(x, inv_D):
    b_sum = x[0] * x[0]
    for k in tl.static_range(1, len(x)):
        b_sum += x[k] * x[k]
    return tl.sum(b_sum, axis=1) * inv_D


@triton.jit
def mean_and_variance(x, m_l, o_d, D, inv_D, FULL: tl.constexpr):
    """Of each row [BLOCK_R], in two passes over the registers."""
    b_sum = x[0]
    for k in tl.static_range(1, len(x)):
        b_sum += x[k]
    b_mean = tl.sum(b_sum, axis=1) * inv_D
    b_sum = tl.zeros_like(x[0])
    b_square = tl.zeros_like(x[0])
    for k in tl.static_range(len(x)):
        # Masked again, or the padding would add mean^2 to the variance.
        b_d = tl.where(mask_of(m_l, o_d, D, k, len(x), FULL), x[k] - b_mean[:, None], 0.0)
        b_sum += b_d
        b_square += b_d * b_d
    b_sum, b_square = sum_both(b_sum, b_square)
    # The mean of what is left corrects the mean's last bit: equal elements must give 0.
    b_rest = b_sum * inv_D
    # Not tl.maximum, which would turn NaN into 0.
    b_var = b_square * inv_D - b_rest * b_rest
    return b_mean + b_rest, tl.where(b_var < 0, 0.0, b_var)


_INTEGERS = (
    "x_sn", "x_st", "branch_sn", "branch_st", "gate_sn", "gate_ss", "shift_sn", "shift_ss",
    "scale_sn", "scale_ss", "T", "S", "L", "D", "chunk", "num_chunks",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def adaln_fwd_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr,
    x_new_ptr, y_ptr, mean_ptr, rstd_ptr, eps,
    x_sn, x_st, branch_sn, branch_st, gate_sn, gate_ss, shift_sn, shift_ss, scale_sn, scale_ss,
    T, S, L, D, chunk, num_chunks, inv_D,
    RMS: tl.constexpr, PER_TOKEN: tl.constexpr, STEP: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr, PARTS: tl.constexpr, FULL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0) // num_chunks
    start = (tl.program_id(0) - i_g * num_chunks) * chunk
    end = min(start + chunk, L)
    D = D * STEP
    o_d = tl.arange(0, BLOCK_D // PARTS)
    b_weight = load_channels(weight_ptr, o_d, D, PARTS, FULL, 1.0)
    b_bias = load_channels(bias_ptr, o_d, D, PARTS, FULL, 0.0)
    if not PER_TOKEN:
        b_gate = load_group(gate_ptr, i_g, S, gate_sn, gate_ss, o_d, D, STEP, PARTS, FULL, 1.0)
        b_shift = load_group(shift_ptr, i_g, S, shift_sn, shift_ss, o_d, D, STEP, PARTS, FULL, 0.0)
        b_scale = load_group(scale_ptr, i_g, S, scale_sn, scale_ss, o_d, D, STEP, PARTS, FULL, 0.0)
        b_factor, b_term = fold(b_scale, b_shift, b_weight, b_bias)
    if AHEAD:
        r_x, r_branch = fetch(
            x_ptr, branch_ptr, x_sn, x_st, branch_sn, branch_st, i_g, start, end, T, S, L, o_d, D,
            PER_TOKEN, STEP, BLOCK_R, PARTS, FULL,
        )  # fmt: skip
    for first in range(start, end, BLOCK_R):
        if AHEAD:
            b_x, b_branch = widen(r_x), widen(r_branch)
        # Ahead, these are the rows of the next tile: asked for before this one's sums.
        r_x, r_branch = fetch(
            x_ptr, branch_ptr, x_sn, x_st, branch_sn, branch_st,
            i_g, first + BLOCK_R if AHEAD else first, end, T, S, L, o_d, D,
            PER_TOKEN, STEP, BLOCK_R, PARTS, FULL,
        )  # fmt: skip
        if not AHEAD:
            b_x, b_branch = widen(r_x), widen(r_branch)
        o_l, m_l = rows_of(first, end, BLOCK_R)
        i_n, i_t = token_of(i_g, o_l, T, S, L, PER_TOKEN)
        row = tl.cast(i_g, tl.int64) * L + o_l
        if PER_TOKEN:
            o_gate = offset_of(i_n, i_t, gate_sn, gate_ss, STEP)
            o_shift = offset_of(i_n, i_t, shift_sn, shift_ss, STEP)
            o_scale = offset_of(i_n, i_t, scale_sn, scale_ss, STEP)
            b_gate = load_parts(gate_ptr, o_gate, m_l, o_d, D, PARTS, FULL, 1.0)
            b_shift = load_parts(shift_ptr, o_shift, m_l, o_d, D, PARTS, FULL, 0.0)
            b_scale = load_parts(scale_ptr, o_scale, m_l, o_d, D, PARTS, FULL, 0.0)
            b_factor, b_term = fold(b_scale, b_shift, b_weight, b_bias)
        if branch_ptr is not None:
            # The norm sees what the backward will read: x_new after rounding.
            b_x = rounded(plus_product(b_x, b_gate, b_branch), x_new_ptr.dtype.element_ty)
            store_parts(x_new_ptr, row * D, m_l, o_d, D, FULL, b_x)
        if y_ptr is not None:
            if RMS:
                b_var = mean_square(b_x, inv_D)
                b_mean = b_var
            else:
                b_mean, b_var = mean_and_variance(b_x, m_l, o_d, D, inv_D, FULL)
                tl.store(mean_ptr + row, b_mean, mask=m_l)
            b_rstd = tl.rsqrt(b_var + tl.cast(eps, tl.float32))
            tl.store(rstd_ptr + row, b_rstd, mask=m_l)
            b_y = modulated(standardised(b_x, b_mean, b_rstd, RMS), b_factor, b_term)
            store_parts(y_ptr, row * D, m_l, o_d, D, FULL, b_y)


def adaln_fwd(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    normalise: bool, rms: bool, eps: float, out_dtype: torch.dtype,
) -> launches.Plan:  # fmt: skip
    """x_new, y, mean and rstd; those that were not asked for are None."""
    launch = _launch(x, branch, gate, shift, scale, rms) if x.numel() else None

    def run(x, branch, gate, shift, scale, weight, bias, normalise, rms, eps, out_dtype):
        x_new = None if branch is None else _empty(x, x.dtype)
        y = mean = rstd = None
        if normalise:
            y, rstd = _empty(x, out_dtype), x.new_empty(x.shape[:2], dtype=torch.float32)
            mean = None if rms else torch.empty_like(rstd)
        if launch is not None:
            launch.start(
                x, branch, gate, shift, scale, weight, bias, x_new, y, mean, rstd, eps,
                *launch.numbers,
            )  # fmt: skip
        return x_new, y, mean, rstd

    return launches.copies(x, branch, gate, shift, scale, weight, bias), run


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _launch(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None,
    scale: Tensor | None, rms: bool,
) -> launches.Launch:  # fmt: skip
    T, D = x.shape[1:]
    g = launches.groups(x, gate, shift, scale)
    tile = launches.row_tile(D, g.L, launches.FORWARD_PARTS)
    chunk = launches.forward_chunk(g.L, g.count, tile)
    num_chunks = triton.cdiv(g.L, chunk)
    strides = launches.strides(x, branch, gate, shift, scale)
    step = launches.common_step(D, *strides)
    # With a branch there is room for the next tile at every width.
    ahead = min(chunk, g.L) > tile.BLOCK_R and (tile.num_warps == 4 or branch is not None)
    numbers = (
        *(s // step for s in strides),
        T, g.S, g.L, D // step, chunk, num_chunks, 1.0 / D,
        rms, g.per_token, step, *tile[:3], tile.BLOCK_D == D, ahead,
    )  # fmt: skip
    return launches.Launch(
        adaln_fwd_kernel, g.count * num_chunks, numbers,
        num_warps=tile.num_warps, enable_fp_fusion=D > 1,
    )  # fmt: skip
