"""The weights of the losses of noise levels."""

from __future__ import annotations

import torch
from torch import Tensor

from dblocks.blocks.config import Weighting

# Weighting "clamped": w reaches 250,000 at the lowest noise, which would dominate the loss.
CLAMPED_WEIGHT_MAX = 20.0


def loss_factors(weighting: Weighting, loss_kind: str, w: Tensor) -> Tensor:
    """The factor of each sample's loss.

    `edm` is w_i, `clamped` min(w_i, 20), `none` 1 and `batch_mean` the mean of w, each for the loss
    of the denoised estimate. An L2 loss in F space already includes w_i, which is divided out.

    Args:
        weighting: the rule; `auto` is w_i for "l2" and "masked_cross_entropy", and `none` for
            "cross_entropy".
        loss_kind: "l2", "cross_entropy" or "masked_cross_entropy".
        w: the schedule's loss weights, of the shape of sigma.
    """
    if weighting == "auto":
        weighting = "none" if loss_kind == "cross_entropy" else "edm"
    if weighting == "edm":
        return torch.ones_like(w) if loss_kind == "l2" else w
    if weighting == "clamped":
        factor = w.clamp(max=CLAMPED_WEIGHT_MAX)
    elif weighting == "batch_mean":
        factor = w.mean().expand_as(w)
    else:
        factor = torch.ones_like(w)
    return factor / w if loss_kind == "l2" else factor
