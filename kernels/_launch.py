"""Block sizes, warps and chunks: what the launches of several kernels share.

Every choice depends on shapes only, never on the device, so a result is the same wherever a
kernel is compiled for.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

MAX_WIDTH = 16384  # a row is held in the registers of one program
MAX_ONE_PASS_WIDTH = 8192  # above, the sums for the modulation gradients no longer fit beside it
TILE = 2048  # elements that a program of 4 warps works on at once
PROGRAMS = 512  # about four for each multiprocessor of the GPUs of 2020 to 2026
MIN_CHUNK_ROWS = 16  # fewer, and writing the partial sums would cost more than 10 %


class Tile(NamedTuple):
    """A tile of rows: sizes are powers of two, BLOCK_D covers the whole row."""

    BLOCK_R: int
    BLOCK_D: int
    num_warps: int


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def row_tile(D: int, rows: int) -> Tile:
    """The tile for rows of width `D` of which `rows` follow one another: 16 elements a thread."""
    BLOCK_D = next_power_of_2(D)
    BLOCK_R = max(1, min(TILE // BLOCK_D, next_power_of_2(rows)))
    # 16 warps is the most that a device with 64 threads a warp can start.
    return Tile(BLOCK_R, BLOCK_D, min(max(BLOCK_R * BLOCK_D // 512, 4), 16))


def forward_chunk(rows: int, groups: int, BLOCK_R: int) -> int:
    """Rows a forward program walks: up to 8 tiles, so that the modulation is read once for them."""
    return BLOCK_R * min(max(rows * groups // (4 * PROGRAMS * BLOCK_R), 1), 8)


def backward_chunk(rows: int, groups: int, BLOCK_R: int) -> int:
    """Rows a backward program sums over before it writes its partial sums."""
    chunk = max(-(-rows * groups // PROGRAMS), MIN_CHUNK_ROWS)
    return -(-chunk // BLOCK_R) * BLOCK_R


def unit_last(x: Tensor) -> Tensor:
    """`x` itself where neighbouring elements of its last dimension are adjacent, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def device_guard(x: Tensor) -> AbstractContextManager:
    """Makes the device of `x` current, where it has several to choose from."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


class Groups(NamedTuple):
    """How the rows divide into groups that share one row of the modulation."""

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
    """The first two strides of each tensor; [N, D] counts as one segment, `None` as zeros."""
    result = []
    for tensor in tensors:
        result.append(0 if tensor is None else tensor.stride(0))
        result.append(tensor.stride(1) if tensor is not None and tensor.ndim == 3 else 0)
    return result
