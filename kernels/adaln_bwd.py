"""Backward of adaln, residual_adaln and gated_residual: one pass over the rows, no atomics.

With xhat = (x - mean) rstd, a = dy (1 + scale) weight and the mean over D:

    dh      = rstd (a - mean(a) - xhat mean(a xhat)) + dx_new        (rms: without mean(a))
    dx      = dh                       dbranch = gate dh
    A       = sum dy xhat              dscale  = weight A + bias B
    B       = sum dy                   dshift  = B
    dweight = sum (1 + scale) A        dbias   = sum (1 + scale) B
    dgate   = sum dh branch

A, B and dgate are sums over the rows that share a modulation. A program keeps them in registers
for one chunk of rows of one group and writes them once; `_group_grads` adds the chunks in a fixed
order. Above MAX_ONE_PASS_WIDTH they do not fit beside the row: a second kernel, tiled over D, reads
the rows again, and the two means of each row, so that dh need not be read back after rounding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels import _group_grads, _launch
from dblocks.kernels._rows import (
    load_channels,
    load_group,
    load_rows,
    load_tokens,
    store_rows,
    token_of,
)


@triton.jit(do_not_specialize=["T", "S", "L", "chunk", "num_chunks"])
def adaln_bwd_kernel(
    dy_ptr, dx_new_ptr, x_ptr, branch_ptr, gate_ptr, scale_ptr, weight_ptr, bias_ptr,
    mean_ptr, rstd_ptr, dx_ptr, dbranch_ptr, dgate_ptr, dshift_ptr, dscale_ptr, partial_ptr,
    means_ptr,
    dy_sn, dy_st, dx_new_sn, dx_new_st, x_sn, x_st, branch_sn, branch_st,
    gate_sn, gate_ss, scale_sn, scale_ss,
    T, S, L, D, chunk, num_chunks, inv_D,
    RMS: tl.constexpr, PER_TOKEN: tl.constexpr, SUM_NORM: tl.constexpr, SUM_GATE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0) // num_chunks
    start = (tl.program_id(0) - i_g * num_chunks) * chunk
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_weight = load_channels(weight_ptr, o_d, m_d, 1.0)
    if PER_TOKEN:
        b_bias = load_channels(bias_ptr, o_d, m_d, 0.0)
    else:
        b_gate = load_group(gate_ptr, i_g, S, gate_sn, gate_ss, o_d, m_d, 1.0)
        b_scale = load_group(scale_ptr, i_g, S, scale_sn, scale_ss, o_d, m_d, 0.0)
    if SUM_NORM:
        b_A = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        b_B = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if SUM_GATE:
        b_dgate = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(start, min(start + chunk, L), BLOCK_R):
        o_l = first + tl.arange(0, BLOCK_R)
        m_l = o_l < L
        m = m_l[:, None] & m_d[None, :]
        i_n, i_t = token_of(i_g, o_l, T, S, L, PER_TOKEN)
        row = tl.cast(i_g, tl.int64) * L + o_l
        if PER_TOKEN:
            b_gate = load_tokens(gate_ptr, i_n, i_t, gate_sn, gate_ss, o_d, m, 1.0)
            b_scale = load_tokens(scale_ptr, i_n, i_t, scale_sn, scale_ss, o_d, m, 0.0)
        b_dh = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        if dy_ptr is not None:
            b_dy = load_rows(dy_ptr, i_n, i_t, dy_sn, dy_st, o_d, m)
            b_xhat = load_rows(x_ptr, i_n, i_t, x_sn, x_st, o_d, m)
            b_rstd = tl.load(rstd_ptr + row, mask=m_l, other=0.0)[:, None]
            if not RMS:
                b_xhat -= tl.load(mean_ptr + row, mask=m_l, other=0.0)[:, None]
            b_xhat *= b_rstd
            b_a = b_dy * (1 + b_scale) * b_weight
            b_along = tl.sum(b_a * b_xhat, axis=1) * inv_D
            b_dh = b_a - b_xhat * b_along[:, None]
            if means_ptr is not None:
                tl.store(means_ptr + 2 * row + 1, b_along, mask=m_l)
            if not RMS:
                b_mean = tl.sum(b_a, axis=1) * inv_D
                b_dh -= b_mean[:, None]
                if means_ptr is not None:
                    tl.store(means_ptr + 2 * row, b_mean, mask=m_l)
            b_dh *= b_rstd
            if PER_TOKEN:
                if dshift_ptr is not None:
                    store_rows(dshift_ptr, row, D, o_d, m, b_dy)
                if dscale_ptr is not None:
                    store_rows(dscale_ptr, row, D, o_d, m, b_dy * (b_xhat * b_weight + b_bias))
                b_dy *= 1 + b_scale
            if SUM_NORM:
                b_A += b_dy * b_xhat
                b_B += b_dy
        if dx_new_ptr is not None:
            b_dh += load_rows(dx_new_ptr, i_n, i_t, dx_new_sn, dx_new_st, o_d, m)
        if dx_ptr is not None:
            store_rows(dx_ptr, row, D, o_d, m, b_dh)
        if dbranch_ptr is not None:
            store_rows(dbranch_ptr, row, D, o_d, m, b_gate * b_dh)
        if SUM_GATE or dgate_ptr is not None:
            b_dh *= load_rows(branch_ptr, i_n, i_t, branch_sn, branch_st, o_d, m)
        if dgate_ptr is not None:
            store_rows(dgate_ptr, row, D, o_d, m, b_dh)
        if SUM_GATE:
            b_dgate += b_dh
    o_p = tl.cast(tl.program_id(0), tl.int64) * 3 * D + o_d
    if SUM_NORM:
        tl.store(partial_ptr + o_p, tl.sum(b_A, axis=0), mask=m_d)
        tl.store(partial_ptr + o_p + D, tl.sum(b_B, axis=0), mask=m_d)
    if SUM_GATE:
        tl.store(partial_ptr + o_p + 2 * D, tl.sum(b_dgate, axis=0), mask=m_d)


class Grads(NamedTuple):
    """A gradient for each input; those that are not needed are None."""

    x: Tensor | None
    branch: Tensor | None
    gate: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def adaln_bwd(
    dy: Tensor | None,
    dx_new: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
    needs: Sequence[bool],
) -> Grads:
    """The gradients that `needs` asks for, in the order of Grads; `x` is what was normalised.

    With a branch `x` is x_new. `dy` is None where only x_new was used, `dx_new` where only y was.
    """
    inputs = Grads(x, branch, gate, shift, scale, weight, bias)
    needs = Grads(*(n and a is not None for n, a in zip(needs, inputs, strict=True)))
    if x.numel() == 0:
        return Grads(*(_zeros(a) if n else None for a, n in zip(inputs, needs, strict=True)))
    dy, dx_new, x, branch, gate, scale, weight, bias = (
        None if a is None else _launch.unit_last(a)
        for a in (dy, dx_new, x, branch, gate, scale, weight, bias)
    )
    T, D = x.shape[1:]
    g = _launch.groups(x, gate, shift, scale)
    grads = Grads(*(_empty(a) if n else None for a, n in zip(inputs, needs, strict=True)))
    row_grads, group_grads = (grads.gate, grads.shift, grads.scale), (None, None, None)
    if not g.per_token:
        row_grads, group_grads = group_grads, row_grads
    affine = None
    if needs.weight or needs.bias:
        affine = x.new_empty(g.count, 2, D, dtype=torch.float32)
    sum_norm = affine is not None or group_grads[1:] != (None, None)
    sum_gate = group_grads[0] is not None
    one_pass = D <= _launch.MAX_ONE_PASS_WIDTH
    tile = _launch.row_tile(D, g.L)
    chunk = _launch.backward_chunk(g.L, g.count, tile.BLOCK_R)
    num_chunks = triton.cdiv(g.L, chunk)
    partial = means = None
    if sum_gate and not one_pass and dy is not None:
        means = x.new_empty(*x.shape[:2], 2, dtype=torch.float32)
    if sum_norm or sum_gate:
        partial = x.new_empty(g.count * num_chunks, 3, D, dtype=torch.float32)
    with _launch.device_guard(x):
        adaln_bwd_kernel[(g.count * num_chunks,)](
            dy, dx_new, x, branch, gate, scale, weight, bias,
            mean, rstd, grads.x, grads.branch, *row_grads, partial, means,
            *_launch.strides(dy, dx_new, x, branch, gate, scale),
            T, g.S, g.L, D, chunk, num_chunks, 1.0 / D,
            rms, g.per_token, sum_norm and one_pass, sum_gate and one_pass,
            tile.BLOCK_R, tile.BLOCK_D,
            num_warps=tile.num_warps, enable_fp_fusion=D > 1,
        )  # fmt: skip
        if partial is not None and not one_pass:
            _group_grads.column_sums(
                dy, dx_new, x, scale, weight, mean, rstd, means,
                branch if sum_gate else None, partial, g, chunk, rms, sum_norm,
            )  # fmt: skip
        if partial is not None:
            _group_grads.group_grads(
                partial, None if g.per_token else scale, weight, bias, *group_grads, affine, g
            )
    if affine is None:
        return grads
    return grads._replace(**_affine_grads(affine, weight, bias, needs))


def _affine_grads(
    affine: Tensor, weight: Tensor | None, bias: Tensor | None, needs: Grads
) -> dict[str, Tensor | None]:
    """dweight and dbias from their sums over each group, float32 [groups, 2, D]."""
    dweight, dbias = affine.sum(0) if affine.shape[0] > 1 else affine[0]
    return {
        "weight": dweight.to(weight.dtype, copy=True) if needs.weight else None,
        "bias": dbias.to(bias.dtype, copy=True) if needs.bias else None,
    }


def _empty(a: Tensor) -> Tensor:
    return torch.empty(a.shape, dtype=a.dtype, device=a.device)


def _zeros(a: Tensor) -> Tensor:
    return torch.zeros(a.shape, dtype=a.dtype, device=a.device)
