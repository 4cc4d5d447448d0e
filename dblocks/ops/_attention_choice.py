"""Which implementation of doubled_attention runs: the table behind impl="auto"."""

from typing import Any

import torch
from torch import Tensor

from dblocks.ops import _common

IMPLS = ("auto", "reference", "triton", "composed")
BACKENDS = (None, "sdpa", "cudnn", "flash_attn", "xformers")


def resolve(impl: str, backend: str | None, q: Tensor, k: Tensor, options: dict[str, Any]) -> str:
    """The implementation for these tensors; a named one that cannot run raises."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS[1:]} or None, got {backend!r}")
    if impl == "auto":
        return "reference"
    return impl
