"""Options common to all runs, which are also the flags of `dblocks train`.

`dblocks train` shows the fields as flags and their docstrings as help.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch

from dblocks.blocks import Weighting
from dblocks.blocks.config import Shared
from dblocks.config import JsonConfig, check_block, check_count, check_finite
from dblocks.recipes.data.splits import Part
from dblocks.scale.host import Host
from dblocks.scale.mesh import Sharding
from dblocks.scale.residency import Prefetch

if TYPE_CHECKING:
    from dblocks.recipes.trainer import Trainer

SEED_END = 2**63
REDUCE_EVERY = 100
PLACES = ("resident", "prefetch", "host", "sharding")  # fields that do not affect results
# Fields that earlier records lack; written only if they differ from the default.
ADDED = ("shared", "block", "data_path", "fold", "decay", "reduce_every", "steps_per_visit")
ADDED += ("lr_end", "ema", "crop", "flip", "rand_augment", "dropout", *PLACES)


def check_seed(seed: int) -> None:
    """Raises ValueError unless PyTorch's generators accept the seed, also with BLOCK_SEED added."""
    if not 0 <= seed < SEED_END:
        raise ValueError(f"seed must be at least 0 and less than 2**63, got {seed}")


def check_device(device: str) -> None:
    """Raises ValueError unless tensors can be created on the device."""
    try:
        if torch.empty(0, device=device).is_meta:
            raise RuntimeError("its tensors have no values")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be available to PyTorch, such as cpu, got {device!r}: {reason}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Run(JsonConfig, ABC):
    """All options that determine the result of a run."""

    blocks: int = 3
    """Number of blocks; more blocks need less memory and less time per step."""
    end_to_end: bool = False
    """Train all layers together, as a baseline; `--blocks` is then ignored."""
    steps: int
    """Training steps, each on one batch and one block, which is drawn at random."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, after --warmup and before --decay."""
    seed: int = 0
    """Seed of the weights, the order of the data and the noise. The held-out data do not depend on
    it."""
    part: Part = "final"
    """Split of the data: "selection" does not use the held-out part of "final"."""
    batch_size: int
    """Batch size."""
    depth: int = 12
    """Number of layers."""
    weighting: Weighting = "clamped"
    """Factor of a loss at noise level sigma, in blocks: none, 1; edm, the weight
    w = (sigma^2 + sigma_data^2)/(sigma*sigma_data)^2; clamped, min(w, 20); batch_mean, the mean of
    w over the batch; auto, edm for images and none for classes and tokens."""
    warmup: float = 0.05
    """Fraction of the steps in which the learning rate rises."""
    weight_decay: float = 0.05
    """Weight decay of AdamW, for matrices."""
    clip: float = 1.0
    """Largest gradient norm; larger gradients are clipped."""
    points: int = 10
    """Number of evaluations during training, evenly spaced."""
    device: str = "cpu"
    """Device to train on, by PyTorch's name."""
    bf16: bool = False
    """Compute the layers in bfloat16 (autocast)."""

    shared: Shared | None = None
    """How parameters outside the layers are trained: train, by the steps of all blocks; frozen;
    private, a copy for each block; or reduce, copies that are averaged every `--reduce-every`
    steps. By default train, or private with `--block`."""
    reduce_every: int | None = None
    """Steps between two averages with `--shared reduce`; 100 by default."""
    block: int | None = None
    """Train only this block, counted from 0, and write it to the folder block-N of `--out`. Jobs of
    different blocks are independent and may run anywhere, at any time. Each takes the same steps as
    its block in a run of all blocks; `dblocks merge` merges them into one network."""

    decay: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: a cosine from --lr to --lr-end, or constant."""
    lr_end: float = 0.0
    """Learning rate at the end of the cosine."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, such as 0.9999. The average is
    evaluated and saved; checkpoints hold both. After n steps of a block the decay is at most (1 +
    n)/(10 + n). By default there is no average."""
    resident: bool = False
    """Keep the parameters and optimizer state of one block on the device, and those of the others
    on the host. No effect with `--block`."""
    steps_per_visit: int | None = None
    """With `--resident`, steps on a block before the next one is drawn; 1 by default."""
    prefetch: Prefetch | None = None
    """With `--resident`, the part of the next block that is copied in advance: none, parameters or
    all."""
    host: Host | None = None
    """With `--resident`, storage of the other blocks: pinned memory, or a file."""
    sharding: Sharding | None = None
    """How several processes of torchrun train a block together: with ddp, each holds the whole
    block; with fsdp, a shard of it. No effect with one process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch_size", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), float):
                check_finite(field.name, value)
        if not 0 <= self.lr_end <= self.lr:
            raise ValueError(f"lr_end must be between 0 and lr {self.lr}, got {self.lr_end}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be a fraction of steps, in [0, 1], got {self.warmup}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and less than 1, got {self.ema}")
        if self.clip <= 0:
            raise ValueError(f"clip must be positive, got {self.clip}")
        check_seed(self.seed)
        if not self.end_to_end and not 1 <= self.blocks <= self.depth:
            raise ValueError(
                f"blocks must be between 1 and the number of layers, {self.depth}, "
                f"got {self.blocks}"
            )
        self._check_sharing()
        self._check_residency()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, without newer fields that have their default value."""
        defaults = {field.name: field.default for field in fields(self) if field.name in ADDED}
        values = super().to_dict()
        return {k: v for k, v in values.items() if k not in ADDED or v != defaults[k]}

    def settings(self) -> dict[str, Any]:
        """As `to_dict`, without the fields of placement."""
        return {k: v for k, v in self.to_dict().items() if k not in PLACES}

    @property
    def sharing(self) -> Shared:
        """How parameters outside the layers are trained."""
        return self.shared or ("train" if self.block is None else "private")

    @property
    def averaged_every(self) -> int | None:
        """Steps between two averages of shared parameters; None without averages."""
        return (self.reduce_every or REDUCE_EVERY) if self.sharing == "reduce" else None

    @property
    def num_blocks(self) -> int:
        """Number of blocks; 1 end to end."""
        return 1 if self.end_to_end else self.blocks

    @property
    def name(self) -> str:
        """The name of the run in a table."""
        if self.end_to_end:
            return "end to end"
        return f"{self.blocks} block{'s' if self.blocks > 1 else ''}"

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: a linear rise, then a cosine to `lr_end` or a constant.

        In blocks it also depends on the global step, whichever block is drawn.
        """
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        if self.decay == "constant":
            return self.lr
        fraction = (step - rise) / max(1, self.steps - rise)
        cosine = 0.5 * (1 + math.cos(math.pi * fraction))
        return self.lr_end + (self.lr - self.lr_end) * cosine

    def _check_sharing(self) -> None:
        if self.reduce_every is not None:
            check_count("reduce_every", self.reduce_every)
            if self.shared != "reduce":
                raise ValueError(
                    "reduce_every must be left out without shared='reduce', "
                    f"got {self.reduce_every} and {self.shared!r}"
                )
        if self.end_to_end and not self.block is self.shared is None:
            raise ValueError(
                "block and shared must be left out end to end, where there are no blocks, "
                f"got block={self.block} and shared={self.shared!r}"
            )
        if self.block is None:
            return
        check_block(self.block, self.blocks)
        if self.shared == "train":
            raise ValueError(
                "shared must be private, frozen or reduce if one block is trained alone, "
                "got 'train': each job would train its own copy of the shared parameters, and "
                "the copies would diverge"
            )

    def _check_residency(self) -> None:
        if self.resident and self.end_to_end:
            raise ValueError("resident must be left out end to end, where there are no blocks")
        for name in ("steps_per_visit", "prefetch", "host"):
            if (value := getattr(self, name)) is not None and not self.resident:
                raise ValueError(f"{name} must be left out without resident=True, got {value!r}")
        visit = self.steps_per_visit
        if visit is not None and visit < 1:
            raise ValueError(f"steps_per_visit must be positive, got {visit}")
        if visit not in (None, 1) and self.block is not None:
            raise ValueError(
                "steps_per_visit must be left out if one block is trained alone, whose steps are "
                f"those drawn for it, got {visit}"
            )

    @abstractmethod
    def trainer(self) -> Trainer:
        """The network of this run with its data, ready to train."""
