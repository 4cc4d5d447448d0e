"""The options of impl="composed", and the pieces that it computes separately."""

from typing import NamedTuple

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
    start: int  # position
    length: int  # positions
    q_clean: slice | None  # rows of q; None where it has noisy rows only
    q_noisy: slice
    clean: slice  # rows of k and v
    noisy: slice
    block_size: int  # no longer than the piece


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
