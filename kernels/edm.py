"""EDM preconditioning: the denoised estimate, the L2 loss in F space, and the Euler step."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels._launch import device_guard
from dblocks.kernels._runs import (
    INTEGERS,
    as_tokens,
    chunk_number,
    chunk_start,
    empty_like_runs,
    load_run,
    load_sigma,
    plan_runs,
    run_normals,
    run_numbers,
    sigma_table,
    store_run,
)

# How the coefficients of a linear combination come about.
DENOISE = tl.constexpr(0)  # c_skip and c_out of sigma
EULER = tl.constexpr(1)  # sigma_next / sigma and the rest to 1
GIVEN = tl.constexpr(2)  # two numbers themselves

_SIGMA = ("sigma_stride_n", "sigma_stride_s")
_MIX = (*INTEGERS, *_SIGMA, "next_stride_n", "next_stride_s", "x_stride_n", "x_stride_r")
_LOSS = (
    *INTEGERS, *_SIGMA, "seed", "offset", "f_stride_n", "f_stride_r", "y_stride_n", "y_stride_r",
    "weight_stride_n", "weight_stride_r",
)  # fmt: skip


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


@triton.jit(do_not_specialize=[*_MIX, "w_stride_n", "w_stride_r"])
def mix_fwd_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    sigma_ptr,
    next_ptr,
    first,
    second,
    x_stride_n: tl.int64,
    x_stride_r: tl.int64,
    w_stride_n: tl.int64,
    w_stride_r: tl.int64,
    sigma_stride_n: tl.int64,
    sigma_stride_s: tl.int64,
    next_stride_n: tl.int64,
    next_stride_s: tl.int64,
    U: tl.int64,
    R: tl.int64,
    L: tl.int64,
    segment: tl.int64,
    chunks: tl.int32,
    BLOCK_U: tl.constexpr,
    BLOCK_L: tl.constexpr,
    VEC: tl.constexpr,
    ONE_RUN: tl.constexpr,
    KIND: tl.constexpr,
):
    o_u, o_n, o_r = run_numbers(chunks, R, BLOCK_U, ONE_RUN)
    m_u = o_u < U
    b_s = load_level(
        sigma_ptr, first, sigma_stride_n, sigma_stride_s, o_n, o_r, segment, m_u, ONE_RUN
    )
    b_next = load_level(
        next_ptr, second, next_stride_n, next_stride_s, o_n, o_r, segment, m_u, ONE_RUN
    )
    a, b = coefficients(b_s, b_next, KIND)
    o_l = chunk_start(chunks, BLOCK_L) + tl.arange(0, BLOCK_L)[None, :]
    m_l = m_u[:, None] & (o_l < L * VEC)
    o_x = (o_n * x_stride_n + o_r * x_stride_r) * VEC
    o_w = (o_n * w_stride_n + o_r * w_stride_r) * VEC
    b_x = tl.cast(tl.load(x_ptr + o_x[:, None] + o_l, mask=m_l, other=0.0), tl.float32)
    b_w = tl.cast(tl.load(w_ptr + o_w[:, None] + o_l, mask=m_l, other=0.0), tl.float32)
    b_out = a[:, None] * b_x + b[:, None] * b_w
    tl.store(out_ptr + (o_u * (L * VEC))[:, None] + o_l, b_out, mask=m_l)


@triton.jit(do_not_specialize=[*_MIX])
def mix_bwd_kernel(
    g_ptr,
    dx_ptr,
    dw_ptr,
    sigma_ptr,
    next_ptr,
    first,
    second,
    x_stride_n: tl.int64,
    x_stride_r: tl.int64,
    sigma_stride_n: tl.int64,
    sigma_stride_s: tl.int64,
    next_stride_n: tl.int64,
    next_stride_s: tl.int64,
    U: tl.int64,
    R: tl.int64,
    L: tl.int64,
    segment: tl.int64,
    chunks: tl.int32,
    BLOCK_U: tl.constexpr,
    BLOCK_L: tl.constexpr,
    VEC: tl.constexpr,
    ONE_RUN: tl.constexpr,
    KIND: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_DW: tl.constexpr,
):
    o_u, o_n, o_r = run_numbers(chunks, R, BLOCK_U, ONE_RUN)
    m_u = o_u < U
    b_s = load_level(
        sigma_ptr, first, sigma_stride_n, sigma_stride_s, o_n, o_r, segment, m_u, ONE_RUN
    )
    b_next = load_level(
        next_ptr, second, next_stride_n, next_stride_s, o_n, o_r, segment, m_u, ONE_RUN
    )
    a, b = coefficients(b_s, b_next, KIND)
    o_l = chunk_start(chunks, BLOCK_L) + tl.arange(0, BLOCK_L)[None, :]
    m_l = m_u[:, None] & (o_l < L * VEC)
    o_g = (o_n * x_stride_n + o_r * x_stride_r) * VEC
    b_g = tl.cast(tl.load(g_ptr + o_g[:, None] + o_l, mask=m_l, other=0.0), tl.float32)
    o_d = (o_u * (L * VEC))[:, None] + o_l
    if HAS_DX:
        tl.store(dx_ptr + o_d, a[:, None] * b_g, mask=m_l)
    if HAS_DW:
        tl.store(dw_ptr + o_d, b[:, None] * b_g, mask=m_l)


@triton.jit(do_not_specialize=[*_LOSS])
def edm_loss_kernel(
    f_ptr,
    y_ptr,
    sigma_ptr,
    seed_ptr,
    weight_ptr,
    partial_ptr,
    rest_ptr,
    seed: tl.int64,
    offset: tl.int64,
    sigma_data,
    inverse_count,
    f_stride_n: tl.int64,
    f_stride_r: tl.int64,
    y_stride_n: tl.int64,
    y_stride_r: tl.int64,
    weight_stride_n: tl.int64,
    weight_stride_r: tl.int64,
    sigma_stride_n: tl.int64,
    sigma_stride_s: tl.int64,
    U: tl.int64,
    R: tl.int64,
    L: tl.int64,
    segment: tl.int64,
    chunks: tl.int32,
    BLOCK_U: tl.constexpr,
    BLOCK_L: tl.constexpr,
    VEC: tl.constexpr,
    ONE_RUN: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
):
    o_u, o_n, o_r = run_numbers(chunks, R, BLOCK_U, ONE_RUN)
    L = L * VEC
    m_u = o_u < U
    b_s = load_sigma(sigma_ptr, sigma_stride_n, sigma_stride_s, o_n, o_r, segment, m_u, ONE_RUN)
    of_y, of_eps = target_factors(b_s, sigma_data)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    start = chunk_start(chunks, BLOCK_L)
    WIDE: tl.constexpr = ALIGNED and f_ptr.dtype.element_ty.primitive_bitwidth == 16
    o_f = (o_n * f_stride_n + o_r * f_stride_r) * VEC
    o_y = (o_n * y_stride_n + o_r * y_stride_r) * VEC
    PART: tl.constexpr = BLOCK_L // PARTS
    b_sum = tl.zeros([BLOCK_U, PART], tl.float32)
    for i in tl.static_range(PARTS):
        b_eps, o_l = run_normals(seed, offset, o_u, start + i * PART, L, PART, ALIGNED, WIDE)
        m_l = m_u[:, None] & (o_l >= 0) & (o_l < L)
        b_f = load_run(f_ptr, o_f[:, None] + o_l, m_l, EVEN)
        b_y = load_run(y_ptr, o_y[:, None] + o_l, m_l, EVEN)
        b_rest = tl.fma(b_eps, of_eps[:, None], tl.fma(b_y, -of_y[:, None], b_f))
        if rest_ptr is not None:
            store_run(rest_ptr, (o_u * L)[:, None] + o_l, m_l, b_rest, EVEN)
        if not EVEN:
            b_rest = tl.where(m_l, b_rest, 0.0)
        b_sum = tl.fma(b_rest, b_rest, b_sum)
    partial = tl.sum(b_sum, 1) * tl.cast(inverse_count, tl.float32)
    partial *= load_weight(weight_ptr, weight_stride_n, weight_stride_r, o_n, o_r, m_u)
    tl.store(partial_ptr + o_u * chunks + chunk_number(chunks), partial, mask=m_u)


@triton.jit(do_not_specialize=[*INTEGERS, "grad_stride", "weight_stride_n", "weight_stride_r"])
def edm_loss_bwd_kernel(
    rest_ptr,
    weight_ptr,
    grad_ptr,
    df_ptr,
    factor,
    grad_stride: tl.int64,
    weight_stride_n: tl.int64,
    weight_stride_r: tl.int64,
    U: tl.int64,
    R: tl.int64,
    L: tl.int64,
    segment: tl.int64,
    chunks: tl.int32,
    BLOCK_U: tl.constexpr,
    BLOCK_L: tl.constexpr,
    VEC: tl.constexpr,
    ONE_RUN: tl.constexpr,
):
    o_u, o_n, o_r = run_numbers(chunks, R, BLOCK_U, ONE_RUN)
    m_u = o_u < U
    b_g = tl.cast(tl.load(grad_ptr + o_n * grad_stride, mask=m_u, other=0.0), tl.float32)
    b_g *= load_weight(weight_ptr, weight_stride_n, weight_stride_r, o_n, o_r, m_u)
    b_g *= tl.cast(factor, tl.float32)
    o_l = chunk_start(chunks, BLOCK_L) + tl.arange(0, BLOCK_L)[None, :]
    m_l = m_u[:, None] & (o_l < L * VEC)
    o_d = (o_u * (L * VEC))[:, None] + o_l
    b_rest = load_run(rest_ptr, o_d, m_l, False)
    tl.store(df_ptr + o_d, b_rest * b_g[:, None], mask=m_l)


def _tables(sigmas: list[Tensor | None], N: int) -> tuple[list[Tensor | None], int]:
    """Tables [N, S] of the given sigmas, and their S."""
    tables = [None if s is None else sigma_table(s, N) for s in sigmas]
    S = max((t.shape[1] for t in tables if t is not None), default=1)
    return [None if t is None else t.expand(N, S) for t in tables], S


def _mix(
    z: Tensor, f: Tensor, sigmas: list[Tensor | None], first: float, second: float, kind
) -> Tensor:
    """a z + b f in float32; `kind` says what a and b are made of.

    That is two tensors or, where one is absent, the number in its place.
    """
    x, w = as_tokens(z), as_tokens(f)
    (sigma, after), S = _tables(sigmas, z.shape[0])
    runs = plan_runs([x, w], S)
    out = empty_like_runs(z, torch.float32)
    with device_guard(z):
        mix_fwd_kernel[runs.grid](
            x, w, out, sigma, after, first, second, *runs.strides(x), *runs.strides(w),
            *(sigma.stride() if sigma is not None else (0, 0)),
            *(after.stride() if after is not None else (0, 0)),
            *runs.sizes, **runs.blocks, KIND=kind.value,
        )  # fmt: skip
    return out


def _mix_bwd(
    grad: Tensor, sigmas: list[Tensor | None], first: float, second: float, kind,
    z_dtype: torch.dtype | None, f_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients to z and f, empty where no dtype is given."""
    g = as_tokens(grad)
    (sigma, after), S = _tables(sigmas, grad.shape[0])
    runs = plan_runs([g], S)
    dz, df = (
        empty_like_runs(grad, dtype) if dtype is not None else grad.new_empty(0)
        for dtype in (z_dtype, f_dtype)
    )
    with device_guard(grad):
        mix_bwd_kernel[runs.grid](
            g, dz, df, sigma, after, first, second, *runs.strides(g),
            *(sigma.stride() if sigma is not None else (0, 0)),
            *(after.stride() if after is not None else (0, 0)),
            *runs.sizes, **runs.blocks, KIND=kind.value,
            HAS_DX=z_dtype is not None, HAS_DW=f_dtype is not None,
        )  # fmt: skip
    return dz, df


def edm_denoise_fwd(f: Tensor, z: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """c_skip z + c_out f of non-empty tensors."""
    return _mix(z, f, [sigma, None], 1.0, sigma_data, DENOISE)


def edm_denoise_bwd(
    grad: Tensor, sigma: Tensor, sigma_data: float,
    f_dtype: torch.dtype | None, z_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients to f and z, empty where no dtype is given."""
    dz, df = _mix_bwd(grad, [sigma, None], 1.0, sigma_data, DENOISE, z_dtype, f_dtype)
    return df, dz


def _euler(sigmas: list[Tensor | None], values: list[float]):
    """Tensors, numbers and kind for `_mix`: two numbers are divided here, in double."""
    s, after = values
    if sigmas == [None, None]:
        return sigmas, after / s, (s - after) / s, GIVEN
    return sigmas, s, after, EULER


def euler_step_fwd(
    z: Tensor, denoised: Tensor, sigmas: list[Tensor | None], values: list[float]
) -> Tensor:
    """a z + (1 - a) denoised of non-empty tensors; an absent sigma is the value beside it."""
    return _mix(z, denoised, *_euler(sigmas, values))


def euler_step_bwd(
    grad: Tensor, sigmas: list[Tensor | None], values: list[float],
    z_dtype: torch.dtype | None, denoised_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients to z and denoised, empty where no dtype is given."""
    return _mix_bwd(grad, *_euler(sigmas, values), z_dtype, denoised_dtype)


def _weight_strides(row_weight: Tensor | None) -> tuple[int, int]:
    """Distances between samples and between runs of weights [N] or [N, T]."""
    if row_weight is None:
        return 0, 0
    return row_weight.stride(0), row_weight.stride(1) if row_weight.ndim == 2 else 0


def edm_loss_fwd(
    f: Tensor, y: Tensor, sigma: Tensor, seed_tensor: Tensor | None, seed: int, offset: int,
    sigma_data: float, row_weight: Tensor | None, rest: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss [N] of non-empty tensors: partial sums, then their sum in a fixed order.

    f - target is written to `rest`, a contiguous tensor of the shape of `f`, where there is one.
    """
    N = y.shape[0]
    x, x_f, sigma = as_tokens(y), as_tokens(f), sigma_table(sigma, N)
    by_token = row_weight is not None and row_weight.ndim == 2
    runs = plan_runs([x_f, x], sigma.shape[1], by_token=by_token, offset=offset)
    partial = torch.empty((N, runs.R * runs.chunks), dtype=torch.float32, device=y.device)
    with device_guard(y):
        edm_loss_kernel[runs.grid](
            x_f, x, sigma, seed_tensor, row_weight, partial, rest, seed, offset, sigma_data,
            N / y.numel(), *runs.strides(x_f), *runs.strides(x), *_weight_strides(row_weight),
            *sigma.stride(), *runs.sizes, **runs.blocks, **runs.noise(offset),
        )  # fmt: skip
    return partial.sum(1) if partial.shape[1] > 1 else partial.view(-1)


def edm_loss_bwd(
    grad: Tensor, rest: Tensor, row_weight: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The gradient to f from that of the loss [N] and from f - target."""
    x = as_tokens(rest)
    runs = plan_runs([x], 1, by_token=row_weight is not None and row_weight.ndim == 2)
    df = empty_like_runs(rest, dtype)
    with device_guard(rest):
        edm_loss_bwd_kernel[runs.grid](
            x, row_weight, grad, df, 2.0 * len(rest) / rest.numel(), grad.stride(0),
            *_weight_strides(row_weight), *runs.sizes, **runs.blocks,
        )  # fmt: skip
    return df
