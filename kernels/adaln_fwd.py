"""Forward of adaln, residual_adaln and gated_residual: one kernel, one pass over the rows.

The branch is left out for adaln, the normalised output for gated_residual; a tensor that is `None`
is decided when the kernel is compiled.
"""

import torch
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


@triton.jit(do_not_specialize=["T", "S", "L", "chunk", "num_chunks"])
def adaln_fwd_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, weight_ptr, bias_ptr,
    x_new_ptr, y_ptr, mean_ptr, rstd_ptr,
    x_sn, x_st, branch_sn, branch_st, gate_sn, gate_ss, shift_sn, shift_ss, scale_sn, scale_ss,
    T, S, L, D, chunk, num_chunks, inv_D, eps,
    RMS: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0) // num_chunks
    start = (tl.program_id(0) - i_g * num_chunks) * chunk
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_weight = load_channels(weight_ptr, o_d, m_d, 1.0)
    b_bias = load_channels(bias_ptr, o_d, m_d, 0.0)
    if not PER_TOKEN:
        b_gate = load_group(gate_ptr, i_g, S, gate_sn, gate_ss, o_d, m_d, 1.0)
        b_shift = load_group(shift_ptr, i_g, S, shift_sn, shift_ss, o_d, m_d, 0.0)
        b_scale = load_group(scale_ptr, i_g, S, scale_sn, scale_ss, o_d, m_d, 0.0)
    for first in range(start, min(start + chunk, L), BLOCK_R):
        o_l = first + tl.arange(0, BLOCK_R)
        m_l = o_l < L
        m = m_l[:, None] & m_d[None, :]
        i_n, i_t = token_of(i_g, o_l, T, S, L, PER_TOKEN)
        row = tl.cast(i_g, tl.int64) * L + o_l
        if PER_TOKEN:
            b_gate = load_tokens(gate_ptr, i_n, i_t, gate_sn, gate_ss, o_d, m, 1.0)
            b_shift = load_tokens(shift_ptr, i_n, i_t, shift_sn, shift_ss, o_d, m, 0.0)
            b_scale = load_tokens(scale_ptr, i_n, i_t, scale_sn, scale_ss, o_d, m, 0.0)
        b_x = load_rows(x_ptr, i_n, i_t, x_sn, x_st, o_d, m)
        if branch_ptr is not None:
            b_x += b_gate * load_rows(branch_ptr, i_n, i_t, branch_sn, branch_st, o_d, m)
            # The norm sees what the backward will read: x_new after rounding.
            b_x = b_x.to(x_new_ptr.dtype.element_ty).to(tl.float32)
            store_rows(x_new_ptr, row, D, o_d, m, b_x)
        if y_ptr is not None:
            if not RMS:
                b_mean = tl.sum(b_x, axis=1) * inv_D
                # The mean of what is left corrects its last bit: equal elements must give 0.
                b_mean += tl.sum(tl.where(m, b_x - b_mean[:, None], 0.0), axis=1) * inv_D
                tl.store(mean_ptr + row, b_mean, mask=m_l)
                # Masked again, or the padding would add mean^2 to the variance.
                b_x = tl.where(m, b_x - b_mean[:, None], 0.0)
            b_var = tl.sum(b_x * b_x, axis=1) * inv_D
            b_rstd = tl.rsqrt(b_var + tl.cast(eps, tl.float32))
            tl.store(rstd_ptr + row, b_rstd, mask=m_l)
            b_y = b_x * b_rstd[:, None] * b_weight + b_bias
            store_rows(y_ptr, row, D, o_d, m, b_y * (1 + b_scale) + b_shift)


def adaln_fwd(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: bool,
    rms: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_new, y, mean and rstd; those that were not asked for have no elements."""
    N, T, D = x.shape
    # Each absent output is a tensor of its own: an op may not return one tensor twice.
    x_new = x.new_empty((N, T, D) if branch is not None else 0)
    y = x.new_empty((N, T, D) if normalise else 0, dtype=out_dtype)
    mean = x.new_empty((N, T) if normalise and not rms else 0, dtype=torch.float32)
    rstd = x.new_empty((N, T) if normalise else 0, dtype=torch.float32)
    if x.numel() == 0:
        return x_new, y, mean, rstd
    x, branch, gate, shift, scale, weight, bias = (
        None if a is None else _launch.unit_last(a)
        for a in (x, branch, gate, shift, scale, weight, bias)
    )
    g = _launch.groups(x, gate, shift, scale)
    tile = _launch.row_tile(D, g.L)
    chunk = _launch.forward_chunk(g.L, g.count, tile.BLOCK_R)
    num_chunks = triton.cdiv(g.L, chunk)
    with _launch.device_guard(x):
        adaln_fwd_kernel[(g.count * num_chunks,)](
            x, branch, gate, shift, scale, weight, bias,
            None if branch is None else x_new, y if normalise else None, mean, rstd,
            *_launch.strides(x, branch, gate, shift, scale),
            T, g.S, g.L, D, chunk, num_chunks, 1.0 / D, eps,
            rms, g.per_token, tile.BLOCK_R, tile.BLOCK_D,
            num_warps=tile.num_warps, enable_fp_fusion=D > 1,
        )  # fmt: skip
    return x_new, y, mean, rstd
