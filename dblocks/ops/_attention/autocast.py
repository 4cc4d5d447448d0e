"""Tensors of several dtypes under autocast."""

import torch
from torch import Tensor


def alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one dtype where autocast is on, as PyTorch's attention makes them.

    Under autocast norms and rotary positions give float32 and projections do not. Tensors that are
    of one dtype already stay as they are, more precise than autocast asks for. float64 is not cast,
    as in PyTorch, and is left to the checks, like whatever is no tensor.
    """
    given = (q, k, v)
    if not all(isinstance(x, Tensor) for x in given) or q.dtype == k.dtype == v.dtype:
        return given
    kind = q.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return given
    if any(not x.is_floating_point() or x.dtype == torch.float64 for x in given):
        return given
    dtype = torch.get_autocast_dtype(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)
