"""The variational bound of a text under a masked diffusion model, by quadrature."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dblocks.blocks import Denoiser, unwrapped
from dblocks.blocks.targets.padding import check_attention_mask
from dblocks.config import check_count
from dblocks.sampling.interface import check_some_texts
from dblocks.schedules import MASKED
from dblocks.schedules.random import uniforms

POINTS = 12  # divisible by 1, 2, 3, 4, 6 and 12 blocks


def points_for(num_blocks: int) -> int:
    """The smallest multiple of the number of blocks that is at least `POINTS`."""
    return num_blocks * math.ceil(POINTS / num_blocks)


class BoundTerms(NamedTuple):
    """The bound of a batch of sequences, at each point of the quadrature."""

    shares: Tensor
    """The mask ratio at each point of the quadrature, ascending float64 [points]."""
    nats: Tensor
    """The contribution of each point to each sequence's bound, in nats, float64 [N, points]."""

    def per_token(self, scored: int) -> Tensor:
        """The integrand at each point, in nats per token of `scored` tokens, [points]."""
        return self.nats.sum(0) * len(self.shares) / scored


@torch.no_grad()
def bound_terms(
    model: Denoiser,
    tokens: Tensor,
    *,
    scored: Tensor | None = None,
    points: int = POINTS,
    seed: int = 0,
    batch_size: int = 32,
    attention_mask: Tensor | None = None,
) -> BoundTerms:
    """The variational bound of -ln p of each sequence, an integral over the mask ratio m.

        int_0^1 (1/m) E[sum over masked tokens of -ln p(token | the others)] dm

    It is evaluated at the mid-points of `points` equal cells of m, each by the block that owns its
    t (without the overlap of training), with one mask per point and sequence. This is an unbiased
    estimate of the mid-point sum and does not depend on the kind of schedule. For a smooth
    integrand, the error of the mid-point rule is about (second derivative)/(24 points^2).

    Args:
        model: the blocks of a `MaskedLM`, or any with a `MaskSchedule` whose logits are [N, T, V].
        tokens: int64 [N, T].
        scored: bool [N, T]; other tokens are never masked, and m is the ratio of masked to scored
            tokens. All by default.
        points: number of mid-points, a multiple of the number of blocks.
        seed: seed of the masks, which depend only on it and on the index of a token.
        batch_size: number of sequences per call.
        attention_mask: [N, T], 0 at padding before or after each text, which is not scored and does
            not affect the bound.

    Raises:
        TypeError: the blocks have no `MaskSchedule`.
        ValueError: `points` is not a multiple of the number of blocks, or there is no text.
    """
    check_some_texts(tokens)
    model = unwrapped(model)
    schedule, num_blocks = model.config.mask_schedule, model.config.num_blocks
    if check_count("points", points) % num_blocks:
        raise ValueError(
            f"points must be a multiple of the number of blocks, {num_blocks}, got {points}"
        )
    shares = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    times = schedule.time_at(shares)
    N, T = tokens.shape
    nats = torch.zeros(N, points, dtype=torch.float64)
    scored = torch.ones_like(tokens, dtype=torch.bool) if scored is None else scored
    if attention_mask is not None:
        attention_mask = check_attention_mask(attention_mask, (N, T)).to(tokens.device)
        scored = scored & attention_mask
    for first in range(0, N, batch_size):
        part = slice(first, first + batch_size)
        y, may_mask = tokens[part], scored[part]
        mask = attention_mask
        bound = model.bind() if mask is None else model.bind(attention_mask=mask[part])
        for k, (share, t) in enumerate(zip(shares.tolist(), times, strict=True)):
            u = uniforms(y.shape, seed, y.device, offset=(k * N + first) * T)
            z = torch.where((u < share) & may_mask, MASKED, y)
            logits = bound.logits(z, t)
            costs = nnf.cross_entropy(logits.transpose(1, 2), y, reduction="none").double()
            costs = costs.where(z == MASKED, 0).sum(1)
            nats[part, k] = costs.cpu() / (share * points)
    return BoundTerms(shares, nats)
