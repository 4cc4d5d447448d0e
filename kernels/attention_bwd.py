"""Backward of doubled_attention in two passes over the scores, without atomics.

The first pass owns tiles of queries as the forward does, and writes dq and delta = rowsum(do * o).
The second owns tiles of keys, walks all queries that see one of them, of every head of the group,
and writes dk and dv once: one launch for the clean keys, one for the noisy ones. At a block size of
1 a noisy key has one query, and its pass needs no matrix product.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels import _attention, _launch
from dblocks.kernels._attention import (
    LOG2E,
    bounds,
    clean_limits,
    key_spans,
    load_rows,
    noisy_limits,
    query_rows,
    store_rows,
    visible,
)

SELF_ELEMENTS = 2048  # of a tile in the pass without matrix products: 16 a thread, of six tensors


@triton.jit
def query_grads(
    b_dq, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, k_st, v_st, begin, end, b_first, b_limit, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds to dq / scale [M, D] what keys begin .. end - 1 contribute.

    MASKED, a row sees keys b_first <= key < b_limit only.
    """
    o_k = tl.arange(0, BLOCK_K)
    for start in range(begin, end, BLOCK_K):
        m_k = (start + o_k < end) if MASKED else None
        b_k = load_rows(k_ptr, start, o_k, m_k, k_st, D, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        if MASKED:
            b_s = tl.where(visible(start + o_k, b_first, b_limit, 1), b_s, float("-inf"))
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_v = load_rows(v_ptr, start, o_k, m_k, v_st, D, BLOCK_D)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit(do_not_specialize=["T", "rows", "tiles", "heads"])
def doubled_attention_bwd_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, documents_ptr, dq_ptr, delta_ptr,
    do_sn, do_sh, do_st, q_sn, q_sh, q_st, k_sn, k_sh, k_st, v_sn, v_sh, v_st, o_sn, o_sh, o_st,
    T, rows, H, group, block, heads, tiles, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr, SELF: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK_M // 2 if PACKED else BLOCK_M
    start = (tiles - 1 - tl.program_id(0) // heads) * ROWS
    i_nh = tl.program_id(0) % heads
    i_n, i_h = tl.cast(i_nh // H, tl.int64), tl.cast(i_nh % H, tl.int64)
    o_p, o_r, m_noisy = query_rows(T, BLOCK_M, PACKED)
    m_t = start + o_p < T
    do_ptr += i_n * do_sn + i_h * do_sh
    o_ptr += i_n * o_sn + i_h * o_sh
    lse_ptr += tl.cast(i_nh, tl.int64) * rows + start
    delta_ptr += tl.cast(i_nh, tl.int64) * rows + start
    b_do = load_rows(do_ptr, start, o_r, m_t, do_st, D, BLOCK_D)
    b_o = load_rows(o_ptr, start, o_r, m_t, o_st, D, BLOCK_D)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), axis=1)
    tl.store(delta_ptr + o_r, b_delta, mask=m_t)
    if dq_ptr is not None:
        q_ptr += i_n * q_sn + i_h * q_sh
        k_ptr += i_n * k_sn + i_h // group * k_sh
        v_ptr += i_n * v_sn + i_h // group * v_sh
        noisy_k_ptr = k_ptr + tl.cast(T, tl.int64) * k_st
        noisy_v_ptr = v_ptr + tl.cast(T, tl.int64) * v_st
        scale = tl.cast(scale, tl.float32)
        scale_log2 = scale * LOG2E
        b_q = load_rows(q_ptr, start, o_r, m_t, q_st, D, BLOCK_D)
        # exp2(s - inf) = 0 for rows past the last.
        b_lse = tl.load(lse_ptr + o_r, mask=m_t, other=float("inf")) * LOG2E
        begin, full, end, noisy_begin, noisy_end = key_spans(
            start, documents_ptr, T, block, ROWS, BLOCK_K, PACKED, TOKEN
        )
        first, limit = clean_limits(start + o_p, m_noisy, documents_ptr, T, block, TOKEN)
        if SELF:
            m_self = m_t & m_noisy
            b_k = load_rows(noisy_k_ptr, start, o_p, m_self, k_st, D, BLOCK_D).to(tl.float32)
            b_v = load_rows(noisy_v_ptr, start, o_p, m_self, v_st, D, BLOCK_D).to(tl.float32)
            b_s = tl.sum(b_q.to(tl.float32) * b_k, axis=1) * scale_log2
            b_dp = tl.sum(b_do.to(tl.float32) * b_v, axis=1)
            b_p = tl.exp2(tl.where(m_self, b_s, float("-inf")) - b_lse)
            b_dq = (b_p * (b_dp - b_delta))[:, None] * b_k
        else:
            b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        b_dq = query_grads(
            b_dq, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, k_st, v_st, begin, full, None, None,
            scale_log2, D, BLOCK_D, BLOCK_K, False,
        )  # fmt: skip
        b_dq = query_grads(
            b_dq, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, k_st, v_st, full, end, first, limit,
            scale_log2, D, BLOCK_D, BLOCK_K, True,
        )  # fmt: skip
        if not SELF:
            first, limit = noisy_limits(start + o_p, m_noisy, documents_ptr, T, block)
            b_dq = query_grads(
                b_dq, b_q, b_do, b_lse, b_delta, noisy_k_ptr, noisy_v_ptr, k_st, v_st,
                noisy_begin, noisy_end, first, limit, scale_log2, D, BLOCK_D, BLOCK_K, True,
            )  # fmt: skip
        dq_ptr += i_n * rows * H * D + i_h * D
        store_rows(dq_ptr, start, o_r, m_t, H * D, b_dq * scale, D, BLOCK_D)


@triton.jit
def query_span(
    key, documents_ptr, T, block, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr, NOISY: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """Positions of the queries that see keys from `key`: begin, full, end.

    Every query from `full` on sees every key; NOISY keys need no such span.
    """
    _, low, high, document_end = bounds(key, documents_ptr, T, block)
    last = tl.minimum(key + BLOCK_K, T) - 1
    _, _, last_high, end = bounds(last, documents_ptr, T, block)
    if NOISY:
        return low, last_high, last_high
    else:
        if not PACKED:
            begin = high
        elif TOKEN:
            begin = key
        else:
            begin = low
        full = begin + tl.cdiv(last_high - begin, ROWS) * ROWS
        whole = (document_end == end) & (key + BLOCK_K <= T)
        return begin, tl.where(whole, tl.minimum(full, end), end), end


@triton.jit
def key_grads(
    b_dk, b_dv, b_k, b_v, do_ptr, q_ptr, lse_ptr, delta_ptr, documents_ptr, do_st, q_st,
    begin, end, last, o_p, o_r, m_noisy, o_k, T, block, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, NOISY: tl.constexpr,
    TOKEN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds to dk / scale and dv [K, D] what queries at positions begin .. end - 1 contribute.

    Queries from `last` on are left out. NOISY, the keys are; not MASKED, each query sees each key.
    """
    for start in range(begin, end, ROWS):
        m_t = start + o_p < last
        b_q = load_rows(q_ptr, start, o_r, m_t, q_st, D, BLOCK_D)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale
        if MASKED:
            if NOISY:
                first, limit = noisy_limits(start + o_p, m_noisy, documents_ptr, T, block)
            else:
                first, limit = clean_limits(start + o_p, m_noisy, documents_ptr, T, block, TOKEN)
            b_s = tl.where(visible(o_k, first, limit, 0), b_s, float("-inf"))
        # exp2(s - inf) = 0 for queries that are left out.
        b_lse = tl.load(lse_ptr + start + o_r, mask=m_t, other=float("inf")) * LOG2E
        b_p = tl.exp2(b_s - b_lse[None, :])
        b_do = load_rows(do_ptr, start, o_r, m_t, do_st, D, BLOCK_D)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision="ieee")
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
        b_delta = tl.load(delta_ptr + start + o_r, mask=m_t, other=0.0)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit(
    do_not_specialize=["T", "rows", "heads"],
    do_not_specialize_on_alignment=["lse_ptr", "delta_ptr"],
)
def doubled_attention_bwd_dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, documents_ptr, dk_ptr, dv_ptr,
    do_sn, do_sh, do_st, q_sn, q_sh, q_st, k_sn, k_sh, k_st, v_sn, v_sh, v_st,
    T, rows, Hkv, group, block, heads, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr, NOISY: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK_M // 2 if PACKED else BLOCK_M
    key = tl.program_id(0) // heads * BLOCK_K
    i_nh = tl.program_id(0) % heads
    i_n, i_h = tl.cast(i_nh // Hkv, tl.int64), tl.cast(i_nh % Hkv, tl.int64)
    do_ptr += i_n * do_sn + i_h * group * do_sh
    q_ptr += i_n * q_sn + i_h * group * q_sh
    lse_ptr += tl.cast(i_nh, tl.int64) * group * rows
    delta_ptr += tl.cast(i_nh, tl.int64) * group * rows
    scale = tl.cast(scale, tl.float32)
    o_p, o_r, m_noisy = query_rows(T, BLOCK_M, PACKED)
    o_k = tl.arange(0, BLOCK_K)
    m_k = key + o_k < T
    b_k = load_rows(k_ptr + i_n * k_sn + i_h * k_sh, key, o_k, m_k, k_st, D, BLOCK_D)
    b_v = load_rows(v_ptr + i_n * v_sn + i_h * v_sh, key, o_k, m_k, v_st, D, BLOCK_D)
    begin, full, end = query_span(key, documents_ptr, T, block, ROWS, BLOCK_K, PACKED, NOISY, TOKEN)
    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for _ in range(group):
        b_dk, b_dv = key_grads(
            b_dk, b_dv, b_k, b_v, do_ptr, q_ptr, lse_ptr, delta_ptr, documents_ptr, do_st, q_st,
            begin, full, end, o_p, o_r, m_noisy, key + o_k, T, block, scale * LOG2E,
            D, BLOCK_D, ROWS, NOISY, TOKEN, True,
        )  # fmt: skip
        if not NOISY:
            b_dk, b_dv = key_grads(
                b_dk, b_dv, b_k, b_v, do_ptr, q_ptr, lse_ptr, delta_ptr, documents_ptr, do_st,
                q_st, full, end, end, o_p, o_r, m_noisy, key + o_k, T, block, scale * LOG2E,
                D, BLOCK_D, ROWS, NOISY, TOKEN, False,
            )  # fmt: skip
        do_ptr += do_sh
        q_ptr += q_sh
        lse_ptr += rows
        delta_ptr += rows
    o_g = i_n * 2 * T * Hkv * D + i_h * D
    store_rows(dk_ptr + o_g, key, o_k, m_k, Hkv * D, b_dk * scale, D, BLOCK_D)
    store_rows(dv_ptr + o_g, key, o_k, m_k, Hkv * D, b_dv, D, BLOCK_D)


@triton.jit(
    do_not_specialize=["T", "rows", "heads"],
    do_not_specialize_on_alignment=["lse_ptr", "delta_ptr"],
)
def doubled_attention_bwd_self_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    do_sn, do_sh, do_st, q_sn, q_sh, q_st, k_sn, k_sh, k_st, v_sn, v_sh, v_st,
    T, rows, Hkv, group, heads, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) // heads * BLOCK_R
    i_nh = tl.program_id(0) % heads
    i_n, i_h = tl.cast(i_nh // Hkv, tl.int64), tl.cast(i_nh % Hkv, tl.int64)
    do_ptr += i_n * do_sn + i_h * group * do_sh
    q_ptr += i_n * q_sn + i_h * group * q_sh
    lse_ptr += tl.cast(i_nh, tl.int64) * group * rows
    delta_ptr += tl.cast(i_nh, tl.int64) * group * rows
    scale = tl.cast(scale, tl.float32)
    o_r = tl.arange(0, BLOCK_R)
    m_t = start + o_r < T
    k_ptr += i_n * k_sn + i_h * k_sh
    v_ptr += i_n * v_sn + i_h * v_sh
    b_k = load_rows(k_ptr, start, o_r, m_t, k_st, D, BLOCK_D).to(tl.float32)
    b_v = load_rows(v_ptr, start, o_r, m_t, v_st, D, BLOCK_D).to(tl.float32)
    b_dk = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for _ in range(group):
        b_q = load_rows(q_ptr, start, o_r, m_t, q_st, D, BLOCK_D).to(tl.float32)
        b_do = load_rows(do_ptr, start, o_r, m_t, do_st, D, BLOCK_D).to(tl.float32)
        b_lse = tl.load(lse_ptr + start + o_r, mask=m_t, other=float("inf"))
        b_delta = tl.load(delta_ptr + start + o_r, mask=m_t, other=0.0)
        b_p = tl.exp2((tl.sum(b_q * b_k, axis=1) * scale - b_lse) * LOG2E)
        b_ds = b_p * (tl.sum(b_do * b_v, axis=1) - b_delta)
        b_dk += b_ds[:, None] * b_q
        b_dv += b_p[:, None] * b_do
        do_ptr += do_sh
        q_ptr += q_sh
        lse_ptr += rows
        delta_ptr += rows
    o_g = i_n * 2 * T * Hkv * D + i_h * D
    store_rows(dk_ptr + o_g, start, o_r, m_t, Hkv * D, b_dk * scale, D, BLOCK_D)
    store_rows(dv_ptr + o_g, start, o_r, m_t, Hkv * D, b_dv, D, BLOCK_D)


def doubled_attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    block_size: int,
    token: bool,
    scale: float,
    cu_seqlens: Tensor | None,
    noisy_only: bool,
    needs: Sequence[bool],
    *,
    tiles: _attention.Settings | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, and dk and dv: `needs` says whether the first is asked for, and whether the other two.

    They lie as [N, rows, heads, D]. `tiles` other than those of the table are for tests and the
    compile gate.
    """
    N, H, rows, D = q.shape
    Hkv, T = k.shape[1], k.shape[2] // 2
    dq = _attention.empty_by_rows(q) if needs[0] else None
    dk, dv = (_attention.empty_by_rows(x) if needs[1] else None for x in (k, v))
    if q.numel() == 0:
        return dq, dk, dv
    do, q, k, v, o = (_launch.unit_last(x) for x in (do, q, k, v, o))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    documents = _attention.documents(cu_seqlens, T)
    tiles = tiles or _attention.settings(D, q.dtype, _attention.target(q.device))
    width = (D, _launch.next_power_of_2(D))
    token = token and block_size > 1
    group = H // Hkv
    with _launch.device_guard(q):
        tile = tiles.dq
        count = triton.cdiv(T, tile.BLOCK_M if noisy_only else tile.BLOCK_M // 2)
        doubled_attention_bwd_dq_kernel[(count * N * H,)](
            do, q, k, v, o, lse, documents, dq, delta,
            *(s for x in (do, q, k, v, o) for s in x.stride()[:3]),
            T, rows, H, group, block_size, N * H, count, scale,
            *width, tile.BLOCK_M, tile.BLOCK_K, not noisy_only, block_size == 1, token,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        if dk is None or dv is None:
            return dq, None, None
        tile = tiles.dkv
        strides = [s for x in (do, q, k, v) for s in x.stride()[:3]]
        sizes = (T, rows, Hkv, group)
        keys = triton.cdiv(T, tile.BLOCK_K) * N * Hkv
        meta = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        doubled_attention_bwd_dkv_kernel[(keys,)](
            do, q, k, v, lse, delta, documents, dk, dv, *strides, *sizes, block_size, N * Hkv,
            scale, *width, tile.BLOCK_M, tile.BLOCK_K, not noisy_only, False, token, **meta,
        )  # fmt: skip
        do, q, lse, delta = (x[:, :, rows - T :] for x in (do, q, lse, delta))
        k, v, noisy_dk, noisy_dv = (x[:, :, T:] for x in (k, v, dk, dv))
        if block_size == 1:
            BLOCK_R = max(SELF_ELEMENTS // width[1], 1)
            doubled_attention_bwd_self_kernel[(triton.cdiv(T, BLOCK_R) * N * Hkv,)](
                do, q, k, v, lse, delta, noisy_dk, noisy_dv, *strides, *sizes, N * Hkv, scale,
                *width, BLOCK_R, num_warps=4,
            )  # fmt: skip
        else:
            doubled_attention_bwd_dkv_kernel[(keys,)](
                do, q, k, v, lse, delta, documents, noisy_dk, noisy_dv, *strides, *sizes,
                block_size, N * Hkv, scale, *width, tile.BLOCK_M, tile.BLOCK_K, False, True,
                False, **meta,
            )  # fmt: skip
    return dq, dk, dv
