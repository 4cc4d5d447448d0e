"""Forward of doubled_attention: clean and noisy queries of the same positions in one tile.

A program owns one tile of queries of one head and walks the clean keys that any of its rows sees,
in tiles: those that all of its rows see whole without a mask, the others (at the diagonal, and at
the start of a window) with one. At a block size of 1 a noisy row sees one noisy key, its own, which
is where its running softmax starts; else the noisy keys are further tiles with a mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels._common import launches
from dblocks.kernels.attention import layout
from dblocks.kernels.attention.segments import segment, tiles_of
from dblocks.kernels.attention.tile import (
    LN2,
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
    visible,
    zeros,
)


@triton.jit
def attend(
    b_acc, b_m, b_l, b_q, k_ptr, v_ptr, k_st, v_st, begin, end, o_t, b_first, b_end,
    scale, window, softcap, slope,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Folds keys begin .. end - 1 into a softmax: maximum and sum [M], weighted values [M, DV].

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
        b_max = tl.maximum(b_m, tl.max(b_s, axis=1))
        # A row that has seen no key yet would take -inf from -inf.
        b_base = tl.where(b_max == float("-inf"), 0.0, b_max) if MASKED else b_max
        b_p = tl.exp2(b_s - b_base[:, None])
        b_scale = tl.exp2(b_m - b_base)
        b_l = b_l * b_scale + tl.sum(b_p, axis=1)
        b_v = load_rows(v_ptr, start, o_k, m_k, v_st, DV, BLOCK_DV)
        b_acc = product(rounded(b_p, b_v.dtype), b_v, b_acc * b_scale[:, None])
        b_m = b_max
    return b_acc, b_m, b_l


@triton.jit(do_not_specialize=["clean", "noisy", "T", "rows", "tiles", "heads", "window"])
def doubled_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, table_ptr, valid_ptr, slopes_ptr, scale, softcap,
    q_sn, q_sh, q_st, k_sn, k_sh, k_st, v_sn, v_sh, v_st, slopes_sn,
    clean, noisy, T, rows, H, group, block, heads, tiles, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr, SELF: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK_M // 2 if PACKED else BLOCK_M
    # Tiles with most keys first, so that none starts when the others have finished.
    i_tile = tiles - 1 - tl.program_id(0) // heads
    i_nh = tl.program_id(0) % heads
    i_n, i_h = tl.cast(i_nh // H, tl.int64), tl.cast(i_nh % H, tl.int64)
    first, L, start = segment(i_tile, i_n, table_ptr, valid_ptr, T, ROWS)
    if table_ptr is not None or valid_ptr is not None:  # noqa: SIM102 (known to the compiler)
        if start >= L:
            return
    row = tl.cast(first, tl.int64)
    q_ptr += i_n * q_sn + i_h * q_sh + row * q_st
    k_ptr += i_n * k_sn + i_h // group * k_sh + row * k_st
    v_ptr += i_n * v_sn + i_h // group * v_sh + row * v_st
    clean_k_ptr = k_ptr + tl.cast(clean, tl.int64) * k_st
    clean_v_ptr = v_ptr + tl.cast(clean, tl.int64) * v_st
    noisy_k_ptr = k_ptr + tl.cast(noisy, tl.int64) * k_st
    noisy_v_ptr = v_ptr + tl.cast(noisy, tl.int64) * v_st
    scale = tl.cast(scale, tl.float32) * LOG2E
    cap = None if softcap is None else softcap * LOG2E
    slope = None if slopes_ptr is None else tl.load(slopes_ptr + i_n * slopes_sn + i_h) * LOG2E

    o_p, o_r, m_noisy = query_rows(clean, noisy if PACKED else 0, BLOCK_M, PACKED)
    m_t = start + o_p < L
    o_t = tl.minimum(start + o_p, L - 1)  # rows past the last as the last: each has keys
    b_q = load_rows(q_ptr, start, o_r, m_t, q_st, D, BLOCK_D)
    begin, full, full_end, end, noisy_begin, noisy_end = key_spans(
        start, L, block, window, ROWS, BLOCK_K, PACKED, TOKEN
    )

    if SELF:
        m_self = m_t & m_noisy
        b_k = load_rows(noisy_k_ptr, start, o_p, m_self, k_st, D, BLOCK_D)
        b_s = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), axis=1) * scale
        b_s = scored(b_s, o_t, o_t, cap, slope)
        b_m = tl.where(m_noisy, b_s, float("-inf"))
        b_l = tl.where(m_noisy, 1.0, 0.0)
        b_acc = load_rows(noisy_v_ptr, start, o_p, m_self, v_st, DV, BLOCK_DV).to(tl.float32)
    else:
        b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_l = tl.zeros([BLOCK_M], tl.float32)
        b_acc = zeros(BLOCK_M, BLOCK_DV, T)

    b_end = clean_end(o_t, m_noisy, L, block, TOKEN)[:, None]
    b_t = o_t[:, None]
    if window is not None:
        b_acc, b_m, b_l = attend(
            b_acc, b_m, b_l, b_q, clean_k_ptr, clean_v_ptr, k_st, v_st,
            begin, tl.minimum(full, end), b_t, None, b_end, scale, window, cap, slope,
            D, BLOCK_D, DV, BLOCK_DV, BLOCK_K, True,
        )  # fmt: skip
    b_acc, b_m, b_l = attend(
        b_acc, b_m, b_l, b_q, clean_k_ptr, clean_v_ptr, k_st, v_st,
        full, full_end, b_t, None, b_end, scale, window, cap, slope,
        D, BLOCK_D, DV, BLOCK_DV, BLOCK_K, False,
    )  # fmt: skip
    b_acc, b_m, b_l = attend(
        b_acc, b_m, b_l, b_q, clean_k_ptr, clean_v_ptr, k_st, v_st,
        full_end, end, b_t, None, b_end, scale, window, cap, slope,
        D, BLOCK_D, DV, BLOCK_DV, BLOCK_K, True,
    )  # fmt: skip
    if not SELF:
        b_first, b_end = noisy_span(o_t, m_noisy, L, block)
        b_acc, b_m, b_l = attend(
            b_acc, b_m, b_l, b_q, noisy_k_ptr, noisy_v_ptr, k_st, v_st,
            noisy_begin, noisy_end, b_t, b_first[:, None], b_end[:, None], scale, window, cap,
            slope, D, BLOCK_D, DV, BLOCK_DV, BLOCK_K, True,
        )  # fmt: skip

    o_ptr += (i_n * rows + row) * H * DV + i_h * DV
    lse_ptr += tl.cast(i_nh, tl.int64) * rows + row + start
    store_rows(o_ptr, start, o_r, m_t, H * DV, b_acc / b_l[:, None], DV, BLOCK_DV)
    tl.store(lse_ptr + o_r, (b_m + tl.log2(b_l)) * LN2, mask=m_t)


def doubled_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, *options: Any, tiles: layout.Tiles | None = None
) -> launches.Plan:
    """o, lying as [N, rows, H, DV], and the natural log of the softmax sums, float32 [N, H, rows].

    `options` are those of `layout.Options`. `tiles` other than those of the table are for tests and
    `make kernels-check`.
    """
    N, H, rows, _ = q.shape
    sizes = (N, rows, H, v.shape[3])
    launch, count, segments = None, 0, None
    if q.numel():
        launch, count, segments = _launch(q, k, v, layout.Options(*options), tiles)

    def run(q, k, v, *options):
        given = layout.Options(*options)
        if given.valid is None:
            o, lse = q.new_empty(sizes), q.new_empty((N, H, rows), dtype=torch.float32)
        else:  # rows outside of it have no program that writes them
            o = q.new_zeros(sizes)
            lse = q.new_full((N, H, rows), float("-inf"), dtype=torch.float32)
        o = o.transpose(1, 2)
        if launch is None:
            return o, lse
        table = None
        if segments is not None:
            table = q.new_empty((count, 3), dtype=torch.int32)
            segments.start(given.cu_seqlens, table, *segments.numbers)
        launch.start(
            q, k, v, o, lse, table, given.valid, given.alibi_slopes, given.scale, given.softcap,
            *launch.numbers,
        )  # fmt: skip
        return o, lse

    return layout.copies((q, k, v), *options), run


def _launch(
    q: Tensor, k: Tensor, v: Tensor, options: layout.Options, tile: layout.Tiles | None
) -> tuple[launches.Launch, int, launches.Launch | None]:
    """The launch, and of `tiles_of` the tiles of a sample and their table."""
    (N, H, rows, D), T, DV = q.shape, k.shape[2] // 2, v.shape[3]
    if tile is None:
        target = layout.target(q.device)
        tile = layout.settings(max(D, DV), q.dtype, target, options.loaded).forward
    count, segments = tiles_of(T, tile.BLOCK_M // (1 if options.noisy_only else 2), options)
    numbers = (
        *layout.strides(q, k, v), layout.slopes_stride(options),
        *layout.halves(T, options), T, rows, H, H // k.shape[1], options.block_size,
        N * H, count, layout.window_of(T, options),
        *layout.widths(D, DV), tile.BLOCK_M, tile.BLOCK_K, *layout.forms(options),
    )  # fmt: skip
    launch = launches.Launch(
        doubled_attention_fwd_kernel, count * N * H, numbers,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return launch, count, segments
