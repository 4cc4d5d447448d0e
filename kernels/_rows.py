"""Device functions that the kernels over rows [N, T, D] share."""

import triton
import triton.language as tl


@triton.jit
def token_of(i_g, o_l, T, S, L, PER_TOKEN: tl.constexpr):
    """Sample and token [BLOCK_R] of the rows `o_l` of group `i_g`.

    A group is one segment: the L = T/S rows that share a row of the modulation. With a modulation
    per token nothing is shared, and the only group is all N*T rows.
    """
    if PER_TOKEN:
        i_n = o_l // T
        return i_n, o_l - i_n * T
    else:
        i_n = i_g // S
        return i_n + tl.zeros_like(o_l), (i_g - i_n * S) * L + o_l


@triton.jit
def load_rows(ptr, i_n, i_t, stride_n, stride_t, o_d, m):
    """The rows (i_n, i_t) in float32 [BLOCK_R, BLOCK_D], zero outside of the mask."""
    o_r = tl.cast(i_n, tl.int64) * stride_n + tl.cast(i_t, tl.int64) * stride_t
    return tl.load(ptr + o_r[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def load_group(ptr, i_g, S, stride_n, stride_s, o_d, m_d, DEFAULT: tl.constexpr):
    """The modulation of group `i_g` in float32 [1, BLOCK_D]; DEFAULT where there is none."""
    if ptr is None:
        return tl.full([1, 1], DEFAULT, tl.float32)
    else:
        i_n = i_g // S
        o_r = tl.cast(i_n, tl.int64) * stride_n + tl.cast(i_g - i_n * S, tl.int64) * stride_s
        return tl.load(ptr + o_r + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_tokens(ptr, i_n, i_t, stride_n, stride_t, o_d, m, DEFAULT: tl.constexpr):
    """A modulation per token in float32 [BLOCK_R, BLOCK_D]; DEFAULT where there is none."""
    if ptr is None:
        return tl.full([1, 1], DEFAULT, tl.float32)
    else:
        return load_rows(ptr, i_n, i_t, stride_n, stride_t, o_d, m)


@triton.jit
def load_channels(ptr, o_d, m_d, DEFAULT: tl.constexpr):
    """A weight or bias [D] in float32 [1, BLOCK_D]; DEFAULT where there is none."""
    if ptr is None:
        return tl.full([1, 1], DEFAULT, tl.float32)
    else:
        return tl.load(ptr + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_rows(ptr, row, D, o_d, m, value):
    """Stores to the rows `row` of a contiguous output, rounding to its dtype once."""
    p = ptr + tl.cast(row, tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p, value.to(ptr.dtype.element_ty), mask=m)
