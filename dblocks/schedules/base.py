"""What training, prediction and sampling ask of a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dblocks import functional as F


class Schedule(Protocol):
    """What training, prediction and sampling ask of a schedule: how a target is corrupted.

    `NoiseSchedule` adds Gaussian noise of deviation sigma, `MaskSchedule` masks tokens at time t.
    What is called sigma here is the level of either.
    """

    symbol: ClassVar[str]
    """What a level is called."""
    loss_kinds: ClassVar[tuple[str, ...]]
    """The losses of models that this schedule trains; see `BlockModel.loss_kind`."""
    weightings: ClassVar[tuple[str, ...]]
    """The weightings that have a meaning."""

    def boundaries(self, num_blocks: int) -> Tensor:
        """The levels that separate the blocks, descending float64 [B+1] on the CPU."""
        ...

    def range_of(self, block: int, num_blocks: int, *, overlap: float = 0.0) -> tuple[float, float]:
        """The lowest and highest level that a block is trained on."""
        ...

    def sample(
        self,
        block: int,
        num_blocks: int,
        shape: Sequence[int],
        *,
        overlap: float = ...,
        top_share: float = ...,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws levels of one block, float32 of the given shape."""
        ...

    def block_of(self, sigma: Tensor, /, num_blocks: int) -> Tensor:
        """The block that owns each level, int64 of the same shape."""
        ...

    def level(self, sigma: Tensor, /) -> Any:
        """What a model is told of the levels, each of the shape of sigma."""
        ...

    def state(self, z: Tensor) -> Tensor:
        """A corrupted target as given, in the dtype that the calls compute in."""
        ...

    def corrupt(self, y: Tensor, level: Any, seed: int | Tensor) -> F.Noised:
        """The corrupted target z, and z as the network takes it; a function of the seed."""
        ...

    def scale_in(self, z: Tensor, level: Any) -> Tensor:
        """z as the network takes it."""
        ...

    def loss_weight(
        self, sigma: Tensor, /, block: int = 0, num_blocks: int = 1, *, overlap: float = 0.0
    ) -> Tensor:
        """The weight of a loss at levels that `sample` drew with these arguments."""
        ...
