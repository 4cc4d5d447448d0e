"""The configuration of a network's blocks and of their training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from dblocks.config import JsonConfig, check_count, check_share
from dblocks.schedules import SCHEDULES, EDMSchedule, MaskSchedule, NoiseSchedule, Schedule
from dblocks.schedules.base import OVERLAP, check_schedule

Weighting = Literal["auto", "edm", "clamped", "none", "batch_mean"]
Shared = Literal["train", "frozen", "private", "reduce"]
SHARED = get_args(Shared)


@dataclass(frozen=True)
class BlocksConfig(JsonConfig):
    """Number of blocks, their layers and noise levels, and the options of their training."""

    num_blocks: int
    """Number of blocks."""
    layers_per_block: tuple[int, ...] | None = None
    """Number of layers in each block, first to last; by default equal, the first blocks taking the
    remainder."""
    schedule: Schedule = field(default_factory=NoiseSchedule, metadata={"types": SCHEDULES})
    """Distribution of noise levels (or mask ratios) and their partition into blocks."""
    overlap: float = OVERLAP
    """How far each block's training range is widened at both ends, as a fraction of its length (in
    ln sigma, or in the mask ratio)."""
    top_share: float | Literal["auto"] = "auto"
    """Fraction of every block's draws at the highest level (sigma_max, or all masked), where only
    the condition is informative, so that later blocks learn to use it too. It affects training
    only, not which block owns a level. auto is the target's default: .6 for one of K embeddings,
    else 0."""
    weighting: Weighting = "auto"
    """Weight of a sample's loss; auto is edm for L2, none for cross-entropy, and the weight of the
    ELBO for masks."""
    shared: Shared = "train"
    """Training of the parameters outside the layers: train (by every block's step), frozen, private
    (a copy per block), or reduce (private copies that `dblocks.scale.average_shared` averages every
    k steps)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule(self.schedule)
        object.__setattr__(self, "num_blocks", check_count("num_blocks", self.num_blocks))
        if self.layers_per_block is not None:
            counts = (check_count("layers_per_block", n) for n in self.layers_per_block)
            object.__setattr__(self, "layers_per_block", tuple(counts))
        if self.weighting not in self.schedule.weightings:
            raise ValueError(
                f"weighting must be one of {self.schedule.weightings} with a "
                f"{type(self.schedule).__name__}, got {self.weighting!r}"
            )
        if self.shared not in SHARED:
            raise ValueError(f"shared must be one of {SHARED}, got {self.shared!r}")
        if isinstance(self.top_share, str) and self.top_share != "auto":
            raise ValueError(
                f"top_share must be 'auto' or a number in [0, 1], got {self.top_share!r}"
            )
        if self.top_share != "auto":
            check_share("top_share", self.top_share)
        # The schedule checks the number of blocks of its partition, and the overlap.
        self.schedule.range_of(0, self.num_blocks, overlap=self.overlap)
        self._check_layers()

    @property
    def copied(self) -> bool:
        """Whether each block has its own copy of the parameters outside the layers."""
        return self.shared in ("private", "reduce")

    @property
    def noise_schedule(self) -> EDMSchedule:
        """The schedule, if it adds noise.

        Raises:
            TypeError: it masks tokens.
        """
        if self.schedule.corruption != "noise":
            raise TypeError(
                "noise levels need blocks with a NoiseSchedule, "
                f"got a {type(self.schedule).__name__}; masked tokens are sampled by dblocks.unmask"
            )
        return cast(EDMSchedule, self.schedule)

    @property
    def mask_schedule(self) -> MaskSchedule:
        """The schedule, if it masks tokens.

        Raises:
            TypeError: it adds noise.
        """
        if self.schedule.corruption != "masks":
            raise TypeError(
                "masked tokens need blocks with a MaskSchedule, "
                f"got a {type(self.schedule).__name__}"
            )
        return cast(MaskSchedule, self.schedule)

    def layer_ranges(self, num_layers: int) -> tuple[tuple[int, int], ...]:
        """The layers [first, last) of each block, which cover every layer once.

        Raises:
            ValueError: there are fewer layers than blocks, or `layers_per_block` does not sum to
                `num_layers`.
        """
        if num_layers < self.num_blocks:
            raise ValueError(
                f"num_blocks must be at most the number of layers, {num_layers}, "
                f"got {self.num_blocks}"
            )
        counts = self.layers_per_block
        if counts is None:
            each, extra = divmod(num_layers, self.num_blocks)
            counts = tuple(each + (b < extra) for b in range(self.num_blocks))
        if sum(counts) != num_layers:
            raise ValueError(
                f"layers_per_block must sum to the number of layers, {num_layers}, got {counts}"
            )
        ends = [sum(counts[: b + 1]) for b in range(self.num_blocks)]
        return tuple((end - count, end) for end, count in zip(ends, counts, strict=True))

    def _check_layers(self) -> None:
        counts = self.layers_per_block
        if counts is None:
            return
        if len(counts) != self.num_blocks:
            raise ValueError(
                f"layers_per_block must have num_blocks={self.num_blocks} entries, got {counts}"
            )


def check_config(config: object) -> None:
    """Raises TypeError unless `config` is a `BlocksConfig`."""
    if not isinstance(config, BlocksConfig):
        raise TypeError(
            f"config must be a BlocksConfig, got {config!r} of type {type(config).__name__}; "
            "BlocksConfig(3) makes three blocks"
        )
