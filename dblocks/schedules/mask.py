"""Levels of masking (mask ratios of token sequences), their partition, and sampling grids.

Time t runs from 0, nothing masked, to 1, all masked. Block 0 owns the most masked levels. As in
`dblocks.schedules.noise`, boundaries are float64 on the CPU, and only drawing touches a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from dblocks import functional as F
from dblocks.config import JsonConfig, check_block, check_count, check_overlap, check_share
from dblocks.schedules.base import OVERLAP, owner_of, register
from dblocks.schedules.noise import computed
from dblocks.schedules.random import clamp_inside, draw_device, uniforms, with_top

MASKED = -1  # the value of a masked token
# No t below is drawn, so that the weight 1/masked(t) stays a float32. Truncating the bound here
# drops at most 1.6e-6 of the cross-entropy at t = 0.
T_MIN = 1e-6

ScheduleKind = Literal["linear", "cosine", "poly2"]
KINDS = ("linear", "cosine", "poly2")
DRAWS = ("alpha", "t")


class MaskLevel(NamedTuple):
    """Time t and its coefficients, each of the shape of t."""

    t: Tensor
    alpha: Tensor
    """Probability that a token is not masked."""
    masked: Tensor
    """Probability that it is, `1 - alpha` without cancellation."""
    c_noise: Tensor
    """The input of noise embeddings, `pi*masked`: at their fastest frequency, 1 radian, it spans
    half a turn, so that the cosine alone distinguishes all levels; the range is about that of
    `ln(sigma)/4` for Gaussian noise. It does not depend on the kind of schedule."""


@register
@dataclass(frozen=True)
class MaskSchedule(JsonConfig):
    """Tokens are masked independently of each other, with probability 1 - alpha(t) at time t.

        linear   alpha = 1 - t
        cosine   alpha = 1 - cos(pi/2 (1 - t))
        poly2    alpha = 1 - t^2

    The loss of a sequence x of T tokens is the variational bound of -ln p(x),

        int_0^1 -alpha'(t)/(1 - alpha(t)) E[sum over masked tokens of -ln p(token | the others)] dt

    and blocks share it by equal decrements of alpha: block b owns those t whose mask ratio lies in
    ((B-1-b)/B, (B-b)/B].

    With `draw="alpha"` training draws alpha uniformly, and the kind of schedule only changes the
    labels t of the levels, as the network's input is the mask ratio and not t. With `draw="t"` the
    kind decides how often a ratio occurs in training: cosine favours many masked tokens, poly2 few.
    In both cases the expected weighted loss is the same bound.

    Source: Shi et al. 2024 (MD4), arXiv 2406.04329; Sahoo et al. 2024 (MDLM), arXiv 2406.07524.
    """

    kind: ScheduleKind = "linear"
    """alpha as a function of t: linear, cosine or poly2."""
    draw: Literal["alpha", "t"] = "alpha"
    """The variable that training draws uniformly inside a block: alpha or t."""

    corruption: ClassVar[Literal["noise", "masks"]] = "masks"
    symbol: ClassVar[str] = "t"
    loss_kinds: ClassVar[tuple[str, ...]] = ("masked_cross_entropy",)
    weightings: ClassVar[tuple[str, ...]] = ("auto", "none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if self.draw not in DRAWS:
            raise ValueError(f"draw must be one of {DRAWS}, got {self.draw!r}")

    def masked(self, t: Tensor) -> Tensor:
        """The mask ratio 1 - alpha(t), without cancellation; float32 (float64 for float64)."""
        t = computed(t)
        if self.kind == "linear":
            return t
        return t.square() if self.kind == "poly2" else torch.sin(math.pi / 2 * t)

    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a token is not masked, without cancellation where it is small."""
        t = computed(t)
        if self.kind == "linear":
            return 1 - t
        if self.kind == "poly2":
            return (1 - t) * (1 + t)
        return 2 * torch.sin(math.pi / 4 * (1 - t)).square()

    def alpha_prime(self, t: Tensor) -> Tensor:
        """The derivative of alpha with respect to t, <= 0."""
        t = computed(t)
        if self.kind == "linear":
            return -torch.ones_like(t)
        return -2 * t if self.kind == "poly2" else -math.pi / 2 * torch.cos(math.pi / 2 * t)

    def time_at(self, masked: Tensor) -> Tensor:
        """The inverse of `masked`: t in [0, 1], for a mask ratio in [0, 1]."""
        masked = computed(masked)
        if self.kind == "linear":
            return masked
        return masked.sqrt() if self.kind == "poly2" else 2 / math.pi * torch.asin(masked)

    def boundaries(self, num_blocks: int) -> Tensor:
        """The times that separate the blocks, at alpha = b/B.

        Block b owns `boundaries[b] >= t > boundaries[b+1]`, the last block also t = 0.

        Args:
            num_blocks: number of blocks B.

        Returns:
            Descending float64 [B+1] on the CPU, from 1 to 0.
        """
        num_blocks = check_count("num_blocks", num_blocks)
        return torch.tensor(
            [self._time(1 - b / num_blocks) for b in range(num_blocks + 1)],
            dtype=torch.float64, device="cpu",
        )  # fmt: skip

    def range_of(self, block: int, num_blocks: int, *, overlap: float = 0.0) -> tuple[float, float]:
        """The lowest and highest t that block `block` is trained on.

        Its own range of alpha, widened by `overlap/B` at each end and clamped to [0, 1].
        """
        low, high = self._ratios(block, num_blocks, overlap)
        return self._time(low), self._time(high)

    def sample(
        self,
        block: int,
        num_blocks: int,
        shape: Sequence[int],
        *,
        overlap: float = OVERLAP,
        top_share: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws times of one block: evenly spaced with one random shift (antithetic).

        alpha (or t, see `draw`) is uniform on the block's widened range: its position in the range
        is `(u + i/N) mod 1` for element i of N and u uniform, so that a batch covers the range
        evenly and the loss has less variance. Drawn in float64, rounded to float32, clamped to the
        float32 numbers of the range, and never below 1e-6. With probability `top_share`, each is
        instead 1 (all masked).

        Args:
            block: the block.
            num_blocks: number of blocks.
            shape: shape of the result, [N].
            overlap: how far the range is widened, as a fraction of 1/B.
            top_share: fraction of draws, in [0, 1], that are 1 in any block.
            generator: source of the draw; its device is the default of `device`.
            device: device of the draw.

        Returns:
            float32 t of the given shape.
        """
        low, high = self.range_of(block, num_blocks, overlap=overlap)
        check_share("top_share", top_share)
        drawn_on = draw_device(generator)
        device = drawn_on if device is None else device
        N = math.prod(shape)
        shift = torch.rand((), generator=generator, device=device, dtype=torch.float64)
        place = torch.arange(N, device=device, dtype=torch.float64) / max(N, 1) + shift
        place = place.remainder(1).view(tuple(shape))
        if self.draw == "t":
            t = low + (high - low) * place
        else:
            first, last = self._ratios(block, num_blocks, overlap)
            t = self.time_at(first + (last - first) * place)
        t = clamp_inside(t.float(), max(low, T_MIN), high)
        return with_top(t, 1.0, top_share, generator)

    def block_of(self, t: Tensor, num_blocks: int) -> Tensor:
        """The block that owns each t: the number of inner boundaries >= t.

        Both are compared in the dtype of t (float32 for float64), as for noise levels.

        Args:
            t: floating point, any shape.
            num_blocks: number of blocks.

        Returns:
            int64 of the shape of t.
        """
        return owner_of(t, self.boundaries(num_blocks), self.symbol)

    def steps(self, n: int, spacing: Literal["equal_mass", "uniform"] = "equal_mass") -> Tensor:
        """A sampling grid from t = 1: n times for n steps, of which the last ends at t = 0.

        `equal_mass` has equal increments of alpha, so that each step unmasks the same number of
        tokens on average and each block is called equally often; `uniform` has equal decrements of
        t, which for cosine begins with fewer tokens per step.

        Args:
            n: number of times; 1 gives [1].
            spacing: the rule.

        Returns:
            Descending float64 [n] on the CPU.
        """
        n = check_count("number of steps", n)
        if spacing not in ("equal_mass", "uniform"):
            raise ValueError(f"spacing must be 'equal_mass' or 'uniform', got {spacing!r}")
        if spacing == "equal_mass":
            return self.boundaries(n)[:-1]
        return 1 - torch.arange(n, dtype=torch.float64, device="cpu") / n

    def level(self, t: Tensor) -> MaskLevel:
        """The coefficients at t, in float32 (float64 for float64)."""
        masked = self.masked(t)
        return MaskLevel(computed(t), self.alpha(t), masked, math.pi * masked)

    def state(self, z: Tensor) -> Tensor:
        """z unchanged, tokens int64 [N, T].

        Raises:
            TypeError: they are not int64.
        """
        if z.dtype != torch.int64:
            raise TypeError(
                f"z must be tokens, int64 with MASKED = {MASKED} where masked, got {z.dtype}"
            )
        return z

    def corrupt(self, y: Tensor, level: MaskLevel, seed: int | Tensor | F.OffsetSeed) -> F.Noised:
        """Masks tokens: `z = where(u < masked, MASKED, y)`, and z again.

        u is uniform and a function only of the seed and of the token's index in y, so that it is
        the same for all t; see `dblocks.schedules.random.uniforms`.

        Args:
            y: tokens, int64 [N, T].
            level: of t [N].
            seed: an int of 64 bits, or a 0-d int64 tensor on the device.
        """
        z = torch.where(uniforms(y.shape, seed, y.device) < level.masked[:, None], MASKED, y)
        return F.Noised(z, z)

    def scale_in(self, z: Tensor, level: MaskLevel) -> Tensor:
        """z itself."""
        return z

    def loss_weight(
        self, t: Tensor, block: int = 0, num_blocks: int = 1, *, overlap: float = 0.0
    ) -> Tensor:
        """The weight that makes the expected loss the bound over the range of the draw.

        With `draw="alpha"` it is the range's length in alpha divided by `1 - alpha(t)`; with
        `draw="t"` its length in t times `-alpha'(t)/(1 - alpha(t))`. Float32 (float64 for float64).
        Without overlap the bounds of the blocks sum to the whole bound.
        """
        if self.draw == "alpha":
            low, high = self._ratios(block, num_blocks, overlap)
            return (high - low) / self.masked(t)
        low, high = self.range_of(block, num_blocks, overlap=overlap)
        return -(high - low) * self.alpha_prime(t) / self.masked(t)

    def _ratios(self, block: int, num_blocks: int, overlap: float) -> tuple[float, float]:
        """The smallest and largest mask ratio of a block's widened range."""
        num_blocks = check_count("num_blocks", num_blocks)
        block = check_block(block, num_blocks)
        check_overlap(overlap)
        low = 1 - (block + 1 + overlap) / num_blocks
        return max(low, 0.0), min(1 - (block - overlap) / num_blocks, 1.0)

    def _time(self, masked: float) -> float:
        if self.kind == "linear":
            return masked
        return math.sqrt(masked) if self.kind == "poly2" else 2 / math.pi * math.asin(masked)
