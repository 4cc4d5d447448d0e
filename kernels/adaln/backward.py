"""Backward of adaln, residual_adaln and gated_residual: one pass over the rows, no atomics.

With xhat = (x - mean) rstd, a = dy (1 + scale) weight and the mean over D:

    dh      = rstd (a - mean(a) - xhat mean(a xhat)) + dx_new        (rms: without mean(a))
    dx      = dh                       dbranch = gate dh
    A       = sum dy xhat              dscale  = weight A + bias B
    B       = sum dy                   dshift  = B
    dweight = sum (1 + scale) A        dbias   = sum (1 + scale) B
    dgate   = sum dh branch

A, B and dgate are sums over the rows that share a modulation. A program keeps them in registers
for one chunk of rows of one group and writes them once; group_grads.py adds the chunks in a fixed
order. Above MAX_ONE_PASS_WIDTH they do not fit beside the row: a second kernel, tiled over D, reads
the rows again, and the two means of each row, so that dh need not be read back after rounding.
"""

from collections.abc import Sequence
from typing import NamedTuple

# ruff: noqa: RUF005  (Triton has no unpacking in tuples)
import torch
import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels._common import launches
from dblocks.kernels.adaln.group_grads import column_sums, group_grads
from dblocks.kernels.adaln.rows import (
    load_channels,
    load_group,
    load_parts,
    load_raw,
    offset_of,
    plus,
    plus_one,
    plus_product,
    rows_of,
    standardised,
    store_parts,
    sum_both,
    times,
    token_of,
    widen,
    zeros,
)


@triton.jit
def fetch(
    dy_ptr, x_ptr, dx_new_ptr, branch_ptr, mean_ptr, rstd_ptr,
    dy_sn, dy_st, x_sn, x_st, dx_new_sn, dx_new_st, branch_sn, branch_st,
    i_g, first, end, T, S, L, o_d, D,
    RMS: tl.constexpr, PER_TOKEN: tl.constexpr, STEP: tl.constexpr, BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """All that is read of the tile that begins at row `first` of group `i_g`, as it is stored."""
    o_l, m_l = rows_of(first, end, BLOCK_R)
    i_n, i_t = token_of(i_g, o_l, T, S, L, PER_TOKEN)
    row = tl.cast(i_g, tl.int64) * L + o_l
    o_dy = offset_of(i_n, i_t, dy_sn, dy_st, STEP)
    o_dx_new = offset_of(i_n, i_t, dx_new_sn, dx_new_st, STEP)
    o_branch = offset_of(i_n, i_t, branch_sn, branch_st, STEP)
    r_x, b_rstd = zeros(PARTS, 1, 1), tl.full([BLOCK_R], 0, tl.float32)
    b_mean = b_rstd
    if dy_ptr is not None:
        r_x = load_raw(x_ptr, offset_of(i_n, i_t, x_sn, x_st, STEP), m_l, o_d, D, PARTS, FULL)
        b_rstd = tl.load(rstd_ptr + row, mask=m_l, other=0.0)
        if not RMS:
            b_mean = tl.load(mean_ptr + row, mask=m_l, other=0.0)
    return (
        load_raw(dy_ptr, o_dy, m_l, o_d, D, PARTS, FULL),
        r_x,
        load_raw(dx_new_ptr, o_dx_new, m_l, o_d, D, PARTS, FULL),
        load_raw(branch_ptr, o_branch, m_l, o_d, D, PARTS, FULL),
        b_mean,
        b_rstd,
    )


@triton.jit
def dscale_of(dy, xhat, weight, bias):
    parts = ()
    for k in tl.static_range(len(dy)):
        parts = parts + (dy[k] * (xhat[k] * weight[k] + bias[k]),)
    return parts


@triton.jit
def means_of(a, xhat, inv_D, RMS: tl.constexpr):
    """The means of a and of a xhat over each row [BLOCK_R]; rms needs the second only."""
    b_along = a[0] * xhat[0]
    b_a = a[0]
    for k in tl.static_range(1, len(a)):
        b_along += a[k] * xhat[k]
        b_a += a[k]
    if RMS:
        b_along = tl.sum(b_along, axis=1) * inv_D
        return b_along, b_along
    else:
        b_a, b_along = sum_both(b_a, b_along)
        return b_a * inv_D, b_along * inv_D


@triton.jit
def through_norm(a, xhat, b_a, b_along, b_rstd, RMS: tl.constexpr):
    """rstd (a - mean(a) - xhat mean(a xhat))."""
    parts = ()
    for k in tl.static_range(len(a)):
        b_dh = a[k] - xhat[k] * b_along[:, None]
        if not RMS:
            b_dh -= b_a[:, None]
        parts = parts + (b_dh * b_rstd[:, None],)
    return parts


@triton.jit
def store_sums(ptr, o_d, D, FULL: tl.constexpr, parts):
    """Adds the rows of a tile and stores the sums [D]."""
    sums = ()
    for k in tl.static_range(len(parts)):
        sums = sums + (tl.sum(parts[k], axis=0)[None, :],)
    store_parts(ptr, tl.full([1], 0, tl.int64), tl.full([1], True, tl.int1), o_d, D, FULL, sums)


_INTEGERS = (
    "dy_sn", "dy_st", "dx_new_sn", "dx_new_st", "x_sn", "x_st", "branch_sn", "branch_st",
    "gate_sn", "gate_ss", "scale_sn", "scale_ss", "T", "S", "L", "D", "chunk", "num_chunks",
)  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def adaln_bwd_kernel(
    dy_ptr, dx_new_ptr, x_ptr, branch_ptr, gate_ptr, scale_ptr, weight_ptr, bias_ptr,
    mean_ptr, rstd_ptr, dx_ptr, dbranch_ptr, dgate_ptr, dshift_ptr, dscale_ptr, partial_ptr,
    means_ptr,
    dy_sn, dy_st, dx_new_sn, dx_new_st, x_sn, x_st, branch_sn, branch_st,
    gate_sn, gate_ss, scale_sn, scale_ss,
    T, S, L, D, chunk, num_chunks, inv_D,
    RMS: tl.constexpr, PER_TOKEN: tl.constexpr, SUM_NORM: tl.constexpr, SUM_GATE: tl.constexpr,
    STEP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    FULL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    i_g = tl.program_id(0) // num_chunks
    start = (tl.program_id(0) - i_g * num_chunks) * chunk
    end = min(start + chunk, L)
    D = D * STEP
    W: tl.constexpr = BLOCK_D // PARTS
    o_d = tl.arange(0, W)
    b_weight = load_channels(weight_ptr, o_d, D, PARTS, FULL, 1.0)
    if PER_TOKEN:
        b_bias = load_channels(bias_ptr, o_d, D, PARTS, FULL, 0.0)
    else:
        b_gate = load_group(gate_ptr, i_g, S, gate_sn, gate_ss, o_d, D, STEP, PARTS, FULL, 1.0)
        b_scale = load_group(scale_ptr, i_g, S, scale_sn, scale_ss, o_d, D, STEP, PARTS, FULL, 0.0)
        b_factor = times(plus_one(b_scale), b_weight)
    if SUM_NORM:
        b_A = zeros(PARTS, BLOCK_R, W)
        b_B = zeros(PARTS, BLOCK_R, W)
    if SUM_GATE:
        b_dgate = zeros(PARTS, BLOCK_R, W)
    if AHEAD:
        r_dy, r_x, r_dx_new, r_branch, n_mean, n_rstd = fetch(
            dy_ptr, x_ptr, dx_new_ptr, branch_ptr, mean_ptr, rstd_ptr,
            dy_sn, dy_st, x_sn, x_st, dx_new_sn, dx_new_st, branch_sn, branch_st,
            i_g, start, end, T, S, L, o_d, D, RMS, PER_TOKEN, STEP, BLOCK_R, PARTS, FULL,
        )  # fmt: skip
    for first in range(start, end, BLOCK_R):
        if AHEAD:
            b_dy, b_x, b_dx_new, b_branch = r_dy, r_x, r_dx_new, r_branch
            b_mean, b_rstd = n_mean, n_rstd
        # Ahead, these are the rows of the next tile: asked for before this one's sums.
        r_dy, r_x, r_dx_new, r_branch, n_mean, n_rstd = fetch(
            dy_ptr, x_ptr, dx_new_ptr, branch_ptr, mean_ptr, rstd_ptr,
            dy_sn, dy_st, x_sn, x_st, dx_new_sn, dx_new_st, branch_sn, branch_st,
            i_g, first + BLOCK_R if AHEAD else first, end, T, S, L, o_d, D,
            RMS, PER_TOKEN, STEP, BLOCK_R, PARTS, FULL,
        )  # fmt: skip
        if not AHEAD:
            b_dy, b_x, b_dx_new, b_branch = r_dy, r_x, r_dx_new, r_branch
            b_mean, b_rstd = n_mean, n_rstd
        o_l, m_l = rows_of(first, end, BLOCK_R)
        i_n, i_t = token_of(i_g, o_l, T, S, L, PER_TOKEN)
        row = tl.cast(i_g, tl.int64) * L + o_l
        if PER_TOKEN:
            o_gate = offset_of(i_n, i_t, gate_sn, gate_ss, STEP)
            o_scale = offset_of(i_n, i_t, scale_sn, scale_ss, STEP)
            b_gate = load_parts(gate_ptr, o_gate, m_l, o_d, D, PARTS, FULL, 1.0)
            b_scale = load_parts(scale_ptr, o_scale, m_l, o_d, D, PARTS, FULL, 0.0)
            b_factor = times(plus_one(b_scale), b_weight)
        b_dh = widen(b_dx_new)
        if dy_ptr is not None:
            b_dy = widen(b_dy)
            b_xhat = standardised(widen(b_x), b_mean, b_rstd, RMS)
            b_a = times(b_dy, b_factor)
            b_mean_a, b_along = means_of(b_a, b_xhat, inv_D, RMS)
            if means_ptr is not None:
                tl.store(means_ptr + 2 * row, b_mean_a, mask=m_l)
                tl.store(means_ptr + 2 * row + 1, b_along, mask=m_l)
            b_dh = plus(through_norm(b_a, b_xhat, b_mean_a, b_along, b_rstd, RMS), b_dh)
            if PER_TOKEN:
                if dshift_ptr is not None:
                    store_parts(dshift_ptr, row * D, m_l, o_d, D, FULL, b_dy)
                if dscale_ptr is not None:
                    b_dscale = dscale_of(b_dy, b_xhat, b_weight, b_bias)
                    store_parts(dscale_ptr, row * D, m_l, o_d, D, FULL, b_dscale)
                b_dy = times(b_dy, plus_one(b_scale))
            if SUM_NORM:
                b_A = plus_product(b_A, b_dy, b_xhat)
                b_B = plus(b_B, b_dy)
        if dx_ptr is not None:
            store_parts(dx_ptr, row * D, m_l, o_d, D, FULL, b_dh)
        if dbranch_ptr is not None:
            store_parts(dbranch_ptr, row * D, m_l, o_d, D, FULL, times(b_dh, b_gate))
        if dgate_ptr is not None:
            store_parts(dgate_ptr, row * D, m_l, o_d, D, FULL, times(b_dh, widen(b_branch)))
        if SUM_GATE:
            b_dgate = plus_product(b_dgate, b_dh, widen(b_branch))
    o_p = tl.cast(tl.program_id(0), tl.int64) * 3 * D
    if SUM_NORM:
        store_sums(partial_ptr + o_p, o_d, D, FULL, b_A)
        store_sums(partial_ptr + o_p + D, o_d, D, FULL, b_B)
    if SUM_GATE:
        store_sums(partial_ptr + o_p + 2 * D, o_d, D, FULL, b_dgate)


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
    dy: Tensor | None, dx_new: Tensor | None, x: Tensor, branch: Tensor | None,
    gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, mean: Tensor | None, rstd: Tensor | None, rms: bool,
    needs: Sequence[bool],
) -> launches.Plan:  # fmt: skip
    """The gradients that `needs` asks for, in the order of Grads; `x` is what was normalised.

    With a branch `x` is x_new. `dy` is None where only x_new was used, `dx_new` where only y was.
    """
    inputs = (x, branch, gate, shift, scale, weight, bias)
    needed = Grads(*[n and a is not None for n, a in zip(needs, inputs, strict=True)])
    if x.numel() == 0:
        return [], lambda *args: Grads(
            *[_zeros(a) if n else None for a, n in zip(args[2:9], needed, strict=True)]
        )
    plan = _plan(dy, dx_new, x, branch, gate, shift, scale, rms, needed)
    rows, columns, finish = plan.rows, plan.columns, plan.finish

    def run(dy, dx_new, x, branch, gate, shift, scale, weight, bias, mean, rstd, rms, needs):
        inputs = (x, branch, gate, shift, scale, weight, bias)
        grads = Grads(*[_empty(a) if n else None for a, n in zip(inputs, needed, strict=True)])
        in_rows, in_groups = grads[2:5], _NONE
        if not plan.per_token:
            in_rows, in_groups = in_groups, in_rows
        partial, means, affine = [
            None if size is None else x.new_empty(size, dtype=torch.float32) for size in plan.sizes
        ]
        rows.start(
            dy, dx_new, x, branch if plan.reads_branch else None, gate, scale, weight, bias,
            mean, rstd, grads.x, grads.branch, *in_rows, partial, means, *rows.numbers,
        )  # fmt: skip
        if columns is not None:
            summed = branch if in_groups[0] is not None else None
            columns.start(
                dy, dx_new, x, scale, weight, mean, rstd, means, summed, partial, *columns.numbers
            )
        if finish is not None:
            shared = None if plan.per_token else scale
            finish.start(partial, shared, weight, bias, *in_groups, affine, *finish.numbers)
        if affine is None:
            return grads
        return grads._replace(**_affine_grads(affine, weight, bias, needed))

    return launches.copies(dy, dx_new, *inputs, mean, rstd), run


_NONE = (None, None, None)


class _Plan(NamedTuple):
    """All of a backward that its tensors' layouts decide."""

    per_token: bool
    reads_branch: bool  # in the kernel over rows
    sizes: tuple[tuple[int, ...] | None, ...]  # of partial, means and affine
    rows: launches.Launch
    columns: launches.Launch | None  # of wide rows
    finish: launches.Launch | None


def _plan(
    dy: Tensor | None, dx_new: Tensor | None, x: Tensor, branch: Tensor | None,
    gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, rms: bool, needs: Grads,
) -> _Plan:  # fmt: skip
    (N, T, D), g = x.shape, launches.groups(x, gate, shift, scale)
    affine = needs.weight or needs.bias
    sum_norm = affine or (not g.per_token and (needs.shift or needs.scale))
    sum_gate = not g.per_token and needs.gate
    one_pass = D <= launches.MAX_ONE_PASS_WIDTH
    tile = launches.row_tile(D, g.L, launches.BACKWARD_PARTS)
    chunk = launches.backward_chunk(g.L, g.count, tile.BLOCK_R)
    num_chunks = triton.cdiv(g.L, chunk)
    reads_branch = needs.gate and (g.per_token or one_pass)
    # A thread has 255 registers, of 16 warps 128: too few for the next tile beside three parts with
    # their sums, or beside four parts of a row of 16,384.
    room = {4: 2, 8: 3, 16: 0} if reads_branch else {4: 3, 8: 3, 16: 2}
    ahead = room[tile.num_warps] >= tile.PARTS
    ahead &= min(chunk, g.L) > tile.BLOCK_R
    strides = launches.strides(dy, dx_new, x, branch, gate, scale)
    step = launches.common_step(D, *strides)
    numbers = (
        *(s // step for s in strides),
        T, g.S, g.L, D // step, chunk, num_chunks, 1.0 / D,
        rms, g.per_token, sum_norm and one_pass, sum_gate and one_pass,
        step, *tile[:3], tile.BLOCK_D == D, ahead,
    )  # fmt: skip
    rows = launches.Launch(
        adaln_bwd_kernel, g.count * num_chunks, numbers,
        num_warps=tile.num_warps, enable_fp_fusion=D > 1,
    )  # fmt: skip
    sizes, columns, finish = [None, None, None], None, None
    if sum_norm or sum_gate:
        sizes[0] = (g.count * num_chunks, 3, D)
        shared = None if g.per_token else scale
        wanted = [not g.per_token and n for n in needs[2:5]]
        finish = group_grads(D, num_chunks, shared, *wanted, affine, g)
        if not one_pass:
            sums = (branch if sum_gate else None, chunk, rms, sum_norm)
            columns = column_sums(dy, dx_new, x, scale, *sums, g)
    if sum_gate and not one_pass and dy is not None:
        sizes[1] = (N, T, 2)
    if affine:
        sizes[2] = (g.count, 2, D)
    return _Plan(g.per_token, reads_branch, tuple(sizes), rows, columns, finish)


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
    return torch.empty_like(a, memory_format=torch.contiguous_format)


def _zeros(a: Tensor) -> Tensor:
    return torch.zeros(a.shape, dtype=a.dtype, device=a.device)
