"""Device functions that the kernels over rows [N, T, D] share.

A tile is BLOCK_R rows, and a row PARTS tensors [BLOCK_R, W] of equal width in a tuple, since the
shapes of Triton's tensors are powers of two and the width of a model need not be one. A thread
holds the same columns of every part, so a sum over a row adds the parts first and reduces once.
"""

# ruff: noqa: RUF005  (Triton has no unpacking in tuples)

import triton
import triton.language as tl


@triton.jit
def token_of(i_g, o_l, T, S, L, PER_TOKEN: tl.constexpr):
    """Sample and token [BLOCK_R] of the rows `o_l` of group `i_g`.

    A group is one segment: the L = T/S rows that share a row of the modulation. With a modulation
    per token nothing is shared, and the only group is all N*T rows.
    """
    # Samples follow one another in the only group, so a row's sample takes a division.
    if PER_TOKEN:
        i_n = o_l // T
        return i_n, o_l - i_n * T
    else:
        i_n = i_g // S
        return i_n + tl.zeros_like(o_l), (i_g - i_n * S) * L + o_l


@triton.jit
def offset_of(i_n, i_t, stride_n, stride_t, STEP: tl.constexpr):
    """Where the rows (i_n, i_t) begin, int64; strides count STEP elements."""
    return (tl.cast(i_n, tl.int64) * stride_n + tl.cast(i_t, tl.int64) * stride_t) * STEP


@triton.jit
def rows_of(first, end, BLOCK_R: tl.constexpr):
    """Numbers of the rows of a tile within their group, and which of them there are."""
    o_l = first + tl.arange(0, BLOCK_R)
    return o_l, o_l < end


@triton.jit
def mask_of(m_l, o_d, D, k: tl.constexpr, PARTS: tl.constexpr, FULL: tl.constexpr):
    """Which elements of part `k` there are; only the last part may lack columns."""
    if FULL or k < PARTS - 1:
        return m_l[:, None] & tl.full([1, o_d.shape[0]], True, tl.int1)
    else:
        return m_l[:, None] & (o_d + k * o_d.shape[0] < D)[None, :]


@triton.jit
def load_raw(ptr, o_r, m_l, o_d, D, PARTS: tl.constexpr, FULL: tl.constexpr):
    """The rows that begin at `o_r` [BLOCK_R] as they are stored, 0 outside and where `ptr` is None.

    In 16 bits they take half the registers, so they are widened where they are used.
    """
    parts = ()
    for k in tl.static_range(PARTS):
        # An absent tensor is one element that spreads: it takes no registers and no loads.
        if ptr is None:
            parts = parts + (tl.full([1, 1], 0, tl.float32),)
        else:
            p = ptr + o_r[:, None] + (o_d + k * o_d.shape[0])[None, :]
            parts = parts + (tl.load(p, mask=mask_of(m_l, o_d, D, k, PARTS, FULL), other=0.0),)
    return parts


@triton.jit
def widen(raw):
    parts = ()
    for k in tl.static_range(len(raw)):
        parts = parts + (raw[k].to(tl.float32),)
    return parts


@triton.jit
def load_parts(
    ptr, o_r, m_l, o_d, D, PARTS: tl.constexpr, FULL: tl.constexpr, DEFAULT: tl.constexpr
):
    """The rows that begin at `o_r` [BLOCK_R] in float32; DEFAULT where `ptr` is None."""
    if ptr is None:
        parts = ()
        for _ in tl.static_range(PARTS):
            parts = parts + (tl.full([1, 1], DEFAULT, tl.float32),)
        return parts
    else:
        return widen(load_raw(ptr, o_r, m_l, o_d, D, PARTS, FULL))


@triton.jit
def load_channels(ptr, o_d, D, PARTS: tl.constexpr, FULL: tl.constexpr, DEFAULT: tl.constexpr):
    """A weight or bias [D] as one row [1, W] a part; DEFAULT where `ptr` is None."""
    # One row, so that channels, modulations and rows of x are loaded by the same code.
    first, m_l = tl.full([1], 0, tl.int64), tl.full([1], True, tl.int1)
    return load_parts(ptr, first, m_l, o_d, D, PARTS, FULL, DEFAULT)


@triton.jit
def load_group(
    ptr, i_g, S, stride_n, stride_s, o_d, D,
    STEP: tl.constexpr, PARTS: tl.constexpr, FULL: tl.constexpr, DEFAULT: tl.constexpr,
):  # fmt: skip
    """The modulation of group `i_g` as one row [1, W] a part; DEFAULT where `ptr` is None."""
    i_n = i_g // S + tl.full([1], 0, tl.int64)
    o_r = offset_of(i_n, i_g - i_n * S, stride_n, stride_s, STEP)
    return load_parts(ptr, o_r, tl.full([1], True, tl.int1), o_d, D, PARTS, FULL, DEFAULT)


@triton.jit
def store_parts(ptr, o_r, m_l, o_d, D, FULL: tl.constexpr, parts):
    """Stores to the rows that begin at `o_r`, rounding to the dtype of `ptr` once."""
    for k in tl.static_range(len(parts)):
        p = ptr + o_r[:, None] + (o_d + k * o_d.shape[0])[None, :]
        m = mask_of(m_l, o_d, D, k, len(parts), FULL)
        tl.store(p, parts[k].to(ptr.dtype.element_ty), mask=m)


@triton.jit
def zeros(PARTS: tl.constexpr, BLOCK_R: tl.constexpr, W: tl.constexpr):
    parts = ()
    for _ in tl.static_range(PARTS):
        parts = parts + (tl.full([BLOCK_R, W], 0, tl.float32),)
    return parts


@triton.jit
def plus(a, b):
    parts = ()
    for k in tl.static_range(len(a)):
        parts = parts + (a[k] + b[k],)
    return parts


@triton.jit
def times(a, b):
    parts = ()
    for k in tl.static_range(len(a)):
        parts = parts + (a[k] * b[k],)
    return parts


@triton.jit
def plus_product(total, a, b):
    parts = ()
    for k in tl.static_range(len(total)):
        parts = parts + (total[k] + a[k] * b[k],)
    return parts


@triton.jit
def plus_one(a):
    parts = ()
    for k in tl.static_range(len(a)):
        parts = parts + (1 + a[k],)
    return parts


@triton.jit
def standardised(x, b_mean, b_rstd, RMS: tl.constexpr):
    """xhat = (x - mean) rstd, or x rstd."""
    parts = ()
    for k in tl.static_range(len(x)):
        b_x = x[k]
        if not RMS:
            b_x -= b_mean[:, None]
        parts = parts + (b_x * b_rstd[:, None],)
    return parts


@triton.jit
def sum_both(b_0, b_1):
    """The sums over the rows of two tensors, in one reduction: one exchange between warps."""
    return tl.split(tl.sum(tl.join(b_0, b_1), axis=1))
