"""How the elementwise kernels traverse a tensor: in runs of consecutive elements.

A run lies within one segment of sigma and is contiguous in every tensor of the launch: the whole
sample where memory allows it, else one token. Programs take tiles of BLOCK_U runs by BLOCK_L
elements, so a coefficient is computed once a run and no element needs a division.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dblocks.kernels._common.launches import TILE, Launch, next_power_of_2, unit_last
from dblocks.kernels._common.philox import tile_normals

NOISE_TILE = 4096  # of kernels with noise: half the work of indices and keys an element
MIN_PART = 256
MAX_PARTS = 4  # parts of such a tile, drawn one after another: few registers, so many warps
MIN_BLOCK_L = 32
MAX_VEC = 8  # 16 bytes of a 16-bit dtype

INTEGERS = ("U", "R", "L", "segment", "chunks")  # arguments common to all kernels here


class Runs(NamedTuple):
    """`U` runs of `L` elements, `R` of them a sample, `segment` of them a segment of sigma."""

    U: int
    R: int
    L: int
    segment: int
    chunks: int
    BLOCK_U: int
    BLOCK_L: int
    VEC: int
    num_warps: int

    @property
    def programs(self) -> int:
        return triton.cdiv(self.U, self.BLOCK_U) * self.chunks

    def launch(self, fn: Any, *numbers: float, constants: tuple[Any, ...] = ()) -> Launch:
        """Of a kernel whose last parameters are INTEGERS, the blocks of runs, and `constants`."""
        # The length is in steps of VEC, as `strides` are.
        sizes = (self.U, self.R, self.L // self.VEC, self.segment, self.chunks)
        blocks = (self.BLOCK_U, self.BLOCK_L, self.VEC, self.R == 1)
        numbers = (*numbers, *sizes, *blocks, *constants)
        return Launch(fn, self.programs, numbers, num_warps=self.num_warps)

    def noise(self, offset: int) -> tuple[bool, bool, int]:
        """Whether runs start on a quad of the noise, and tiles cover nothing else; their parts."""
        aligned = offset % 4 == 0 and self.L % 4 == 0
        even = aligned and self.L % self.BLOCK_L == 0 and self.U % self.BLOCK_U == 0
        parts = min(max(self.BLOCK_L // MIN_PART, 1), MAX_PARTS)
        return aligned, even, parts

    def strides(self, x: Tensor) -> tuple[int, int]:
        """Distances between samples and between runs of `x` [N, T, D], in steps of VEC."""
        run = x.stride(1) * (x.shape[1] // self.R)
        return x.stride(0) // self.VEC, run // self.VEC


def as_tokens(x: Tensor) -> Tensor:
    """`x` [N, ...] as [N, T, D] with a last stride of 1; a copy only where no view can be that."""
    if x.ndim == 3:
        return unit_last(x)
    return unit_last(x.reshape(x.shape[0], 1, -1))


def copies(*tensors: Tensor | None) -> list[int]:
    """The positions of the tensors that `as_tokens` copies."""
    given = [(i, x) for i, x in enumerate(tensors) if x is not None and x.numel()]
    return [i for i, x in given if as_tokens(x).data_ptr() != x.data_ptr()]


def sigma_table(sigma: Tensor, N: int) -> Tensor:
    """sigma (0-d, [N] or [N, S]) as a view [N, S]."""
    return sigma if sigma.ndim == 2 else sigma.reshape(-1, 1).expand(N, 1)


def _block_length(L: int, tile: int = TILE) -> int:
    """The longest block that wastes at most an eighth of its lanes."""
    block = tile
    while block >= MIN_BLOCK_L:
        if 8 * triton.cdiv(L, block) * block <= 9 * L:
            return block
        block //= 2
    return min(max(next_power_of_2(L), 8), 2 * MIN_BLOCK_L)


def plan_runs(
    tensors: list[Tensor], S: int, *, by_token: bool = False, offset: int | None = None
) -> Runs:
    """The runs common to `tensors` [N, T, D] under S segments of sigma.

    `by_token` forbids runs longer than a token. With an `offset` into the noise, runs that do not
    start on a quad get VEC = 1 and up to 3 elements more; it matters only whether 4 divides it.
    """
    N, T, D = tensors[0].shape
    dense = all(T == 1 or x.stride(1) == D for x in tensors)
    R = S if dense and not by_token else T
    L = T // R * D
    steps = [L] + [x.stride(0) for x in tensors if N > 1]
    steps += [x.stride(1) * (T // R) for x in tensors if R > 1]
    vec = MAX_VEC
    while any(step % vec for step in steps):
        vec //= 2
    span = L
    if offset is not None and (offset % 4 or L % 4):
        vec, span = 1, L + 3
    tile = TILE if offset is None else NOISE_TILE
    block = _block_length(span, tile)
    BLOCK_U = max(1, min(TILE // block, next_power_of_2(N * R)))
    warps = max(4 * BLOCK_U * block // tile, 1)
    return Runs(N * R, R, L, R // S, triton.cdiv(span, block), BLOCK_U, block, vec, warps)


@triton.jit
def program():
    """The program's number, unsigned: that divides in half the instructions."""
    return tl.cast(tl.program_id(0), tl.uint32)


@triton.jit
def chunk_number(chunks):
    return program() % tl.cast(chunks, tl.uint32)


@triton.jit
def run_numbers(chunks, R, BLOCK_U: tl.constexpr, ONE_RUN: tl.constexpr):
    """Numbers [BLOCK_U] of this program's runs, of their samples, and of the runs in those."""
    first = tl.cast(program() // tl.cast(chunks, tl.uint32), tl.int64) * BLOCK_U
    o_u = first + tl.arange(0, BLOCK_U)
    o_n, o_r = o_u, o_u * 0
    if not ONE_RUN:
        # One 64-bit division a program; those of the runs take 32 bits.
        n = first // R
        o_r = tl.cast(first - n * R, tl.uint32) + tl.cast(tl.arange(0, BLOCK_U), tl.uint32)
        carry = o_r // tl.cast(R, tl.uint32)
        o_n = n + tl.cast(carry, tl.int64)
        o_r = tl.cast(o_r - carry * tl.cast(R, tl.uint32), tl.int64)
    return o_u, o_n, o_r


@triton.jit
def chunk_start(chunks, BLOCK_L: tl.constexpr):
    """Where in its runs this program starts."""
    return tl.cast(chunk_number(chunks), tl.int64) * BLOCK_L


@triton.jit
def load_sigma(sigma_ptr, stride_n, stride_s, o_n, o_r, segment, m_u, ONE_RUN: tl.constexpr):
    """sigma of each run in float32; 1 where there is no run."""
    # Run numbers of a sample fit 32 bits, whose division is a fraction of the 64-bit one.
    o_s = o_n * stride_n
    if not ONE_RUN:
        o_s += tl.cast(tl.cast(o_r, tl.uint32) // tl.cast(segment, tl.uint32), tl.int64) * stride_s
    return tl.cast(tl.load(sigma_ptr + o_s, mask=m_u, other=1.0), tl.float32)


@triton.jit
def run_normals(
    seed, offset, o_u, start, L, BLOCK_L: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr
):
    """The normals [BLOCK_U, BLOCK_L] of a tile and the places of its elements in their runs.

    Not ALIGNED, the first quad of a run starts up to 3 elements before it: those places are < 0.
    """
    # Philox makes four numbers at once, and they belong to elements 4 q .. 4 q + 3 of the stream.
    first = offset + o_u * L
    o_l = start + tl.arange(0, BLOCK_L)[None, :]
    if not ALIGNED:
        o_l = o_l - (first & 3)[:, None]
    return tile_normals(seed, ((first + start) >> 2)[:, None], BLOCK_L, WIDE), o_l


@triton.jit
def load_run(x_ptr, o, m, EVEN: tl.constexpr):
    """Elements `o` in float32, 0 where `m` is false; EVEN: it is true everywhere."""
    if EVEN:
        return tl.cast(tl.load(x_ptr + o), tl.float32)
    else:
        return tl.cast(tl.load(x_ptr + o, mask=m, other=0.0), tl.float32)


@triton.jit
def store_run(x_ptr, o, m, b_x, EVEN: tl.constexpr):
    if EVEN:
        tl.store(x_ptr + o, b_x)
    else:
        tl.store(x_ptr + o, b_x, mask=m)
