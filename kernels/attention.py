"""Forward of doubled_attention: clean and noisy queries of the same positions in one tile.

A program owns one tile of queries of one head and walks the clean keys that any of its rows sees,
in tiles: first those that all of its rows see whole, without a mask, then the rest. At a block size
of 1 a noisy row sees one noisy key, its own, which is where its running softmax starts; else the
noisy keys are further tiles with a mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels import _attention, _launch
from dblocks.kernels._attention import (
    LN2,
    LOG2E,
    clean_limits,
    key_spans,
    load_rows,
    noisy_limits,
    query_rows,
    store_rows,
    visible,
)


@triton.jit
def attend(
    b_acc, b_m, b_l, b_q, k_ptr, v_ptr, k_st, v_st, begin, end, b_first, b_limit, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Folds keys begin .. end - 1 into a softmax: maximum and sum [M], weighted values [M, D].

    MASKED, a row sees keys b_first <= key < b_limit only.
    """
    o_k = tl.arange(0, BLOCK_K)
    for start in range(begin, end, BLOCK_K):
        m_k = (start + o_k < end) if MASKED else None
        b_k = load_rows(k_ptr, start, o_k, m_k, k_st, D, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        if MASKED:
            b_s = tl.where(visible(start + o_k, b_first, b_limit, 1), b_s, float("-inf"))
        b_max = tl.maximum(b_m, tl.max(b_s, axis=1))
        # A row that has seen no key yet would take -inf from -inf.
        b_base = tl.where(b_max == float("-inf"), 0.0, b_max) if MASKED else b_max
        b_p = tl.exp2(b_s - b_base[:, None])
        b_scale = tl.exp2(b_m - b_base)
        b_l = b_l * b_scale + tl.sum(b_p, axis=1)
        b_v = load_rows(v_ptr, start, o_k, m_k, v_st, D, BLOCK_D)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_scale[:, None], input_precision="ieee")
        b_m = b_max
    return b_acc, b_m, b_l


@triton.jit(do_not_specialize=["T", "rows", "tiles", "heads"])
def doubled_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, documents_ptr,
    q_sn, q_sh, q_st, k_sn, k_sh, k_st, v_sn, v_sh, v_st,
    T, rows, H, group, block, heads, tiles, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr, SELF: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK_M // 2 if PACKED else BLOCK_M
    # Tiles with most keys first, so that none starts when the others have finished.
    start = (tiles - 1 - tl.program_id(0) // heads) * ROWS
    i_nh = tl.program_id(0) % heads
    i_n, i_h = tl.cast(i_nh // H, tl.int64), i_nh % H
    q_ptr += i_n * q_sn + tl.cast(i_h, tl.int64) * q_sh
    k_ptr += i_n * k_sn + tl.cast(i_h // group, tl.int64) * k_sh
    v_ptr += i_n * v_sn + tl.cast(i_h // group, tl.int64) * v_sh
    noisy_k_ptr = k_ptr + tl.cast(T, tl.int64) * k_st
    noisy_v_ptr = v_ptr + tl.cast(T, tl.int64) * v_st
    scale = tl.cast(scale, tl.float32) * LOG2E

    o_p, o_r, m_noisy = query_rows(T, BLOCK_M, PACKED)
    m_t = start + o_p < T
    b_q = load_rows(q_ptr, start, o_r, m_t, q_st, D, BLOCK_D)
    begin, full, end, noisy_begin, noisy_end = key_spans(
        start, documents_ptr, T, block, ROWS, BLOCK_K, PACKED, TOKEN
    )
    first, limit = clean_limits(start + o_p, m_noisy, documents_ptr, T, block, TOKEN)

    if SELF:
        m_self = m_t & m_noisy
        b_k = load_rows(noisy_k_ptr, start, o_p, m_self, k_st, D, BLOCK_D)
        b_s = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), axis=1) * scale
        b_m = tl.where(m_noisy, b_s, float("-inf"))
        b_l = tl.where(m_noisy, 1.0, 0.0)
        b_acc = load_rows(noisy_v_ptr, start, o_p, m_self, v_st, D, BLOCK_D).to(tl.float32)
    else:
        b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_l = tl.zeros([BLOCK_M], tl.float32)
        b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    b_acc, b_m, b_l = attend(
        b_acc, b_m, b_l, b_q, k_ptr, v_ptr, k_st, v_st, begin, full, None, None, scale,
        D, BLOCK_D, BLOCK_K, False,
    )  # fmt: skip
    b_acc, b_m, b_l = attend(
        b_acc, b_m, b_l, b_q, k_ptr, v_ptr, k_st, v_st, full, end, first, limit, scale,
        D, BLOCK_D, BLOCK_K, True,
    )  # fmt: skip
    if not SELF:
        first, limit = noisy_limits(start + o_p, m_noisy, documents_ptr, T, block)
        b_acc, b_m, b_l = attend(
            b_acc, b_m, b_l, b_q, noisy_k_ptr, noisy_v_ptr, k_st, v_st, noisy_begin, noisy_end,
            first, limit, scale, D, BLOCK_D, BLOCK_K, True,
        )  # fmt: skip

    o_ptr += i_n * rows * H * D + tl.cast(i_h, tl.int64) * D
    lse_ptr += tl.cast(i_nh, tl.int64) * rows + start
    store_rows(o_ptr, start, o_r, m_t, H * D, b_acc / b_l[:, None], D, BLOCK_D)
    tl.store(lse_ptr + o_r, (b_m + tl.log2(b_l)) * LN2, mask=m_t)


def doubled_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    token: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    noisy_only: bool,
    *,
    tiles: _attention.Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """o, lying as [N, rows, H, D], and the natural log of the softmax sums, float32 [N, H, rows].

    `tiles` other than those of the table are for tests and the compile gate.
    """
    N, H, rows, D = q.shape
    T = k.shape[2] // 2
    o = _attention.empty_by_rows(q)
    lse = q.new_empty((N, H, rows), dtype=torch.float32)
    if q.numel() == 0:
        return o, lse
    q, k, v = (_launch.unit_last(x) for x in (q, k, v))
    documents = _attention.documents(cu_seqlens, T)
    tile = tiles or _attention.settings(D, q.dtype, _attention.target(q.device)).forward
    step = tile.BLOCK_M if noisy_only else tile.BLOCK_M // 2
    count = triton.cdiv(T, step)
    with _launch.device_guard(q):
        doubled_attention_fwd_kernel[(count * N * H,)](
            q, k, v, o, lse, documents,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            T, rows, H, H // k.shape[1], block_size, N * H, count, scale,
            D, _launch.next_power_of_2(D), tile.BLOCK_M, tile.BLOCK_K,
            not noisy_only, block_size == 1, token and block_size > 1,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return o, lse
