"""Computes the logits of the next tokens in text generation, for plain models and blocks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dblocks.blocks import DiffusionBlocks
from dblocks.sampling.cache import KVCache, Slots
from dblocks.sampling.interface import NextTokenNetwork
from dblocks.sampling.rows import Known, Rows
from dblocks.sampling.steps import Sampler, Steps


class Writer(Protocol):
    """Computes the logits of the next tokens."""

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Number of rows of normals for each prompt, and the width of a row."""
        ...

    def next_logits(self, tokens: Tensor, noise: Tensor, step: int) -> Tensor:
        """Logits [N, k, V] of the k tokens after `tokens` [N, P], k = `Slots.block_size`.

        Args:
            tokens: the prompts and the tokens generated so far.
            noise: normal random numbers [N, *noise_shape], one row per step or per position.
            step: number of tokens generated so far.
        """
        ...


class PlainWriter:
    """Logits from a plain model."""

    def __init__(self, lm: NextTokenNetwork, num_steps: int, slots: Slots, *, cache: bool) -> None:
        self.lm = lm
        self.num_steps = num_steps
        self.slots = slots
        self.noise_shape = (slots.capacity, lm.plain_noise_width)
        self.target = lm.target.fixed()
        self.cache = self._new_cache() if cache else None

    def next_logits(self, tokens: Tensor, noise: Tensor, step: int) -> Tensor:
        """See `Writer`; noise is per position."""
        cache = self.cache or self._new_cache()
        return self.lm.next_logits(
            tokens[:, cache.committed :],
            cache,
            self.target,
            num_steps=self.num_steps,
            normals=noise,
        )[:, None]

    def _new_cache(self) -> KVCache:
        return self.lm.new_plain_cache(self.slots, self.num_steps)


class StepWriter:
    """Logits of the last of several denoising steps in blocks.

    Args:
        model: the blocks.
        rows: runs one block.
        levels: levels of the steps, on the CPU.
        blocks: index of the block of each level.
        sampler: "euler" or "heun".
    """

    def __init__(
        self,
        model: DiffusionBlocks,
        rows: Rows,
        levels: Tensor,
        blocks: list[int],
        sampler: Sampler = "euler",
    ) -> None:
        self.schedule = model.config.noise_schedule
        self.rows = rows
        self.noise_shape = rows.noise_shape
        self.steps = Steps(levels.tolist(), sampler)
        self.blocks = [blocks[i] for i in self.steps.calls]

    def next_logits(self, tokens: Tensor, noise: Tensor, step: int) -> Tensor:
        """See `Writer`."""
        known, fresh = self.rows.begin(tokens, noise, step)
        z = self.steps.follow(
            lambda z, call: self._denoised(known, z, call), self.steps.grid[0] * fresh
        )
        last = len(self.blocks) - 1
        level = self.schedule.level(z.new_full(z.shape[:1], self.steps.sigma(last)))
        return self.rows.logits(known, self.blocks[last], z, level)

    def _denoised(self, known: Known, z: Tensor, call: int) -> Tensor:
        level = self.schedule.level(z.new_full(z.shape[:1], self.steps.sigma(call)))
        block = self.blocks[call]
        logits = self.rows.logits(known, block, z, level)
        return self.rows.denoised(block, logits, z, level)


class ProductWriter:
    """The mean of all blocks' log-probabilities at sigma_max.

    Args:
        model: blocks that were all trained at sigma_max.
        rows: runs one block.
    """

    def __init__(self, model: DiffusionBlocks, rows: Rows) -> None:
        self.schedule = model.config.noise_schedule
        self.num_blocks = model.config.num_blocks
        self.rows = rows
        self.noise_shape = rows.noise_shape

    def next_logits(self, tokens: Tensor, noise: Tensor, step: int) -> Tensor:
        """See `Writer`."""
        known, fresh = self.rows.begin(tokens, noise, step)
        z = self.schedule.sigma_max * fresh
        level = self.schedule.level(z.new_full(z.shape[:1], self.schedule.sigma_max))
        total = torch.zeros_like(fresh[:, :, :1])
        for block in range(self.num_blocks):
            logits = self.rows.logits(known, block, z, level)
            total = total + logits.log_softmax(-1) / self.num_blocks
        return total
