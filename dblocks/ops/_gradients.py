"""Which tensors autograd follows."""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor


def may_need(tensor: Tensor | None) -> bool:
    """Whether a tensor may need a gradient; None never does.

    One that was left over from a torch.func transform says that it needs none, even where the
    tensor inside does.
    """
    if tensor is None:
        return False
    if tensor.requires_grad or torch.compiler.is_compiling():
        return tensor.requires_grad
    return is_functorch_wrapped_tensor(tensor)
