"""What the kernels of doubled_attention share on the device: rows, who sees whom, scores.

A tile lies in one segment: a document, the valid positions of a sample, or all. Positions count
from 0 in the segment, pointers start at it, and L is its length; nothing outside of it is loaded,
so that not even a NaN gets out of a segment. A tile of queries is BLOCK_M rows. PACKED, its first
half are clean and its second half noisy rows of the same positions, so that a tile of clean keys is
read once for both; else all are noisy.

No function here returns None inside a tuple, which Triton 3.6 cannot compile.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The interpreter calculates with the bits of bfloat16 as if they were integers.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def product(a, b, b_acc):
    """b_acc + a @ b in float32; b_acc may be None."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, b_acc, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to the nearest of `dtype`; the interpreter of some versions cuts bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) & -0x10000
        x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def zeros(M: tl.constexpr, N: tl.constexpr, T):
    """Float32 zeros [M, N] of 0 <= T <= 2**30, each a value of its own to the compiler.

    From a constant, or one value copied, ptxas fills the accumulators of a loop's matrix products
    where it joins the path around the loop, and then runs them one after the other ("wgmma
    serialized").
    """
    o = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    return ((o + T) >> 31).to(tl.float32, bitcast=True)


@triton.jit
def query_rows(clean, noisy, BLOCK_M: tl.constexpr, PACKED: tl.constexpr):
    """Of the rows of a tile: position after its start, row of q after it, whether it is noisy.

    `clean` and `noisy` are the first rows of the halves of q.
    """
    o_m = tl.arange(0, BLOCK_M)
    if PACKED:
        m_noisy = o_m >= BLOCK_M // 2
        o_p = o_m % (BLOCK_M // 2)
        half = tl.where(m_noisy, tl.cast(noisy, tl.int64), tl.cast(clean, tl.int64))
        return o_p, tl.cast(o_p, tl.int64) + half, m_noisy
    else:
        return o_m, tl.cast(o_m, tl.int64) + noisy, o_m >= 0


@triton.jit
def block_of(o_t, L, block):
    """First and end position of the block of each position."""
    low = tl.minimum(o_t, L - 1) // block * block
    return low, tl.minimum(low + block, L)


@triton.jit
def key_spans(
    start, L, block, window,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """The keys that queries at ROWS positions from `start` see.

    Clean ones: begin, full, full_end, end, of which every query sees those from `full` to
    `full_end`, whole tiles. Noisy ones: begin, end.
    """
    last = tl.minimum(start + ROWS, L) - 1
    noisy_begin, _ = block_of(start, L, block)
    last_low, noisy_end = block_of(last, L, block)
    if not PACKED:
        end = last_low
    elif TOKEN:
        end = last + 1
    else:
        end = noisy_end
    if window is None:
        begin = start * 0
        full = begin
        full_end = noisy_begin // BLOCK_K * BLOCK_K
    else:
        begin = tl.maximum(start - window + 1, 0)
        full = begin + tl.cdiv(tl.maximum(last - window + 1 - begin, 0), BLOCK_K) * BLOCK_K
        full_end = full + tl.maximum(noisy_begin - full, 0) // BLOCK_K * BLOCK_K
        noisy_begin = tl.maximum(noisy_begin, begin)
    return begin, full, full_end, end, noisy_begin, noisy_end


@triton.jit
def query_spans(
    key, L, block, window, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr, NOISY: tl.constexpr, TOKEN: tl.constexpr,
):  # fmt: skip
    """Positions of the queries that see BLOCK_K keys from `key`: begin, full, end.

    Without a window every query from `full` on sees every clean key.
    """
    last = tl.minimum(key + BLOCK_K, L) - 1
    low, high = block_of(key, L, block)
    _, last_high = block_of(last, L, block)
    end = L
    if NOISY:
        begin = low
        end = last_high
    elif not PACKED:
        begin = high
    elif TOKEN:
        begin = key
    else:
        begin = low
    if window is not None:
        end = tl.minimum(end, last + window)
    return begin, begin + tl.cdiv(last_high - begin, ROWS) * ROWS, end


@triton.jit
def clean_end(o_t, m_noisy, L, block, TOKEN: tl.constexpr):
    """The end of the clean keys that each query sees."""
    low, high = block_of(o_t, L, block)
    return tl.where(m_noisy, low, o_t + 1 if TOKEN else high)


@triton.jit
def noisy_span(o_t, m_noisy, L, block):
    """The noisy keys that each query sees: first <= key < end; none for clean queries."""
    low, high = block_of(o_t, L, block)
    return low, tl.where(m_noisy, high, 0)


@triton.jit
def visible(o_k, o_t, first, end, window):
    """Whether first <= key < end and key > query - window; first and window may be None."""
    m = o_k < end
    if first is not None:
        m &= o_k >= first
    if window is not None:
        m &= o_k > o_t - window
    return m


@triton.jit
def seen_by(o_k, low, o_t, m_noisy, block, window, NOISY: tl.constexpr, TOKEN: tl.constexpr):
    """`visible`, from the keys' side: `low` are the first positions of their blocks."""
    if NOISY:
        m = (o_t >= low) & (o_t < low + block)
    elif TOKEN:
        m = tl.where(m_noisy, o_t >= low + block, o_t >= o_k)
    else:
        m = o_t - tl.where(m_noisy, block, 0) >= low
    if window is not None:
        m &= o_k > o_t - window
    return m


@triton.jit
def tanh(x):
    """To 1.3 units in the last place near 0, where 1 - 2 / (exp(2 x) + 1) would cancel."""
    y = tl.abs(x)
    z = y * y
    near = -5.70404e-3 * z + 2.063786e-2
    near = near * z - 5.373916e-2
    near = near * z + 1.3331432e-1
    near = near * z - 3.3333281e-1
    near = y + y * (z * near)
    far = 1.0 - 2.0 / (tl.exp2(y * (2 * LOG2E)) + 1.0)
    t = tl.where(y < 0.625, near, far)
    return tl.where(x < 0, -t, t)


@triton.jit
def scored(b_x, o_k, o_t, softcap, slope):
    """Scores of scaled products, all in units of log2; softcap and slope may be None."""
    if softcap is not None:
        b_x = softcap * tanh(b_x * (1.0 / softcap))
    if slope is not None:
        b_x -= slope * tl.abs(o_t - o_k).to(tl.float32)
    return b_x


@triton.jit
def through_cap(b_ds, b_x, softcap):
    """The gradient of scaled products `b_x` from that of their scores."""
    if softcap is not None:
        b_t = tanh(b_x * (1.0 / softcap))
        b_ds *= 1.0 - b_t * b_t
    return b_ds


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
    tl.store(p, rounded(value, ptr.dtype.element_ty), mask=m)
