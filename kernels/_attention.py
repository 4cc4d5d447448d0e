"""What forward and backward of doubled_attention share: launch settings, bounds and loads.

A tile of queries is BLOCK_M rows. PACKED, its first half are clean and its second half noisy rows
of the same positions, so that a tile of clean keys is read once for both; else all are noisy.
Positions count from 0 in one half of the rows, documents follow one another.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

LARGE = ("sm_80", "sm_90", "sm_100", "sm_103")  # targets with 160 KB of shared memory or more


class Tiles(NamedTuple):
    """Query rows and keys of a tile, and how a program works on them."""

    BLOCK_M: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Settings(NamedTuple):
    """The tiles of the three kernels with matrix products."""

    forward: Tiles
    dq: Tiles
    dkv: Tiles


# By the most columns of a head. The accumulators take M x D registers in the forward and in dq and
# 2 x K x D in dkv, of the 64K that the 8 warps of a program can have; 4 warps leave room for a
# second program. Scores of M x K take most of the rest, stages what shared memory is left. 128 rows
# are what two warp groups multiply at once by wgmma.
_LARGE = {
    64: Settings(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 128, 8, 2)),
    128: Settings(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 2)),
    256: Settings(Tiles(128, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 2)),
}
_SMALL = {  # 99 KB of shared memory
    64: Settings(Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    128: Settings(Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 8, 2)),
    256: Settings(Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
}
_AMD = {  # 64 KB, and 64 threads a warp
    64: Settings(Tiles(128, 64, 4, 2), Tiles(128, 64, 4, 1), Tiles(64, 64, 4, 1)),
    128: Settings(Tiles(128, 64, 4, 1), Tiles(128, 32, 4, 1), Tiles(32, 64, 4, 1)),
    256: Settings(Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
}
# Without matrix instructions a thread holds whole rows of its operands: small tiles, many threads.
_FLOAT32 = {
    64: Settings(*3 * [Tiles(32, 32, 8, 1)]),
    128: Settings(*3 * [Tiles(32, 16, 8, 1)]),
    256: Settings(*3 * [Tiles(16, 16, 8, 1)]),
}


def settings(width: int, dtype: torch.dtype, target: str) -> Settings:
    """The tiles for a head width on a target such as "sm_90": a function of these alone.

    Results repeat bit for bit on one target; between targets they differ in the last bits, as tiles
    and matrix units do.
    """
    if dtype == torch.float32:
        table = _FLOAT32
    elif target.startswith("gfx"):
        table = _AMD
    else:
        table = _LARGE if target in LARGE else _SMALL
    return table[next(columns for columns in table if width <= columns)]


@functools.cache
def target(device: torch.device) -> str:
    """What `device` is compiled for; the interpreter takes the tiles of sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def documents(cu_seqlens: Tensor | None, T: int) -> Tensor | None:
    """First and end row of each row's document, int32 [2, T], computed on the device."""
    if cu_seqlens is None:
        return None
    row = torch.arange(T, dtype=torch.int32, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    return torch.stack([cu_seqlens[document], cu_seqlens[document + 1]])


def empty_by_rows(x: Tensor) -> Tensor:
    """An empty tensor of the shape of `x` [N, heads, rows, D] that lies as [N, rows, heads, D]."""
    N, heads, rows, D = x.shape
    return x.new_empty((N, rows, heads, D)).transpose(1, 2)


@triton.jit
def bounds(o_t, documents_ptr, T, block):
    """Of each position: first row of its document, first and end row of its block, end of document.

    With those, clean keys j that a clean row sees are first <= j < block end (or <= its own), a
    noisy row first <= j < block start; its noisy keys are block start <= j < block end.
    """
    # Rows past the last count as the last, so that every row of a tile has keys.
    o_t = tl.minimum(o_t, T - 1)
    if documents_ptr is None:
        first = o_t * 0
        end = first + T
    else:
        first = tl.load(documents_ptr + o_t)
        end = tl.load(documents_ptr + T + o_t)
    low = first + (o_t - first) // block * block
    return first, low, tl.minimum(low + block, end), end


@triton.jit
def query_rows(T, BLOCK_M: tl.constexpr, PACKED: tl.constexpr):
    """Of the rows of a tile: position after its start, row of q after it, whether it is noisy."""
    o_m = tl.arange(0, BLOCK_M)
    if PACKED:
        m_noisy = o_m >= BLOCK_M // 2
        o_p = o_m % (BLOCK_M // 2)
        return o_p, tl.cast(o_p, tl.int64) + tl.where(m_noisy, tl.cast(T, tl.int64), 0), m_noisy
    else:
        return o_m, tl.cast(o_m, tl.int64), o_m >= 0


@triton.jit
def key_spans(
    start, documents_ptr, T, block,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """The keys that queries at ROWS positions from `start` see.

    Clean ones: begin, full, end, of which every query sees those before `full`, whole tiles. Noisy
    ones: begin, end.
    """
    begin, noisy_begin, _, _ = bounds(start, documents_ptr, T, block)
    last = tl.minimum(start + ROWS, T) - 1
    last_first, last_low, noisy_end, _ = bounds(last, documents_ptr, T, block)
    full = begin + (noisy_begin - begin) // BLOCK_K * BLOCK_K
    if documents_ptr is not None:
        full = tl.where(last_first == begin, full, begin)
    if not PACKED:
        end = last_low
    elif TOKEN:
        end = last + 1
    else:
        end = noisy_end
    return begin, full, end, noisy_begin, noisy_end


@triton.jit
def clean_limits(o_t, m_noisy, documents_ptr, T, block, TOKEN: tl.constexpr):
    """The clean keys that each query sees: first <= key < limit; first is `None` if it is 0."""
    first, low, high, _ = bounds(o_t, documents_ptr, T, block)
    limit = tl.where(m_noisy, low, o_t + 1 if TOKEN else high)
    return (None if documents_ptr is None else first), limit


@triton.jit
def noisy_limits(o_t, m_noisy, documents_ptr, T, block):
    """The noisy keys that each query sees: first <= key < limit; none for clean queries."""
    _, low, high, _ = bounds(o_t, documents_ptr, T, block)
    return low, tl.where(m_noisy, high, 0)


@triton.jit
def visible(o_k, first, limit, KEY_AXIS: tl.constexpr):
    """Whether first <= key < limit, a tile of keys along KEY_AXIS and queries along the other."""
    o_k, limit = tl.expand_dims(o_k, 1 - KEY_AXIS), tl.expand_dims(limit, KEY_AXIS)
    if first is None:
        return o_k < limit
    else:
        return (o_k >= tl.expand_dims(first, KEY_AXIS)) & (o_k < limit)


@triton.jit
def load_rows(ptr, start, o_r, m_r, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `start + o_r` [R, BLOCK_D], zero outside of the mask; a mask of `None` is all rows."""
    o_d = tl.arange(0, BLOCK_D)
    p = ptr + tl.cast(start, tl.int64) * stride
    p += (tl.cast(o_r, tl.int64) * stride)[:, None] + o_d[None, :]
    if m_r is None:
        if D == BLOCK_D:
            return tl.load(p)
        else:
            return tl.load(p, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(p, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, start, o_r, m_r, stride, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores rows `start + o_r`, rounding to the dtype of the output once."""
    o_d = tl.arange(0, BLOCK_D)
    p = ptr + tl.cast(start, tl.int64) * stride
    p += (tl.cast(o_r, tl.int64) * stride)[:, None] + o_d[None, :]
    m = m_r[:, None] & (o_d < D)[None, :]
    tl.store(p, value.to(ptr.dtype.element_ty), mask=m)
