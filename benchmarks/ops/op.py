"""The definition of an op in the benchmark: inputs, baselines, shapes, and the work of a call."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Implementation = Callable[..., Sequence[Tensor | None]]
Absent = str  # reason why a baseline is absent

SEED = 20_261_123

# Shapes [N, T, D] for each device; that of the GPU has 64M elements, 128 MiB in bfloat16.
SHAPES = {
    "cpu": ((4, 64, 192), (2, 512, 768), (4, 1024, 1024), (2, 2048, 2048)),
    "cuda": ((8, 4096, 2048), (4, 256, 768)),
}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}


class Work(NamedTuple):
    """Bytes to move and operations of a call."""

    bytes_forward: int
    bytes_backward: int
    operations_forward: int
    operations_backward: int


class Baseline(NamedTuple):
    """An implementation with its differences from the op."""

    call: Implementation
    definition: Implementation | None = None  # plain PyTorch, if its result differs from the op's
    forward_only: str = ""  # why


class Op(NamedTuple):
    """`make` draws the inputs; `ours` and `eager` take them and return a sequence of outputs."""

    name: str
    make: Callable[[Sequence[int], torch.dtype, torch.device], dict[str, Tensor]]
    needs_grad: tuple[str, ...]
    ours: Implementation
    eager: Implementation
    work: Callable[[Sequence[int], int], Work]  # a function of a shape and the size of the dtype
    # For ops whose baselines draw their own noise, so that only its size can be compared: plain
    # PyTorch with the noise of dblocks, to check dblocks.
    oracle: Implementation | None = None
    others: tuple[str, ...] = ()  # names in baselines.py, in addition to eager and torch.compile
    shapes: dict[str, tuple[tuple[int, ...], ...]] = SHAPES
    dtypes: dict[str, tuple[str, ...]] = DTYPES
    # Instead of torch.compile and `others`.
    baselines: Callable[[torch.device], dict[str, Implementation | Absent | Baseline]] | None = None
