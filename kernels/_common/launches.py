"""Block sizes, warps and chunks of the launches of several kernels.

Every choice depends only on shapes, never on the device, so a result is the same on every target.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

MAX_WIDTH = 16384  # a row is held in the registers of one program
MAX_ONE_PASS_WIDTH = (
    8192  # above, the sums for the modulation gradients do not fit into registers with it
)
TILE = 2048  # elements per tile of a program of 4 warps
PROGRAMS = 256  # about two for each multiprocessor of the GPUs of 2020 to 2026
MIN_CHUNK_ROWS = 16  # fewer, and writing the partial sums would cost more than 10 %
PART = 256  # columns of a warp of 32 threads that move 16 bytes of a 16-bit dtype each
MAX_PART = 4096  # 16 warps, the most that a device with 64 threads a warp can start
FORWARD_PARTS = 5  # 8 elements a thread each
BACKWARD_PARTS = 3  # fewer, since the sums of a program take registers too


class Tile(NamedTuple):
    """A tile of rows, each as PARTS tensors of one width that cover BLOCK_D columns together."""

    BLOCK_R: int
    BLOCK_D: int
    PARTS: int
    num_warps: int


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def row_tile(D: int, rows: int, parts: int) -> Tile:
    """The tile for rows of width `D` of which `rows` follow one another, in up to `parts` parts.

    A part is as narrow as that allows: then few warps, or only one, share a row and its sums.
    """
    W = min(PART, next_power_of_2(D))
    while W * parts < D and W < MAX_PART:
        W *= 2
    count = -(-D // W)
    num_warps = max(W // PART, 4)
    # Narrow rows have one part, so a thread works on two of them.
    BLOCK_R = max(num_warps * PART // W * (2 if count == 1 else 1), 1)
    return Tile(min(BLOCK_R, next_power_of_2(rows)), W * count, count, num_warps)


def common_step(*sizes: int) -> int:
    """What sizes and strides are counted in: 8 elements where all are multiples, else one.

    A kernel then moves 16 bytes at once, even if a width is not a multiple of Triton's own 16.
    """
    return 1 if any(size % 8 for size in sizes) else 8


def forward_chunk(rows: int, groups: int, tile: Tile) -> int:
    """Rows per forward program: up to 16 tiles, so that the modulation is read once for them.

    Fewer if there would be too few programs; wide rows have more warps per program.
    """
    programs = 4 * PROGRAMS * 4 // tile.num_warps
    return tile.BLOCK_R * min(max(rows * groups // (programs * tile.BLOCK_R), 1), 16)


def backward_chunk(rows: int, groups: int, BLOCK_R: int) -> int:
    """Rows that a backward program sums before it writes its partial sums."""
    chunk = max(-(-rows * groups // PROGRAMS), MIN_CHUNK_ROWS)
    return -(-chunk // BLOCK_R) * BLOCK_R


def unit_last(x: Tensor) -> Tensor:
    """`x` itself where neighbouring elements of its last dimension are adjacent, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def copies(*tensors: Tensor | None) -> list[int]:
    """The positions of the tensors that `unit_last` copies."""
    return [i for i, x in enumerate(tensors) if x is not None and unit_last(x) is not x]


# The positions of the arguments that must be made contiguous, and what runs with all arguments of a
# layout, as dblocks.ops plans it; it allocates, and starts launches.
Plan = tuple[list[int], Callable[..., Any]]


class Groups(NamedTuple):
    """The division of rows into groups that share one row of the modulation."""

    count: int
    L: int  # rows in a group
    S: int  # segments of a sample
    per_token: bool  # rows share nothing (own modulation, or none): one group of all rows


def groups(x: Tensor, *modulation: Tensor | None) -> Groups:
    """The groups of `x` [N, T, D] under modulations [N, D] or [N, S, D] of one S."""
    N, T, _ = x.shape
    given = next((m for m in modulation if m is not None), None)
    S = given.shape[1] if given is not None and given.ndim == 3 else 1
    if given is None or T == S:
        return Groups(1, N * T, S, True)
    return Groups(N * S, T // S, S, False)


def strides(*tensors: Tensor | None) -> list[int]:
    """The first two strides of each tensor, or of its copy if `copies` says that it has one.

    [N, D] counts as one segment, `None` as zeros.
    """
    result = []
    for tensor in tensors:
        tensor = None if tensor is None else unit_last(tensor)
        result.append(0 if tensor is None else tensor.stride(0))
        result.append(tensor.stride(1) if tensor is not None and tensor.ndim == 3 else 0)
    return result


class Launch:
    """A launch of a kernel without its tensors, and without the numbers that change between calls.

    `launch.start(*these, *launch.numbers)` runs it; the tensors must have the dtypes and alignments
    of the first call. That compiles the kernel, and `start` is the compiled kernel's own from then
    on: no code of this library. Triton's interpreter has no compiled kernel.
    """

    start: Callable[..., Any]

    def __init__(self, fn: Any, programs: int, numbers: tuple, **options: Any) -> None:
        self.fn, self.grid, self.numbers = fn, (programs, 1, 1), numbers
        # Named, since Triton 3.10 changes the default, and with it the bits of results.
        self.options = {"enable_fp_fusion": True, **options}
        self.start = self._first

    def _first(self, *args: Any) -> None:
        launch = partial(self.fn[self.grid], **self.options)
        kernel = launch(*args)
        self.start = kernel[self.grid] if kernel else launch
