"""Noise injection: z = y + sigma eps and c_in z in one pass, and its backward.

The noise is a function of an element's number, so it is drawn where it is used and never stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels._common.launches import Launch, Plan
from dblocks.kernels._common.runs import (
    INTEGERS,
    as_tokens,
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

_SIGMA = ("sigma_sn", "sigma_ss")
_INTEGERS = (*INTEGERS, *_SIGMA, "seed", "offset", "y_sn", "y_sr")
_INTEGERS_BWD = (*INTEGERS, *_SIGMA, "dz_sn", "dz_sr", "dz_in_sn", "dz_in_sr")


@triton.jit(do_not_specialize=_INTEGERS)
def noise_inject_fwd_kernel(
    y_ptr, sigma_ptr, z_ptr, z_in_ptr, seed_ptr,
    seed: tl.int64, offset: tl.int64, sigma_data,
    y_sn: tl.int64, y_sr: tl.int64, sigma_sn: tl.int64, sigma_ss: tl.int64,
    U: tl.int64, R: tl.int64, L: tl.int64, segment: tl.int64, chunks: tl.int32,
    BLOCK_U: tl.constexpr, BLOCK_L: tl.constexpr, VEC: tl.constexpr, ONE_RUN: tl.constexpr,
    ALIGNED: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    o_u, o_n, o_r = run_numbers(chunks, R, BLOCK_U, ONE_RUN)
    L = L * VEC
    m_u = o_u < U
    b_s = load_sigma(sigma_ptr, sigma_sn, sigma_ss, o_n, o_r, segment, m_u, ONE_RUN)
    sd = tl.cast(sigma_data, tl.float32)
    c_in = 1.0 / tl.sqrt(b_s * b_s + sd * sd)
    # A seed in memory may change between the launches of a captured graph; a number could not.
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    start = chunk_start(chunks, BLOCK_L)
    # In 16 bits a thread loads 8 neighbours at once: it draws their noise too, two quads.
    WIDE: tl.constexpr = ALIGNED and y_ptr.dtype.element_ty.primitive_bitwidth == 16
    o_y = (o_n * y_sn + o_r * y_sr) * VEC
    PART: tl.constexpr = BLOCK_L // PARTS
    # A part at a time: the words of Philox for a whole tile would fill the registers.
    for i in tl.static_range(PARTS):
        b_eps, o_l = run_normals(seed, offset, o_u, start + i * PART, L, PART, ALIGNED, WIDE)
        m_l = m_u[:, None] & (o_l >= 0) & (o_l < L)
        b_y = load_run(y_ptr, o_y[:, None] + o_l, m_l, EVEN)
        b_z = tl.fma(b_eps, b_s[:, None], b_y)
        o_z = (o_u * L)[:, None] + o_l
        # z_in is made from the z in registers, before any rounding.
        if z_ptr is not None:
            store_run(z_ptr, o_z, m_l, b_z, EVEN)
        store_run(z_in_ptr, o_z, m_l, b_z * c_in[:, None], EVEN)


@triton.jit(do_not_specialize=_INTEGERS_BWD)
def noise_inject_bwd_kernel(
    dz_ptr, dz_in_ptr, sigma_ptr, dy_ptr,
    sigma_data,
    dz_sn: tl.int64, dz_sr: tl.int64, dz_in_sn: tl.int64, dz_in_sr: tl.int64,
    sigma_sn: tl.int64, sigma_ss: tl.int64,
    U: tl.int64, R: tl.int64, L: tl.int64, segment: tl.int64, chunks: tl.int32,
    BLOCK_U: tl.constexpr, BLOCK_L: tl.constexpr, VEC: tl.constexpr, ONE_RUN: tl.constexpr,
):  # fmt: skip
    o_u, o_n, o_r = run_numbers(chunks, R, BLOCK_U, ONE_RUN)
    m_u = o_u < U
    b_s = load_sigma(sigma_ptr, sigma_sn, sigma_ss, o_n, o_r, segment, m_u, ONE_RUN)
    sd = tl.cast(sigma_data, tl.float32)
    c_in = 1.0 / tl.sqrt(b_s * b_s + sd * sd)
    o_l = chunk_start(chunks, BLOCK_L) + tl.arange(0, BLOCK_L)[None, :]
    m_l = m_u[:, None] & (o_l < L * VEC)
    o_g = (o_n * dz_in_sn + o_r * dz_in_sr) * VEC
    b_g = tl.load(dz_in_ptr + o_g[:, None] + o_l, mask=m_l, other=0.0)
    b_dy = tl.cast(b_g, tl.float32) * c_in[:, None]
    if dz_ptr is not None:
        o_dz = (o_n * dz_sn + o_r * dz_sr) * VEC
        b_dz = tl.load(dz_ptr + o_dz[:, None] + o_l, mask=m_l, other=0.0)
        b_dy += tl.cast(b_dz, tl.float32)
    tl.store(dy_ptr + (o_u * (L * VEC))[:, None] + o_l, b_dy, mask=m_l)


def noise_inject_fwd(
    y: Tensor, sigma: Tensor, seed_tensor: Tensor | None, seed: int, offset: int,
    sigma_data: float, dtype: torch.dtype, need_z: bool,
) -> Plan:  # fmt: skip
    """z, without elements where it is not needed, and z_in."""

    def launch(offset: int) -> Launch:
        x, table = as_tokens(y), sigma_table(sigma, len(y))
        runs = plan_runs([x], table.shape[1], offset=offset)
        numbers = (*runs.strides(x), *table.stride())
        return runs.launch(noise_inject_fwd_kernel, *numbers, constants=runs.noise(offset))

    # By whether the noise starts on a quad.
    launches = [launch(1), launch(0)] if y.numel() else []

    def run(y, sigma, seed_tensor, seed, offset, sigma_data, dtype, need_z):
        z = y.new_empty(y.shape if need_z else 0, dtype=torch.float32)
        z_in = y.new_empty(y.shape, dtype=dtype)
        if launches:
            launch = launches[offset % 4 == 0]
            launch.start(
                y, sigma, z if need_z else None, z_in, seed_tensor, seed, offset, sigma_data,
                *launch.numbers,
            )  # fmt: skip
        return z, z_in

    return copies(y), run


def noise_inject_bwd(
    dz: Tensor | None, dz_in: Tensor, sigma: Tensor, sigma_data: float, dtype: torch.dtype
) -> Plan:
    """The gradient to y from those to z and z_in, all of one shape."""
    launch = None
    if dz_in.numel():
        table, g_in = sigma_table(sigma, len(dz_in)), as_tokens(dz_in)
        g = g_in if dz is None else as_tokens(dz)
        runs = plan_runs([g, g_in], table.shape[1])
        strides = (*runs.strides(g), *runs.strides(g_in), *table.stride())
        launch = runs.launch(noise_inject_bwd_kernel, *strides)

    def run(dz, dz_in, sigma, sigma_data, dtype):
        dy = dz_in.new_empty(dz_in.shape, dtype=dtype)
        if launch is not None:
            launch.start(dz, dz_in, sigma, dy, sigma_data, *launch.numbers)
        return dy

    return copies(dz, dz_in), run
