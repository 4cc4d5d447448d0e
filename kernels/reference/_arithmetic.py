"""What the reference computes in: its dtype, and whether forward-mode differentiation runs."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an op on `x` computes: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Keeps matrix products in the dtypes of their operands."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is active, that of torch.func too."""
    return forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result sets, without its import of the compiler: a graph takes
# the answer of the moment when it is traced, and guards on the level by itself.
in_forward_mode._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
