"""The random numbers of a training step, drawn for the batches of all processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dblocks import functional as F
from dblocks.blocks.sharding import Replicas, reduced
from dblocks.blocks.targets.base import Batch, Target
from dblocks.schedules import Schedule

LEVEL_KEY = 0x5DEECE66D  # any number but 0


class GlobalBatch(NamedTuple):
    """The part of a global batch that this process has."""

    sigma: Tensor
    """The levels of all samples, [N * processes, ...]."""
    first: int
    """The index of the first sample here."""
    factor: Tensor | None
    """Factor of the loss of the samples here, 0-d, so that the mean over processes is the loss of
    all samples; None for 1."""

    def here(self, values: Tensor, like: Tensor) -> Tensor:
        """The part of `values`, of all samples, for the samples here, as many as in `like`."""
        return values[self.first : self.first + len(like)]


class Draw(NamedTuple):
    """The random numbers of one training step, on the device."""

    sigma: Tensor
    """float32 levels [N] (or [N, T]): sigma, or t where tokens are masked."""
    seed: Tensor
    """0-d int64: seed of the noise or the masks."""
    drop: Tensor | None
    """bool [N]: true where the condition is dropped; None if the model never drops it."""
    whole: GlobalBatch | None = None
    """The global batch that these samples are part of; None if they are all of it."""

    def seed_of(self, y: Tensor) -> Tensor | F.OffsetSeed:
        """The seed of the noise of a target [N, ...], offset by the first sample here."""
        if self.whole is None:
            return self.seed
        return F.OffsetSeed(self.seed, self.whole.first * (y.numel() // max(len(y), 1)))


def draw_levels(
    schedule: Schedule, seed: int, shape: tuple[int, ...], block: int, num_blocks: int, *,
    overlap: float, top_share: float, condition_drop: float, device: torch.device,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The levels of a batch and where the condition is dropped; functions of the seed.

    Args:
        schedule: the distribution of the levels.
        seed: of 63 bits.
        shape: of sigma.
        block: the block.
        num_blocks: number of blocks.
        overlap: as of `Schedule.sample`.
        top_share: as of `Schedule.sample`.
        condition_drop: the probability of a drop; with 0 nothing is drawn.
        device: device of the draws.
    """
    # The generator of a GPU is Philox too: with the same key, sigma would come from the same bits
    # as the noise of the first elements.
    key = seed if device.type == "cpu" else seed ^ LEVEL_KEY
    on_device = torch.Generator(device).manual_seed(key)
    sigma = schedule.sample(
        block, num_blocks, shape,
        overlap=overlap, top_share=top_share, generator=on_device, device=device,
    )  # fmt: skip
    if condition_drop <= 0:
        return sigma, None
    return sigma, torch.rand(shape[0], generator=on_device, device=device) < condition_drop


def part_of(
    drawn: Draw,
    batch: Batch,
    block: int,
    target: Target,
    shape: tuple[int, ...],
    replicas: Replicas,
) -> Draw:
    """This process's part of a draw for the batches of all processes, in their order.

    Raises:
        ValueError: the batches are not of the same shapes, or the blocks not the same; on a GPU the
            device says so.
    """
    N, device = shape[0], drawn.sigma.device
    _check_alike(batch, N, block, replicas, device)
    scored, factor = target.scored(batch), None
    if scored is not None:
        mine = scored.detach().to(device, torch.float32)
        factor = replicas.count * mine / reduced(mine.clone(), replicas, "sum").clamp(min=1)
    whole = GlobalBatch(drawn.sigma, replicas.rank * N, factor)
    rows = slice(whole.first, whole.first + N)
    drop = None if drawn.drop is None else drawn.drop[rows]
    return Draw(drawn.sigma[rows], drawn.seed, drop, whole)


def _check_alike(
    batch: Batch, N: int, block: int, replicas: Replicas, device: torch.device
) -> None:
    """Raises unless all processes train one block, on samples of one size.

    Noise is indexed by element: with samples of different sizes, processes would share noise.
    """
    given: dict[str, Any] = {
        key: list(v.shape)
        for key, v in batch.items()
        if isinstance(v, Tensor) and v.ndim and len(v) == N
    }
    size = float(N * 2**32 + sum(batch[key].numel() for key in given))
    found = torch.tensor([block, -block, size, -size], dtype=torch.float64, device=device)
    last, first, largest, smallest = reduced(found, replicas, "max").unbind()
    of_blocks = (
        "block must be the same in all processes that share a batch; give the same one, or none: "
        "then the first process draws it"
    )
    of_shapes = (
        "the batches of all processes must have the same shapes, since noise is that of the global "
        "batch; pad them to one length, and leave out a last batch that does not divide"
    )
    if device.type != "cpu":
        torch.ops.aten._assert_async.msg(last == -first, of_blocks)
        torch.ops.aten._assert_async.msg(largest == -smallest, of_shapes)
    elif last != -first:
        raise ValueError(f"{of_blocks}; got blocks {[int(-first), int(last)]}")
    elif largest != -smallest:
        raise ValueError(f"{of_shapes}; got {given} in process {replicas.rank}")
