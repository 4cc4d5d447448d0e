"""linear_cross_entropy in plain PyTorch."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    dtype, shape = torch.promote_types(h.dtype, torch.float32), target.shape
    h, target = h.reshape(target.numel(), h.shape[-1]), target.flatten()
    counted = target != ignore_index
    factors = counted.to(dtype)
    if row_weight is not None:
        factors = row_weight.flatten().to(dtype).where(counted, 0)
    used = factors != 0
    rows = h.to(dtype).masked_fill(~used[:, None], 0)
    device = h.device.type
    can_autocast = torch.amp.is_autocast_available(device)
    # The product keeps the dtype of its operands.
    with torch.autocast(device, enabled=False) if can_autocast else nullcontext():
        logits = F.linear(
            rows, weight.to(h.dtype).to(dtype), None if bias is None else bias.to(dtype)
        )
        losses = F.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index)
    losses = losses.where(used, 0) * factors
    if reduction == "none":
        return losses.view(shape)
    return losses.sum() / counted.sum().clamp(min=1)
