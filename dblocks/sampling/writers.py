"""What gives the logits of the next tokens when text is written: a plain model, or blocks."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from dblocks import functional as F
from dblocks.blocks import DiffusionBlocks, trained_at_top
from dblocks.integrations.convert.causal_lm import ConvertedCausalLM
from dblocks.models.language_model import Hidden, LanguageModel
from dblocks.sampling.cache import KVCache, Slots
from dblocks.schedules.noise import NoiseLevel


class Writer(Protocol):
    """Gives the logits of the next token."""

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Rows of normals that are drawn for each prompt, and how many are in one."""
        ...

    def next_logits(self, tokens: Tensor, noise: Tensor, step: int) -> Tensor:
        """Logits [N, k, V] of the k tokens after `tokens` [N, P], k = `Slots.block_size`.

        Args:
            tokens: the prompts, and what was written after them.
            noise: normals [N, *noise_shape]; a row is of a step, or of a position.
            step: how many tokens were written before.
        """
        ...


class PlainWriter:
    """Logits from a plain model."""

    def __init__(self, lm: LanguageModel, num_steps: int, slots: Slots, *, cache: bool) -> None:
        self.lm = lm
        self.num_steps = num_steps
        self.slots = slots
        self.noise_shape = (slots.capacity, lm.plain_noise_width)
        self.target = lm.target.fixed()
        self.cache = self._new_cache() if cache else None

    def next_logits(self, tokens: Tensor, noise: Tensor, step: int) -> Tensor:
        """See `Writer`; noise is of positions, as every token needs what was drawn for it."""
        cache = self.cache or self._new_cache()
        return self.lm.next_logits(
            tokens[:, cache.committed :], cache, self.target, num_steps=self.num_steps, noise=noise
        )[:, None]

    def _new_cache(self) -> KVCache:
        return self.lm.new_plain_cache(self.slots, self.num_steps)


class BlockWriter:
    """Logits from blocks: by Euler steps, or of the product of their predictions at the top."""

    def __init__(
        self,
        model: DiffusionBlocks,
        sigmas: Tensor,
        blocks: list[int],
        slots: Slots,
        *,
        cache: bool,
        product: bool,
    ) -> None:
        self.model = model
        self.grid: list[float] = sigmas.tolist()
        self.blocks = blocks
        self.slots = slots
        self.product = product
        self.lms = {b: cast(LanguageModel, model.parts(b)[0]) for b in set(blocks)}
        # In a single stream also the rows of known tokens hold noise, each position its own.
        self.single = self.lms[blocks[0]].config.rows == "single"
        rows = slots.capacity if self.single else slots.capacity - slots.prompt
        self.noise_shape = (rows, self.lms[blocks[0]].config.width)
        self.targets = {block: lm.target.fixed() for block, lm in self.lms.items()}
        self.caches = {block: self._new_cache(block) for block in self.lms} if cache else None

    def next_logits(self, tokens: Tensor, noise: Tensor, step: int) -> Tensor:
        """See `Writer`; noise is of steps, in a single stream of positions."""
        k, end = self.slots.block_size, tokens.shape[1]
        fresh = self._of(noise, end, end + k) if self.single else noise[:, step : step + k]
        z, total = self.grid[0] * fresh, torch.zeros_like(fresh[:, :, :1])
        for i, (sigma, block) in enumerate(zip(self.grid, self.blocks, strict=True)):
            lm, target = self.lms[block], self.targets[block]
            level = self.model.config.noise_schedule.level(z.new_full(z.shape[:1], sigma))
            features = lm.features(self._run(block, tokens, noise, z, level))
            logits = target.predict(features, z, level)
            if self.product:
                total = total + logits.log_softmax(-1) / len(self.grid)
            elif i + 1 < len(self.grid):
                denoised = target.denoise(logits, z, level)
                z = F.euler_step(z, denoised, sigma, self.grid[i + 1])
        return total if self.product else logits

    def _run(
        self, block: int, tokens: Tensor, noise: Tensor, z: Tensor, level: NoiseLevel
    ) -> Hidden:
        """What a block's layers leave of the noisy rows z, beside known tokens."""
        lm, table = self.lms[block], self.targets[block].rows()
        cache = self._new_cache(block) if self.caches is None else self.caches[block]
        known = tokens[:, cache.committed :]
        schedule = self.model.config.noise_schedule
        if self.single:
            top = top_level(self.model, block)
            held = top * self._of(noise, cache.committed, tokens.shape[1])
            if top < schedule.sigma_max:
                # At sigma_max noise is all that there is, as where sampling starts.
                held = held + table[known]
            z = torch.cat([held, z], dim=1)
            noisy = level.sigma[:, None].expand(-1, z.shape[1] - known.shape[1])
            level = schedule.level(torch.cat([z.new_full(known.shape, top), noisy], dim=1))
        z_in = schedule.scale_in(z, level)
        return lm.run_cached(self.model.parts(block)[1], z_in, level, known, cache, table)

    def _of(self, noise: Tensor, first: int, last: int) -> Tensor:
        """The noise of the positions of the slots first to last - 1, [N, last - first, D]."""
        positions = self.slots.positions(first, last)
        if positions.ndim == 1:
            return noise[:, first:last]
        return noise.gather(1, positions[..., None].expand(-1, -1, noise.shape[2]))

    def _new_cache(self, block: int) -> KVCache:
        return self.lms[block].new_cache(self.slots, self.model.parts(block)[1])


def top_level(model: DiffusionBlocks, block: int) -> float:
    """The highest level at which a block was trained."""
    schedule = model.config.noise_schedule
    if trained_at_top(model):
        return schedule.sigma_max
    return schedule.boundaries(model.config.num_blocks)[block].item()


class WholeWriter:
    """As `BlockWriter`, for the blocks of a converted model: every call runs all rows."""

    def __init__(
        self,
        model: DiffusionBlocks,
        sigmas: Tensor,
        blocks: list[int],
        slots: Slots,
        *,
        product: bool,
    ) -> None:
        self.model = model
        self.grid: list[float] = sigmas.tolist()
        self.blocks = blocks
        self.slots = slots
        self.product = product
        network = cast(ConvertedCausalLM, model.base_model)
        self.single = network.rows_kind == "single"
        rows = slots.capacity if self.single else slots.capacity - slots.prompt
        self.noise_shape = (rows, network.width)

    def next_logits(self, tokens: Tensor, noise: Tensor, step: int) -> Tensor:
        """See `Writer`; noise is of steps, in a single stream of positions."""
        tokens, end = self._in_rows(tokens)
        sample = torch.arange(len(tokens), device=tokens.device)
        fresh = noise[sample, end] if self.single else noise[:, step]
        z, total = self.grid[0] * fresh[:, None], torch.zeros_like(fresh[:, None, :1])
        for i, (sigma, block) in enumerate(zip(self.grid, self.blocks, strict=True)):
            lm, layers = self.model.parts(block)
            level = self.model.config.noise_schedule.level(torch.full_like(fresh[:, 0], sigma))
            z_in, levels = self._rows_in(block, tokens, noise, z, level, end)
            condition = lm.embed_condition({"tokens": tokens}, None)
            hidden = lm.run_layers(layers, z_in, levels, condition)
            cond = hidden.cond if hidden.cond.ndim == 2 else hidden.cond[sample, end][:, None]
            hidden = hidden._replace(x=hidden.x[sample, end][:, None], cond=cond)
            logits = lm.target.predict(lm.features(hidden), z, level)
            if self.product:
                total = total + logits.log_softmax(-1) / len(self.grid)
            elif i + 1 < len(self.grid):
                z = F.euler_step(z, lm.target.denoise(logits, z, level), sigma, self.grid[i + 1])
        return total if self.product else logits

    def _rows_in(
        self,
        block: int,
        tokens: Tensor,
        noise: Tensor,
        z: Tensor,
        level: NoiseLevel,
        end: Tensor,
    ) -> tuple[Tensor, NoiseLevel]:
        """What enters in all rows, of which z [N, 1, D] is that at `end`, and the rows' levels."""
        schedule = self.model.config.noise_schedule
        if not self.single:
            # A noisy row feeds no other, so those that are not read may be anything.
            return schedule.scale_in(z, level).expand(-1, tokens.shape[1], -1), level
        top = top_level(self.model, block)
        held = top * noise[:, : tokens.shape[1]]
        if top < schedule.sigma_max:
            held = held + cast(ConvertedCausalLM, self.model.parts(block)[0]).target.rows()[tokens]
        last = torch.arange(tokens.shape[1], device=tokens.device) == end[:, None]
        states = torch.where(last[..., None], z, held)
        levels = schedule.level(torch.where(last, level.sigma[:, None], top))
        return schedule.scale_in(states, levels), levels

    def _in_rows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N, C + 1] without the gaps after short prompts, and where the next one is."""
        slots, C = self.slots, tokens.shape[1]
        lengths = torch.full((len(tokens),), C, device=tokens.device)
        tokens = torch.cat([tokens, tokens[:, :1]], dim=1)
        if slots.lengths is None:
            return tokens, lengths
        gap = (slots.prompt - slots.lengths)[:, None]
        place = torch.arange(C + 1, device=tokens.device)
        slot = torch.where(place < slots.lengths[:, None], place, place + gap)
        return tokens.gather(1, slot.clamp(max=C)), lengths - gap[:, 0]
