"""edm_loss: the weighted L2 loss of F against its target, and its gradient.

The noise of the target is drawn again from its seed, tile by tile, and never stored. Each program
leaves one partial sum a run, which the caller adds in a fixed order: no atomics. For the gradient
the forward may write f - target, so that the backward need not draw the noise a second time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels._common.launches import Launch, Plan
from dblocks.kernels._common.runs import (
    INTEGERS,
    as_tokens,
    chunk_number,
    chunk_start,
    copies,
    load_run,
    load_sigma,
    plan_runs,
    run_normals,
    run_numbers,
    sigma_table,
    store_run,
)

_WEIGHT = ("weight_sn", "weight_sr")
_INTEGERS = (
    *INTEGERS, *_WEIGHT, "sigma_sn", "sigma_ss", "seed", "offset", "f_sn", "f_sr", "y_sn", "y_sr",
)  # fmt: skip
_INTEGERS_BWD = (*INTEGERS, *_WEIGHT, "grad_sn")


@triton.jit
def target_factors(b_s, sigma_data):
    """Factors of y and eps in the target c_in ((sigma / sigma_data) y - sigma_data eps)."""
    sd = tl.cast(sigma_data, tl.float32)
    c_in = 1.0 / tl.sqrt(b_s * b_s + sd * sd)
    return b_s / sd * c_in, sd * c_in


@triton.jit
def load_weight(weight_ptr, stride_n, stride_r, o_n, o_r, m_u):
    """The weight of each run in float32, 1 without weights."""
    if weight_ptr is None:
        return tl.where(m_u, 1.0, 0.0)
    else:
        o_w = o_n * stride_n + o_r * stride_r
        return tl.cast(tl.load(weight_ptr + o_w, mask=m_u, other=0.0), tl.float32)


@triton.jit(do_not_specialize=_INTEGERS)
def edm_loss_kernel(
    f_ptr, y_ptr, sigma_ptr, seed_ptr, weight_ptr, partial_ptr, rest_ptr,
    seed: tl.int64, offset: tl.int64, sigma_data, inverse_count,
    f_sn: tl.int64, f_sr: tl.int64, y_sn: tl.int64, y_sr: tl.int64,
    weight_sn: tl.int64, weight_sr: tl.int64, sigma_sn: tl.int64, sigma_ss: tl.int64,
    U: tl.int64, R: tl.int64, L: tl.int64, segment: tl.int64, chunks: tl.int32,
    BLOCK_U: tl.constexpr, BLOCK_L: tl.constexpr, VEC: tl.constexpr, ONE_RUN: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    o_u, o_n, o_r = run_numbers(chunks, R, BLOCK_U, ONE_RUN)
    L = L * VEC
    m_u = o_u < U
    b_s = load_sigma(sigma_ptr, sigma_sn, sigma_ss, o_n, o_r, segment, m_u, ONE_RUN)
    of_y, of_eps = target_factors(b_s, sigma_data)
    # A seed in memory may change between the launches of a captured graph; a number could not.
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    start = chunk_start(chunks, BLOCK_L)
    WIDE: tl.constexpr = ALIGNED and f_ptr.dtype.element_ty.primitive_bitwidth == 16
    o_f = (o_n * f_sn + o_r * f_sr) * VEC
    o_y = (o_n * y_sn + o_r * y_sr) * VEC
    PART: tl.constexpr = BLOCK_L // PARTS
    b_sum = tl.zeros([BLOCK_U, PART], tl.float32)
    # A part at a time, as in noise_inject: the noise of a whole tile would fill the registers.
    for i in tl.static_range(PARTS):
        b_eps, o_l = run_normals(seed, offset, o_u, start + i * PART, L, PART, ALIGNED, WIDE)
        m_l = m_u[:, None] & (o_l >= 0) & (o_l < L)
        b_f = load_run(f_ptr, o_f[:, None] + o_l, m_l, EVEN)
        b_y = load_run(y_ptr, o_y[:, None] + o_l, m_l, EVEN)
        b_rest = tl.fma(b_eps, of_eps[:, None], tl.fma(b_y, -of_y[:, None], b_f))
        if rest_ptr is not None:
            store_run(rest_ptr, (o_u * L)[:, None] + o_l, m_l, b_rest, EVEN)
        # Outside of its run a lane holds noise all the same, which must not count.
        if not EVEN:
            b_rest = tl.where(m_l, b_rest, 0.0)
        b_sum = tl.fma(b_rest, b_rest, b_sum)
    # A share of the mean, so that the caller has only a sum to make.
    partial = tl.sum(b_sum, 1) * tl.cast(inverse_count, tl.float32)
    partial *= load_weight(weight_ptr, weight_sn, weight_sr, o_n, o_r, m_u)
    tl.store(partial_ptr + o_u * chunks + chunk_number(chunks), partial, mask=m_u)


@triton.jit(do_not_specialize=_INTEGERS_BWD)
def edm_loss_bwd_kernel(
    rest_ptr, weight_ptr, grad_ptr, df_ptr,
    factor, grad_sn: tl.int64, weight_sn: tl.int64, weight_sr: tl.int64,
    U: tl.int64, R: tl.int64, L: tl.int64, segment: tl.int64, chunks: tl.int32,
    BLOCK_U: tl.constexpr, BLOCK_L: tl.constexpr, VEC: tl.constexpr, ONE_RUN: tl.constexpr,
):  # fmt: skip
    o_u, o_n, o_r = run_numbers(chunks, R, BLOCK_U, ONE_RUN)
    m_u = o_u < U
    b_g = tl.cast(tl.load(grad_ptr + o_n * grad_sn, mask=m_u, other=0.0), tl.float32)
    b_g *= load_weight(weight_ptr, weight_sn, weight_sr, o_n, o_r, m_u)
    b_g *= tl.cast(factor, tl.float32)
    o_l = chunk_start(chunks, BLOCK_L) + tl.arange(0, BLOCK_L)[None, :]
    m_l = m_u[:, None] & (o_l < L * VEC)
    o_d = (o_u * (L * VEC))[:, None] + o_l
    b_rest = load_run(rest_ptr, o_d, m_l, False)
    tl.store(df_ptr + o_d, b_rest * b_g[:, None], mask=m_l)


def _weight_strides(row_weight: Tensor | None) -> tuple[int, int]:
    """Distances between samples and between runs of weights [N] or [N, T]."""
    if row_weight is None:
        return 0, 0
    return row_weight.stride(0), row_weight.stride(1) if row_weight.ndim == 2 else 0


def _by_token(row_weight: Tensor | None) -> bool:
    return row_weight is not None and row_weight.ndim == 2


def edm_loss_fwd(
    f: Tensor, y: Tensor, sigma: Tensor, seed_tensor: Tensor | None, seed: int, offset: int,
    sigma_data: float, row_weight: Tensor | None, need_rest: bool,
) -> Plan:  # fmt: skip
    """The loss [N] and f - target, which has no elements where it is not needed.

    The loss is made of partial sums, which are added in a fixed order.
    """
    N = len(y)

    def launch(offset: int) -> tuple[Launch, tuple[int, int]]:
        x, x_f, table = as_tokens(y), as_tokens(f), sigma_table(sigma, N)
        runs = plan_runs([x_f, x], table.shape[1], by_token=_by_token(row_weight), offset=offset)
        numbers = (
            N / y.numel(), *runs.strides(x_f), *runs.strides(x), *_weight_strides(row_weight),
            *table.stride(),
        )  # fmt: skip
        partial = (N, runs.R * runs.chunks)
        return runs.launch(edm_loss_kernel, *numbers, constants=runs.noise(offset)), partial

    # By whether the noise starts on a quad.
    launches = [launch(1), launch(0)] if y.numel() else []
    # The range of float16 is too small for f - target.
    rest_dtype = torch.bfloat16 if f.dtype == torch.bfloat16 else torch.float32

    def run(f, y, sigma, seed_tensor, seed, offset, sigma_data, row_weight, need_rest):
        rest = f.new_empty(f.shape if need_rest else 0, dtype=rest_dtype)
        if not launches:
            return y.new_zeros(N, dtype=torch.float32), rest
        launch, size = launches[offset % 4 == 0]
        partial = y.new_empty(size, dtype=torch.float32)
        launch.start(
            f, y, sigma, seed_tensor, row_weight, partial, rest if need_rest else None,
            seed, offset, sigma_data, *launch.numbers,
        )  # fmt: skip
        return partial.sum(1) if size[1] > 1 else partial.view(-1), rest

    return copies(f, y), run


def edm_loss_bwd(grad: Tensor, rest: Tensor, row_weight: Tensor | None, dtype: torch.dtype) -> Plan:
    """The gradient to f from that of the loss [N] and from f - target."""
    launch = None
    if rest.numel():
        runs = plan_runs([as_tokens(rest)], 1, by_token=_by_token(row_weight))
        factor, strides = 2.0 * len(rest) / rest.numel(), _weight_strides(row_weight)
        launch = runs.launch(edm_loss_bwd_kernel, factor, grad.stride(0), *strides)

    def run(grad, rest, row_weight, dtype):
        df = rest.new_empty(rest.shape, dtype=dtype)
        if launch is not None:
            launch.start(rest, row_weight, grad, df, *launch.numbers)
        return df

    return [], run
