"""A linear combination of two tensors whose factors follow from noise levels.

edm_denoise and euler_step are both of this form. The factors are the same for a whole run, so a
program computes them once for each of its runs, and an element costs a multiply-add.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels._common.launches import Launch
from dblocks.kernels._common.runs import (
    INTEGERS,
    Runs,
    as_tokens,
    chunk_start,
    load_sigma,
    plan_runs,
    run_numbers,
    sigma_table,
)

# How the factors come about.
DENOISE = tl.constexpr(0)  # c_skip and c_out of sigma
EULER = tl.constexpr(1)  # sigma_next / sigma and the rest to 1
GIVEN = tl.constexpr(2)  # two numbers themselves

_INTEGERS_BWD = (*INTEGERS, "sigma_sn", "sigma_ss", "next_sn", "next_ss", "x_sn", "x_sr")
_INTEGERS = (*_INTEGERS_BWD, "w_sn", "w_sr")


@triton.jit
def load_level(sigma_ptr, value, stride_n, stride_s, o_n, o_r, segment, m_u, ONE_RUN: tl.constexpr):
    """A noise level of each run in float32: of its table or, without one, the number."""
    if sigma_ptr is None:
        return tl.where(m_u, tl.cast(value, tl.float32), 1.0)
    else:
        return load_sigma(sigma_ptr, stride_n, stride_s, o_n, o_r, segment, m_u, ONE_RUN)


@triton.jit
def coefficients(b_s, b_next, KIND: tl.constexpr):
    """The factors [BLOCK_U] of the two tensors of a combination, of sigma and what is beside it."""
    if KIND == DENOISE:
        total = b_s * b_s + b_next * b_next
        return b_next * b_next / total, b_s * b_next / tl.sqrt(total)
    elif KIND == EULER:
        # Fast quotients may miss 1 by a rounding, and sigma_next = 0 must give exactly 0 and 1.
        return b_next / b_s, tl.where(b_next == 0.0, 1.0, (b_s - b_next) / b_s)
    else:
        return b_s, b_next


@triton.jit(do_not_specialize=_INTEGERS)
def mix_fwd_kernel(
    x_ptr, w_ptr, out_ptr, sigma_ptr, next_ptr,
    first, second,
    x_sn: tl.int64, x_sr: tl.int64, w_sn: tl.int64, w_sr: tl.int64,
    sigma_sn: tl.int64, sigma_ss: tl.int64, next_sn: tl.int64, next_ss: tl.int64,
    U: tl.int64, R: tl.int64, L: tl.int64, segment: tl.int64, chunks: tl.int32,
    BLOCK_U: tl.constexpr, BLOCK_L: tl.constexpr, VEC: tl.constexpr, ONE_RUN: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    o_u, o_n, o_r = run_numbers(chunks, R, BLOCK_U, ONE_RUN)
    m_u = o_u < U
    b_s = load_level(sigma_ptr, first, sigma_sn, sigma_ss, o_n, o_r, segment, m_u, ONE_RUN)
    b_next = load_level(next_ptr, second, next_sn, next_ss, o_n, o_r, segment, m_u, ONE_RUN)
    a, b = coefficients(b_s, b_next, KIND)
    # VEC elements are a step: multiples of it tell the compiler that accesses are 16 bytes wide.
    o_l = chunk_start(chunks, BLOCK_L) + tl.arange(0, BLOCK_L)[None, :]
    m_l = m_u[:, None] & (o_l < L * VEC)
    o_x = (o_n * x_sn + o_r * x_sr) * VEC
    o_w = (o_n * w_sn + o_r * w_sr) * VEC
    b_x = tl.cast(tl.load(x_ptr + o_x[:, None] + o_l, mask=m_l, other=0.0), tl.float32)
    b_w = tl.cast(tl.load(w_ptr + o_w[:, None] + o_l, mask=m_l, other=0.0), tl.float32)
    b_out = a[:, None] * b_x + b[:, None] * b_w
    tl.store(out_ptr + (o_u * (L * VEC))[:, None] + o_l, b_out, mask=m_l)


@triton.jit(do_not_specialize=_INTEGERS_BWD)
def mix_bwd_kernel(
    g_ptr, dx_ptr, dw_ptr, sigma_ptr, next_ptr,
    first, second,
    x_sn: tl.int64, x_sr: tl.int64,
    sigma_sn: tl.int64, sigma_ss: tl.int64, next_sn: tl.int64, next_ss: tl.int64,
    U: tl.int64, R: tl.int64, L: tl.int64, segment: tl.int64, chunks: tl.int32,
    BLOCK_U: tl.constexpr, BLOCK_L: tl.constexpr, VEC: tl.constexpr, ONE_RUN: tl.constexpr,
    KIND: tl.constexpr, HAS_DX: tl.constexpr, HAS_DW: tl.constexpr,
):  # fmt: skip
    o_u, o_n, o_r = run_numbers(chunks, R, BLOCK_U, ONE_RUN)
    m_u = o_u < U
    b_s = load_level(sigma_ptr, first, sigma_sn, sigma_ss, o_n, o_r, segment, m_u, ONE_RUN)
    b_next = load_level(next_ptr, second, next_sn, next_ss, o_n, o_r, segment, m_u, ONE_RUN)
    a, b = coefficients(b_s, b_next, KIND)
    o_l = chunk_start(chunks, BLOCK_L) + tl.arange(0, BLOCK_L)[None, :]
    m_l = m_u[:, None] & (o_l < L * VEC)
    o_g = (o_n * x_sn + o_r * x_sr) * VEC
    b_g = tl.cast(tl.load(g_ptr + o_g[:, None] + o_l, mask=m_l, other=0.0), tl.float32)
    o_d = (o_u * (L * VEC))[:, None] + o_l
    if HAS_DX:
        tl.store(dx_ptr + o_d, a[:, None] * b_g, mask=m_l)
    if HAS_DW:
        tl.store(dw_ptr + o_d, b[:, None] * b_g, mask=m_l)


def _runs(tensors: list[Tensor], sigmas: Sequence[Tensor | None]) -> tuple[Runs, list[int]]:
    """The runs of tensors under tables of sigma, and all strides."""
    N = len(tensors[0])
    tables = [None if s is None else sigma_table(s, N) for s in sigmas]
    S = max((t.shape[1] for t in tables if t is not None), default=1)
    runs = plan_runs(tensors, S)
    strides = [step for x in tensors for step in runs.strides(x)]
    for table in tables:
        strides += (0, 0) if table is None else table.expand(N, S).stride()
    return runs, strides


def mix(z: Tensor, f: Tensor, sigmas: Sequence[Tensor | None], kind) -> Launch | None:
    """a z + b f in float32; `kind` says what a and b are made of. None if there are no elements.

    That is two tensors or, where one is absent, a number in its place. Arguments of a launch are
    z, f, the result, both tensors and both numbers.
    """
    if z.numel() == 0:
        return None
    runs, strides = _runs([as_tokens(z), as_tokens(f)], sigmas)
    return runs.launch(mix_fwd_kernel, *strides, constants=(kind.value,))


def mix_bwd(
    grad: Tensor, sigmas: Sequence[Tensor | None], kind, has_dz: bool, has_df: bool
) -> Launch | None:
    """The gradients to z and f. Arguments are grad, dz, df, both tensors and both numbers."""
    if grad.numel() == 0:
        return None
    runs, strides = _runs([as_tokens(grad)], sigmas)
    return runs.launch(mix_bwd_kernel, *strides, constants=(kind.value, has_dz, has_df))
