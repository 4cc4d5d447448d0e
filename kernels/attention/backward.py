"""Backward of doubled_attention in two passes over the scores, without atomics.

The first pass, here, owns tiles of queries as the forward does, and writes dq and
delta = rowsum(do * o). The second, in dkv.py, owns tiles of keys.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels._common import launches
from dblocks.kernels.attention import layout
from dblocks.kernels.attention.dkv import KeyValueGrads, key_value_grads
from dblocks.kernels.attention.segments import segment, tiles_of
from dblocks.kernels.attention.tile import (
    LOG2E,
    clean_end,
    key_spans,
    load_rows,
    noisy_span,
    product,
    query_rows,
    rounded,
    scored,
    store_rows,
    through_cap,
    visible,
    zeros,
)


@triton.jit
def query_grads(
    b_dq, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, k_st, v_st, begin, end, o_t, b_first, b_end,
    scale, window, softcap, slope,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds to dq / scale [M, D] what keys begin .. end - 1 contribute.

    MASKED, a row [M, 1] sees keys b_first <= key < b_end of its window only.
    """
    o_k = tl.arange(0, BLOCK_K)
    for start in range(begin, end, BLOCK_K):
        m_k = (start + o_k < end) if MASKED else None
        b_k = load_rows(k_ptr, start, o_k, m_k, k_st, D, BLOCK_D)
        b_x = product(b_q, tl.trans(b_k), None) * scale
        b_s = scored(b_x, (start + o_k)[None, :], o_t, softcap, slope)
        if MASKED:
            m = visible((start + o_k)[None, :], o_t, b_first, b_end, window)
            b_s = tl.where(m, b_s, float("-inf"))
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_v = load_rows(v_ptr, start, o_k, m_k, v_st, DV, BLOCK_DV)
        b_dp = product(b_do, tl.trans(b_v), None)
        b_ds = through_cap(b_p * (b_dp - b_delta[:, None]), b_x, softcap)
        b_dq = product(rounded(b_ds, b_k.dtype), b_k, b_dq)
    return b_dq


@triton.jit(do_not_specialize=["clean", "noisy", "T", "rows", "tiles", "heads", "window"])
def doubled_attention_bwd_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, table_ptr, valid_ptr, slopes_ptr,
    dq_ptr, delta_ptr, scale, softcap,
    do_sn, do_sh, do_st, q_sn, q_sh, q_st, k_sn, k_sh, k_st, v_sn, v_sh, v_st, o_sn, o_sh, o_st,
    slopes_sn, clean, noisy, T, rows, H, group, block, heads, tiles, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr, SELF: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK_M // 2 if PACKED else BLOCK_M
    i_tile = tiles - 1 - tl.program_id(0) // heads
    i_nh = tl.program_id(0) % heads
    i_n, i_h = tl.cast(i_nh // H, tl.int64), tl.cast(i_nh % H, tl.int64)
    first, L, start = segment(i_tile, i_n, table_ptr, valid_ptr, T, ROWS)
    if table_ptr is not None or valid_ptr is not None:  # noqa: SIM102 (known to the compiler)
        if start >= L:
            return
    row = tl.cast(first, tl.int64)
    o_p, o_r, m_noisy = query_rows(clean, noisy if PACKED else 0, BLOCK_M, PACKED)
    o_t = start + o_p
    m_t = o_t < L
    do_ptr += i_n * do_sn + i_h * do_sh + row * do_st
    o_ptr += i_n * o_sn + i_h * o_sh + row * o_st
    lse_ptr += tl.cast(i_nh, tl.int64) * rows + row + start
    delta_ptr += tl.cast(i_nh, tl.int64) * rows + row + start
    b_do = load_rows(do_ptr, start, o_r, m_t, do_st, DV, BLOCK_DV)
    b_o = load_rows(o_ptr, start, o_r, m_t, o_st, DV, BLOCK_DV)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), axis=1)
    tl.store(delta_ptr + o_r, b_delta, mask=m_t)
    if dq_ptr is not None:
        q_ptr += i_n * q_sn + i_h * q_sh + row * q_st
        k_ptr += i_n * k_sn + i_h // group * k_sh + row * k_st
        v_ptr += i_n * v_sn + i_h // group * v_sh + row * v_st
        clean_k_ptr = k_ptr + tl.cast(clean, tl.int64) * k_st
        clean_v_ptr = v_ptr + tl.cast(clean, tl.int64) * v_st
        noisy_k_ptr = k_ptr + tl.cast(noisy, tl.int64) * k_st
        noisy_v_ptr = v_ptr + tl.cast(noisy, tl.int64) * v_st
        scale = tl.cast(scale, tl.float32)
        scale_log2 = scale * LOG2E
        cap = None if softcap is None else softcap * LOG2E
        slope = None if slopes_ptr is None else tl.load(slopes_ptr + i_n * slopes_sn + i_h) * LOG2E
        b_q = load_rows(q_ptr, start, o_r, m_t, q_st, D, BLOCK_D)
        # exp2(s - inf) = 0 for rows past the last.
        b_lse = tl.load(lse_ptr + o_r, mask=m_t, other=float("inf")) * LOG2E
        begin, full, full_end, end, noisy_begin, noisy_end = key_spans(
            start, L, block, window, ROWS, BLOCK_K, PACKED, TOKEN
        )
        if SELF:
            m_self = m_t & m_noisy
            b_k = load_rows(noisy_k_ptr, start, o_p, m_self, k_st, D, BLOCK_D).to(tl.float32)
            b_v = load_rows(noisy_v_ptr, start, o_p, m_self, v_st, DV, BLOCK_DV).to(tl.float32)
            b_x = tl.sum(b_q.to(tl.float32) * b_k, axis=1) * scale_log2
            b_s = tl.where(m_self, scored(b_x, o_t, o_t, cap, slope), float("-inf"))
            b_dp = tl.sum(b_do.to(tl.float32) * b_v, axis=1)
            b_ds = through_cap(tl.exp2(b_s - b_lse) * (b_dp - b_delta), b_x, cap)
            b_dq = b_ds[:, None] * b_k
        else:
            b_dq = zeros(BLOCK_M, BLOCK_D, T)
        b_end = clean_end(o_t, m_noisy, L, block, TOKEN)[:, None]
        b_t = o_t[:, None]
        if window is not None:
            b_dq = query_grads(
                b_dq, b_q, b_do, b_lse, b_delta, clean_k_ptr, clean_v_ptr, k_st, v_st,
                begin, tl.minimum(full, end), b_t, None, b_end, scale_log2, window, cap, slope,
                D, BLOCK_D, DV, BLOCK_DV, BLOCK_K, True,
            )  # fmt: skip
        b_dq = query_grads(
            b_dq, b_q, b_do, b_lse, b_delta, clean_k_ptr, clean_v_ptr, k_st, v_st,
            full, full_end, b_t, None, b_end, scale_log2, window, cap, slope,
            D, BLOCK_D, DV, BLOCK_DV, BLOCK_K, False,
        )  # fmt: skip
        b_dq = query_grads(
            b_dq, b_q, b_do, b_lse, b_delta, clean_k_ptr, clean_v_ptr, k_st, v_st,
            full_end, end, b_t, None, b_end, scale_log2, window, cap, slope,
            D, BLOCK_D, DV, BLOCK_DV, BLOCK_K, True,
        )  # fmt: skip
        if not SELF:
            b_first, b_end = noisy_span(o_t, m_noisy, L, block)
            b_dq = query_grads(
                b_dq, b_q, b_do, b_lse, b_delta, noisy_k_ptr, noisy_v_ptr, k_st, v_st,
                noisy_begin, noisy_end, b_t, b_first[:, None], b_end[:, None], scale_log2, window,
                cap, slope, D, BLOCK_D, DV, BLOCK_DV, BLOCK_K, True,
            )  # fmt: skip
        dq_ptr += (i_n * rows + row) * H * D + i_h * D
        store_rows(dq_ptr, start, o_r, m_t, H * D, b_dq * scale, D, BLOCK_D)


def doubled_attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options_and_needs: Any,
    tiles: layout.Settings | None = None,
) -> launches.Plan:  # fmt: skip
    """dq, and dk and dv.

    After the options come the needs: whether dq is asked for, and whether the other two are.
    Their layout is [N, rows, heads, width]. `tiles` other than those of the table are for tests and
    `make kernels-check`.
    """
    *given, needs = options_and_needs
    planned = None
    if q.numel():
        planned = _launches(do, q, k, v, o, layout.Options(*given), needs[1], tiles)
    T = k.shape[2] // 2
    clean, noisy = (slice(start, start + T) for start in layout.halves(T, layout.Options(*given)))

    def run(do, q, k, v, o, lse, *options_and_needs):
        *given, needs = options_and_needs
        options = layout.Options(*given)
        empty = options.valid is None
        dq = _new(q, empty) if needs[0] else None
        dk, dv = (_new(k, empty), _new(v, empty)) if needs[1] else (None, None)
        if planned is None:
            return dq, dk, dv
        delta = torch.empty_like(lse)
        extras, numbers = (options.valid, options.alibi_slopes), (options.scale, options.softcap)
        queries, keys, count, segments = planned
        table = _table(count, segments, options.cu_seqlens)
        queries.start(
            do, q, k, v, o, lse, table, *extras, dq, delta, *numbers, *queries.numbers
        )  # fmt: skip
        if keys is None:
            return dq, dk, dv
        table = _table(keys.tiles, keys.segments, options.cu_seqlens)
        halves = [(x[:, :, clean], x[:, :, noisy]) for x in (k, v, dk, dv)]
        (k, own_k), (v, own_v), (dk_clean, own_dk), (dv_clean, own_dv) = halves
        keys.clean.start(
            do, q, k, v, lse, delta, table, *extras, dk_clean, dv_clean, *numbers,
            *keys.clean.numbers,
        )  # fmt: skip
        if not options.noisy_only:
            do, q, lse, delta = (x[:, :, noisy] for x in (do, q, lse, delta))
        extras = extras[:1] if keys.alone else (table, *extras)
        keys.noisy.start(
            do, q, own_k, own_v, lse, delta, *extras, own_dk, own_dv, *numbers,
            *keys.noisy.numbers,
        )  # fmt: skip
        return dq, dk, dv

    return layout.copies((do, q, k, v, o), lse, *given), run


def _new(x: Tensor, empty: bool) -> Tensor:
    """A gradient; zero from the start where not all rows have programs that write them."""
    N, heads, rows, width = x.shape
    new = x.new_empty if empty else x.new_zeros
    return new((N, rows, heads, width)).transpose(1, 2)


def _table(
    tiles: int, segments: launches.Launch | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """The table of documents."""
    if segments is None or cu_seqlens is None:
        return None
    table = cu_seqlens.new_empty((tiles, 3))
    segments.start(cu_seqlens, table, *segments.numbers)
    return table


def _launches(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, options: layout.Options,
    needs_kv: bool, tiles: layout.Settings | None,
) -> tuple[launches.Launch, KeyValueGrads | None, int, launches.Launch | None]:  # fmt: skip
    """For dq and delta, and for dk and dv; of the first the tiles of a sample and their table."""
    (N, H, rows, D), T, DV = q.shape, k.shape[2] // 2, v.shape[3]
    tiles = tiles or layout.settings(max(D, DV), q.dtype, layout.target(q.device))
    tile = tiles.dq
    count, segments = tiles_of(T, tile.BLOCK_M // (1 if options.noisy_only else 2), options)
    numbers = (
        *layout.strides(do, q, k, v, o), layout.slopes_stride(options),
        *layout.halves(T, options), T, rows, H, H // k.shape[1], options.block_size,
        N * H, count, layout.window_of(T, options),
        *layout.widths(D, DV), tile.BLOCK_M, tile.BLOCK_K, *layout.forms(options),
    )  # fmt: skip
    queries = launches.Launch(
        doubled_attention_bwd_dq_kernel, count * N * H, numbers,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    keys = key_value_grads(do, q, k, v, options, tiles.dkv) if needs_kv else None
    return queries, keys, count, segments
