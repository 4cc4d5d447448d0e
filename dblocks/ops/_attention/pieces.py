"""The pieces that impl="composed" computes separately: documents, or valid rows of samples."""

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """Those of the op, in its order."""

    block_size: int
    token: bool  # clean_causal="token"
    scale: float
    cu_seqlens: Tensor | None
    noisy_only: bool  # query="noisy"
    noisy_first: bool  # order="noisy_clean"
    valid: Tensor | None
    window: int | None
    softcap: float | None
    alibi_slopes: Tensor | None
    backend: str


class Piece(NamedTuple):
    """Some samples, and where their rows of both halves are."""

    samples: slice
    start: int  # positions
    end: int
    q_clean: slice | None  # rows of q; None where it has noisy rows only
    q_noisy: slice
    clean: slice  # rows of k and v
    noisy: slice
    block_size: int  # no longer than the piece

    @property
    def length(self) -> int:
        return self.end - self.start


class Saved(NamedTuple):
    """What the backward reads, and the three gradients that it writes."""

    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def of(self, samples: slice) -> "Saved":
        return Saved(*(x[samples] for x in self))


def pieces(q: Tensor, k: Tensor, options: Options) -> Iterator[Piece]:
    """Those that are not empty."""
    N, T = q.shape[0], k.shape[2] // 2
    if q.numel() == 0:
        return
    first_clean, first_noisy = (T, 0) if options.noisy_first else (0, T)
    both = q.shape[2] == 2 * T
    for samples, start, end in _ranges(N, T, options):
        if start == end:
            continue
        clean, noisy = (slice(first + start, first + end) for first in (first_clean, first_noisy))
        own = slice(start, end)
        yield Piece(
            samples,
            start,
            end,
            clean if both else None,
            noisy if both else own,
            clean,
            noisy,
            min(options.block_size, end - start),
        )


def _ranges(N: int, T: int, options: Options) -> Iterator[tuple[slice, int, int]]:
    # What is left out as negligible with slopes must not depend on another sample.
    apart = options.alibi_slopes is not None
    if options.valid is not None:
        samples = enumerate(options.valid.tolist())
        for _, group in groupby(samples, lambda sample: (sample[1], apart and sample[0])):
            numbers, ((start, end), *_) = zip(*group, strict=True)
            yield slice(numbers[0], numbers[-1] + 1), start, end
        return
    ends = [0, T] if options.cu_seqlens is None else options.cu_seqlens.tolist()
    step = 1 if apart else N
    for first in range(0, N, step):
        for start, end in pairwise(ends):
            yield slice(first, first + step), start, end


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and merges."""
    return torch.float64 if dtype == torch.float64 else torch.float32
