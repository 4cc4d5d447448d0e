"""Runs one block's rows of known and next tokens in text generation."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from dblocks.blocks import DiffusionBlocks, trained_at_top
from dblocks.sampling.cache import KVCache, Slots
from dblocks.sampling.interface import CachedNetwork, CausalNetwork
from dblocks.schedules import NoiseLevel


class Known(NamedTuple):
    """The state of generation when the next k tokens are predicted."""

    tokens: Tensor
    """int64 [N, P]: the prompts and the tokens generated so far."""
    noise: Tensor
    """Normals [N, rows, D], one row per step or per position."""
    end: Tensor | None = None
    """int64 [N]: the index of the next token, not counting gaps after shorter prompts."""


class Rows(Protocol):
    """Runs one block on the noisy rows z [N, k, D] of the next k tokens."""

    noise_shape: tuple[int, int]
    """Number of rows of normals for each prompt, and the width of a row."""

    def begin(self, tokens: Tensor, noise: Tensor, step: int) -> tuple[Known, Tensor]:
        """The known state, and noise [N, k, D] of the next tokens; see `Writer.next_logits`."""
        ...

    def logits(self, known: Known, block: int, z: Tensor, level: NoiseLevel) -> Tensor:
        """Logits [N, k, V] of a block at a level [N]."""
        ...

    def denoised(self, block: int, logits: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        """The expected embeddings under logits, [N, k, D]."""
        ...


class CachedRows:
    """Runs noisy rows with a key-value cache of the known tokens in each block's layers.

    Args:
        model: blocks of a `CachedNetwork`.
        blocks: indices of the blocks that are called.
        slots: slots of the tokens.
        cache: whether to keep keys and values; otherwise every call computes all rows.
    """

    def __init__(
        self, model: DiffusionBlocks, blocks: list[int], slots: Slots, *, cache: bool
    ) -> None:
        self.model = model
        self.slots = slots
        self.lms = {b: cast(CachedNetwork, model.parts(b)[0]) for b in set(blocks)}
        lm = self.lms[blocks[0]]
        # In a single stream, the rows of known tokens hold noise too, one row per position.
        self.single = lm.rows_kind == "single"
        rows = slots.capacity if self.single else slots.capacity - slots.prompt
        self.noise_shape = (rows, lm.width)
        self.targets = {block: lm.target.fixed() for block, lm in self.lms.items()}
        self.caches = {block: self._new_cache(block) for block in self.lms} if cache else None

    def begin(self, tokens: Tensor, noise: Tensor, step: int) -> tuple[Known, Tensor]:
        """See `Rows`; noise is per step, in a single stream per position."""
        k, end = self.slots.block_size, tokens.shape[1]
        fresh = self._of(noise, end, end + k) if self.single else noise[:, step : step + k]
        return Known(tokens, noise), fresh

    def logits(self, known: Known, block: int, z: Tensor, level: NoiseLevel) -> Tensor:
        """See `Rows`."""
        features = self.lms[block].features(self._run(known, block, z, level))
        return self.targets[block].predict(features, z, level)

    def denoised(self, block: int, logits: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        """See `Rows`."""
        return self.targets[block].denoise(logits, z, level)

    def _run(self, known: Known, block: int, z: Tensor, level: NoiseLevel) -> Any:
        """The result of a block's layers for the noisy rows z, given the known tokens."""
        lm, table = self.lms[block], self.targets[block].rows()
        cache = self._new_cache(block) if self.caches is None else self.caches[block]
        cache.renew(known.tokens.shape[1])
        tokens = known.tokens[:, cache.committed :]
        schedule = self.model.config.noise_schedule
        if self.single:
            top = top_level(self.model, block)
            held = top * self._of(known.noise, cache.committed, known.tokens.shape[1])
            if top < schedule.sigma_max:
                # At sigma_max the rows hold pure noise, as at the start of sampling.
                held = held + table[tokens]
            z = torch.cat([held, z], dim=1)
            noisy = level.sigma[:, None].expand(-1, z.shape[1] - tokens.shape[1])
            level = schedule.level(torch.cat([z.new_full(tokens.shape, top), noisy], dim=1))
        z_in = schedule.scale_in(z, level)
        return lm.run_cached(self.model.parts(block)[1], z_in, level, tokens, cache, table)

    def _of(self, noise: Tensor, first: int, last: int) -> Tensor:
        """The noise at the positions of the slots first to last - 1, [N, last - first, D]."""
        positions = self.slots.positions(first, last)
        if positions.ndim == 1:
            return noise[:, first:last]
        return noise.gather(1, positions[..., None].expand(-1, -1, noise.shape[2]))

    def _new_cache(self, block: int) -> KVCache:
        return self.lms[block].new_cache(self.slots, self.model.parts(block)[1])


class WholeRows:
    """Runs all rows in every call, for networks without a key-value cache.

    Args:
        model: blocks of a `CausalNetwork` that predicts one token at a time.
        slots: slots of the tokens.
    """

    def __init__(self, model: DiffusionBlocks, slots: Slots) -> None:
        self.model = model
        self.slots = slots
        network = cast(CausalNetwork, model.base_model)
        self.single = network.rows_kind == "single"
        rows = slots.capacity if self.single else slots.capacity - slots.prompt
        self.noise_shape = (rows, network.width)

    def begin(self, tokens: Tensor, noise: Tensor, step: int) -> tuple[Known, Tensor]:
        """See `Rows`; noise is per step, in a single stream per position."""
        tokens, end = self._in_rows(tokens)
        sample = torch.arange(len(tokens), device=tokens.device)
        fresh = noise[sample, end] if self.single else noise[:, step]
        return Known(tokens, noise, end), fresh[:, None]

    def logits(self, known: Known, block: int, z: Tensor, level: NoiseLevel) -> Tensor:
        """See `Rows`."""
        lm, layers = self.model.parts(block)
        sample, end = torch.arange(len(z), device=z.device), known.end
        z_in, levels = self._rows_in(known, block, z, level)
        condition = lm.embed_condition({"tokens": known.tokens}, None)
        hidden = lm.run_layers(layers, z_in, levels, condition)
        cond = hidden.cond if hidden.cond.ndim == 2 else hidden.cond[sample, end][:, None]
        hidden = hidden._replace(x=hidden.x[sample, end][:, None], cond=cond)
        return lm.target.predict(lm.features(hidden), z, level)

    def denoised(self, block: int, logits: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        """See `Rows`."""
        return self.model.parts(block)[0].target.denoise(logits, z, level)

    def _rows_in(
        self, known: Known, block: int, z: Tensor, level: NoiseLevel
    ) -> tuple[Tensor, NoiseLevel]:
        """The input of all rows, with z [N, 1, D] as the last one, and their levels."""
        schedule, tokens = self.model.config.noise_schedule, known.tokens
        if not self.single:
            # No row attends to a noisy row, so noisy rows that are not read may have any value.
            return schedule.scale_in(z, level).expand(-1, tokens.shape[1], -1), level
        top = top_level(self.model, block)
        held = top * known.noise[:, : tokens.shape[1]]
        if top < schedule.sigma_max:
            held = held + self.model.parts(block)[0].target.embed({"tokens": tokens})
        place = torch.arange(tokens.shape[1], device=tokens.device)
        last = place == cast(Tensor, known.end)[:, None]
        states = torch.where(last[..., None], z, held)
        levels = schedule.level(torch.where(last, level.sigma[:, None], top))
        return schedule.scale_in(states, levels), levels

    def _in_rows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N, C + 1] without gaps after shorter prompts, and the index of the next token."""
        slots, C = self.slots, tokens.shape[1]
        lengths = torch.full((len(tokens),), C, device=tokens.device)
        tokens = torch.cat([tokens, tokens[:, :1]], dim=1)
        if slots.lengths is None:
            return tokens, lengths
        gap = (slots.prompt - slots.lengths)[:, None]
        place = torch.arange(C + 1, device=tokens.device)
        slot = torch.where(place < slots.lengths[:, None], place, place + gap)
        return tokens.gather(1, slot.clamp(max=C)), lengths - gap[:, 0]


def top_level(model: DiffusionBlocks, block: int) -> float:
    """The highest level at which a block was trained."""
    schedule = model.config.noise_schedule
    if trained_at_top(model):
        return schedule.sigma_max
    return schedule.boundaries(model.config.num_blocks)[block].item()
