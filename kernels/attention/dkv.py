"""Second pass of the backward of doubled_attention: dk and dv.

A program owns one tile of keys of one half and walks all queries that see one of them, of every
head of the group, so that it writes its rows once: one launch for the clean keys, one for the noisy
ones. At a block size of 1 a noisy key has one query, and its pass needs no matrix product.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels._common import launches
from dblocks.kernels.attention import layout
from dblocks.kernels.attention.segments import segment, tiles_of
from dblocks.kernels.attention.tile import (
    LOG2E,
    load_rows,
    product,
    query_rows,
    query_spans,
    rounded,
    scored,
    seen_by,
    store_rows,
    through_cap,
)

SELF_ELEMENTS = 2048  # of a tile in the pass without matrix products: 16 a thread, of six tensors


@triton.jit
def key_grads(
    b_dk, b_dv, b_k, b_v, do_ptr, q_ptr, lse_ptr, delta_ptr, do_st, q_st, begin, end,
    o_p, o_r, m_noisy, o_k, low, L, block, scale, window, softcap, slope,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, NOISY: tl.constexpr, TOKEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds to dk / scale [K, D] and dv [K, DV] what queries at begin .. end - 1 contribute.

    NOISY, the keys [K, 1] are, in blocks from `low`; not MASKED, each query sees each key.
    """
    for start in range(begin, end, ROWS):
        o_t = start + o_p
        m_t = o_t < L
        b_q = load_rows(q_ptr, start, o_r, m_t, q_st, D, BLOCK_D)
        b_x = product(b_k, tl.trans(b_q), None) * scale
        b_s = scored(b_x, o_k, o_t[None, :], softcap, slope)
        if MASKED:
            m = seen_by(o_k, low, o_t[None, :], m_noisy[None, :], block, window, NOISY, TOKEN)
            b_s = tl.where(m, b_s, float("-inf"))
        # exp2(s - inf) = 0 for queries past the last.
        b_lse = tl.load(lse_ptr + start + o_r, mask=m_t, other=float("inf")) * LOG2E
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_do = load_rows(do_ptr, start, o_r, m_t, do_st, DV, BLOCK_DV)
        b_dv = product(rounded(b_p, b_do.dtype), b_do, b_dv)
        b_dp = product(b_v, tl.trans(b_do), None)
        b_delta = tl.load(delta_ptr + start + o_r, mask=m_t, other=0.0)
        b_ds = through_cap(b_p * (b_dp - b_delta[None, :]), b_x, softcap)
        b_dk = product(rounded(b_ds, b_q.dtype), b_q, b_dk)
    return b_dk, b_dv


@triton.jit(
    do_not_specialize=["clean", "noisy", "T", "rows", "heads", "window"],
    do_not_specialize_on_alignment=["lse_ptr", "delta_ptr"],
)
def doubled_attention_bwd_dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, table_ptr, valid_ptr, slopes_ptr,
    dk_ptr, dv_ptr, scale, softcap,
    do_sn, do_sh, do_st, q_sn, q_sh, q_st, k_sn, k_sh, k_st, v_sn, v_sh, v_st, slopes_sn,
    clean, noisy, T, rows, Hkv, group, block, heads, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr, NOISY: tl.constexpr, TOKEN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK_M // 2 if PACKED else BLOCK_M
    i_nh = tl.program_id(0) % heads
    i_n, i_h = tl.cast(i_nh // Hkv, tl.int64), tl.cast(i_nh % Hkv, tl.int64)
    i_tile = tl.program_id(0) // heads
    first, L, key = segment(i_tile, i_n, table_ptr, valid_ptr, T, BLOCK_K)
    if table_ptr is not None or valid_ptr is not None:  # noqa: SIM102 (known to the compiler)
        if key >= L:
            return
    row = tl.cast(first, tl.int64)
    do_ptr += i_n * do_sn + i_h * group * do_sh + row * do_st
    q_ptr += i_n * q_sn + i_h * group * q_sh + row * q_st
    lse_ptr += tl.cast(i_nh, tl.int64) * group * rows + row
    delta_ptr += tl.cast(i_nh, tl.int64) * group * rows + row
    if slopes_ptr is not None:
        slopes_ptr += i_n * slopes_sn + i_h * group
    scale = tl.cast(scale, tl.float32)
    cap = None if softcap is None else softcap * LOG2E
    # The queries are the noisy half alone where not PACKED; pointers start there.
    o_p, o_r, m_noisy = query_rows(clean, noisy if PACKED else 0, BLOCK_M, PACKED)
    o_k = key + tl.arange(0, BLOCK_K)
    m_k = o_k < L
    low = o_k // block * block
    k_ptr += i_n * k_sn + i_h * k_sh + row * k_st
    v_ptr += i_n * v_sn + i_h * v_sh + row * v_st
    b_k = load_rows(k_ptr, 0, o_k, m_k, k_st, D, BLOCK_D)
    b_v = load_rows(v_ptr, 0, o_k, m_k, v_st, DV, BLOCK_DV)
    low = low[:, None]
    begin, full, end = query_spans(key, L, block, window, ROWS, BLOCK_K, PACKED, NOISY, TOKEN)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_DV], tl.float32)
    # WHOLE, tiles that see every key have a loop without a mask. With several heads it would spill.
    masked_end = tl.minimum(full, end) if WHOLE else end
    for i in range(group):
        slope = None if slopes_ptr is None else tl.load(slopes_ptr + i) * LOG2E
        b_dk, b_dv = key_grads(
            b_dk, b_dv, b_k, b_v, do_ptr, q_ptr, lse_ptr, delta_ptr, do_st, q_st,
            begin, masked_end, o_p, o_r, m_noisy, o_k[:, None], low, L, block, scale * LOG2E,
            window, cap, slope, D, BLOCK_D, DV, BLOCK_DV, ROWS, NOISY, TOKEN, True,
        )  # fmt: skip
        if WHOLE:
            b_dk, b_dv = key_grads(
                b_dk, b_dv, b_k, b_v, do_ptr, q_ptr, lse_ptr, delta_ptr, do_st, q_st,
                full, end, o_p, o_r, m_noisy, o_k[:, None], low, L, block, scale * LOG2E,
                window, cap, slope, D, BLOCK_D, DV, BLOCK_DV, ROWS, NOISY, TOKEN, False,
            )  # fmt: skip
        do_ptr += do_sh
        q_ptr += q_sh
        lse_ptr += rows
        delta_ptr += rows
    dk_ptr += (i_n * 2 * T + row) * Hkv * D + i_h * D
    dv_ptr += (i_n * 2 * T + row) * Hkv * DV + i_h * DV
    store_rows(dk_ptr, 0, o_k, m_k, Hkv * D, b_dk * scale, D, BLOCK_D)
    store_rows(dv_ptr, 0, o_k, m_k, Hkv * DV, b_dv, DV, BLOCK_DV)


@triton.jit(
    do_not_specialize=["T", "rows", "heads"],
    do_not_specialize_on_alignment=["lse_ptr", "delta_ptr"],
)
def doubled_attention_bwd_self_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, valid_ptr, dk_ptr, dv_ptr,
    scale, softcap,
    do_sn, do_sh, do_st, q_sn, q_sh, q_st, k_sn, k_sh, k_st, v_sn, v_sh, v_st,
    T, rows, Hkv, group, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) // heads * BLOCK_R
    i_nh = tl.program_id(0) % heads
    i_n, i_h = tl.cast(i_nh // Hkv, tl.int64), tl.cast(i_nh % Hkv, tl.int64)
    do_ptr += i_n * do_sn + i_h * group * do_sh
    q_ptr += i_n * q_sn + i_h * group * q_sh
    lse_ptr += tl.cast(i_nh, tl.int64) * group * rows
    delta_ptr += tl.cast(i_nh, tl.int64) * group * rows
    scale = tl.cast(scale, tl.float32)
    cap = None if softcap is None else softcap * LOG2E
    o_r = tl.arange(0, BLOCK_R)
    m_t = start + o_r < T
    if valid_ptr is not None:
        m_t &= start + o_r >= tl.load(valid_ptr + i_n * 2)
        m_t &= start + o_r < tl.load(valid_ptr + i_n * 2 + 1)
    k_ptr += i_n * k_sn + i_h * k_sh
    v_ptr += i_n * v_sn + i_h * v_sh
    b_k = load_rows(k_ptr, start, o_r, m_t, k_st, D, BLOCK_D).to(tl.float32)
    b_v = load_rows(v_ptr, start, o_r, m_t, v_st, DV, BLOCK_DV).to(tl.float32)
    b_dk = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    for _ in range(group):
        b_q = load_rows(q_ptr, start, o_r, m_t, q_st, D, BLOCK_D).to(tl.float32)
        b_do = load_rows(do_ptr, start, o_r, m_t, do_st, DV, BLOCK_DV).to(tl.float32)
        b_lse = tl.load(lse_ptr + start + o_r, mask=m_t, other=float("inf")) * LOG2E
        b_delta = tl.load(delta_ptr + start + o_r, mask=m_t, other=0.0)
        b_x = tl.sum(b_q * b_k, axis=1) * (scale * LOG2E)
        b_p = tl.exp2(scored(b_x, o_r, o_r, cap, None) - b_lse)  # no distance, no slope
        b_ds = through_cap(b_p * (tl.sum(b_do * b_v, axis=1) - b_delta), b_x, cap)
        b_dk += b_ds[:, None] * b_q
        b_dv += b_p[:, None] * b_do
        do_ptr += do_sh
        q_ptr += q_sh
        lse_ptr += rows
        delta_ptr += rows
    dk_ptr += i_n * 2 * T * Hkv * D + i_h * D
    dv_ptr += i_n * 2 * T * Hkv * DV + i_h * DV
    store_rows(dk_ptr, start, o_r, m_t, Hkv * D, b_dk * scale, D, BLOCK_D)
    store_rows(dv_ptr, start, o_r, m_t, Hkv * DV, b_dv, DV, BLOCK_DV)


class KeyValueGrads(NamedTuple):
    """Launches that write dk and dv, of the clean and of the noisy half of the keys.

    Their arguments are do, q, k, v, lse, delta, the table of documents, valid, slopes, dk, dv,
    scale and softcap, without table and slopes where a noisy key has one query. For noisy keys do,
    q, lse and delta are of the noisy rows alone.
    """

    clean: launches.Launch
    noisy: launches.Launch
    alone: bool  # whether a noisy key has one query
    tiles: int
    segments: launches.Launch | None  # the table


def key_value_grads(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, options: layout.Options, tile: layout.Tiles
) -> KeyValueGrads:
    N, H, rows, D = q.shape
    Hkv, T, DV = k.shape[1], k.shape[2] // 2, v.shape[3]
    count, segments = tiles_of(T, tile.BLOCK_K, options)
    strides = layout.strides(do, q, k, v)
    sizes = (T, rows, Hkv, H // Hkv)
    widths = layout.widths(D, DV)
    packed, alone, token = layout.forms(options)
    window = layout.window_of(T, options)
    whole = window is None and H // Hkv == 1

    def launch(PACKED: bool, NOISY: bool) -> launches.Launch:
        numbers = (
            *strides, layout.slopes_stride(options), *layout.halves(T, options), *sizes,
            options.block_size, N * Hkv, window, *widths,
            tile.BLOCK_M, tile.BLOCK_K, PACKED, NOISY, token, whole and not NOISY,
        )  # fmt: skip
        return launches.Launch(
            doubled_attention_bwd_dkv_kernel, count * N * Hkv, numbers,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    clean, rest = launch(packed, False), (alone, count, segments)
    if not alone:
        return KeyValueGrads(clean, launch(False, True), *rest)
    BLOCK_R = max(SELF_ELEMENTS // max(widths[1], widths[3]), 1)
    programs = triton.cdiv(T, BLOCK_R) * N * Hkv
    numbers = (*strides, *sizes, N * Hkv, *widths, BLOCK_R)
    noisy = launches.Launch(doubled_attention_bwd_self_kernel, programs, numbers, num_warps=4)
    return KeyValueGrads(clean, noisy, *rest)
