"""An autoregressive language model that predicts a token by denoising its embedding.

The target at a position is the embedding of its token; noisy rows see the clean tokens before their
own. The same network runs end to end as a plain next-token model, the baseline. `dblocks.generate`
generates text with both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dblocks.blocks import Batch, TokenTarget
from dblocks.blocks.targets.entries import check_entries
from dblocks.blocks.targets.padding import from_front
from dblocks.blocks.targets.token_batch import TokenBatch, moved_to_front
from dblocks.models.doubled_rows import attend_doubled, run_doubled
from dblocks.models.language_config import LanguageModelConfig
from dblocks.models.language_model import Hidden, LanguageModel
from dblocks.nn import Attend, Rotary
from dblocks.sampling.cache import KVCache, Slots
from dblocks.schedules import NoiseLevel
from dblocks.schedules.random import check_generator


@dataclass(frozen=True)
class CausalLMConfig(LanguageModelConfig):
    """Sizes of a `CausalLM`; the defaults are a small model of characters or bytes."""

    depth: int = 12
    """Number of layers."""
    tokens_per_block: int = 1
    """Number of consecutive tokens that are predicted at once, from the tokens before them and from
    each other's noisy embeddings; `tokens_per_sigma` must be a multiple of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("depth", "tokens_per_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.tokens_per_sigma is not None and self.tokens_per_sigma % self.tokens_per_block:
            raise ValueError(
                "tokens_per_sigma must be None or a multiple of "
                f"tokens_per_block={self.tokens_per_block}, whose tokens share a noise level, "
                f"got {self.tokens_per_sigma}"
            )


class Context(NamedTuple):
    """The context from which noisy rows are predicted."""

    x: Tensor
    """Embeddings of the clean tokens, [N, T, D]; in a single stream those of the tokens before."""
    rotary: Rotary
    """Rotary embeddings of the rows; in doubled rows, those of the clean rows first."""
    attend: Attend | None
    """The attention of the layers; None for plain causal attention."""
    starts: Tensor | None = None
    """Where texts began that were moved to the front, int64 [N]; None without padding."""


class CausalLM(LanguageModel):
    """A Llama-like language model; `DiffusionBlocks(CausalLM(config), ...)` trains it in blocks.

    As denoiser of a single stream, with k = `tokens_per_block`, row i is

        E[token i - k] + a*embed_scale/sqrt(D) * c_in*z_i + embed_scale/sqrt(D) * level_i

    (without the last term if the layers have AdaLN), and attends to the rows of its block of k
    tokens and of earlier ones: with k = 1 this is plain causal attention. A step runs the block's
    layers once, with one row per token.

    In doubled rows, clean row i attends to clean rows up to the end of its block of k tokens, noisy
    row i to the clean rows before its block and to the noisy ones in it. Clean rows have the null
    conditioning, so their cache is valid for every noise level. In both forms the noisy tokens of a
    block see each other, but no clean token of their own block.

    See `LanguageModel` for batches, the output head, the loss and the initialisation.

    End to end, `lm(tokens)` is the plain model under the null conditioning: row i predicts token
    i + 1.

    Args:
        config: the sizes.

    Source: Shing et al. 2026; the layer: Touvron et al. 2023 (Llama 2).
    """

    config: CausalLMConfig
    reads = ()
    call_reads = ("tokens", "cu_seqlens", "attention_mask")

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__(config)

    @property
    def block_size(self) -> int:
        """`tokens_per_block`."""
        return self.config.tokens_per_block

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """The plain model: tokens [N, T] to logits [N, T, V] of the tokens that follow, float32.

        With `cu_seqlens` the attention mask has T*T elements. `attention_mask` [N, T]
        is 0 at padding before or after each text.
        """
        given = {"tokens": tokens, "cu_seqlens": cu_seqlens, "attention_mask": attention_mask}
        batch = TokenBatch.of(given, self.config, padding=True)
        batch, starts = moved_to_front(batch)
        target = self.target.fixed()
        return from_front(target.next_logits(self._plain_features(batch, target)), starts)

    def next_token_loss(self, batch: Batch) -> Tensor:
        """The mean cross-entropy of the plain model over the scored tokens, 0-d, in nats.

        Args:
            batch: as for training in blocks.
        """
        given, _ = moved_to_front(TokenBatch.of(batch, self.config, padding=True))
        check_entries(self, batch, self.target)
        target = self.target.fixed()
        return target.next_loss(self._plain_features(given, target), given)

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Context:
        """The clean rows; see `LanguageModel.embed_condition`."""
        (given, starts), k = self._checked(batch, drop), self.block_size
        e, positions = self._embed(given.tokens, self.target_embedding.rows()), given.positions()
        if self.config.rows == "single":
            before = self._or_start(e.roll(k, 1), positions)
            return Context(before, self._rotary(positions), given.attend_causally(k), starts)
        doubled = attend_doubled(given.cu_seqlens, k)
        return Context(e, self._rotary(positions.repeat(2)), doubled, starts)

    def run_layers(
        self, layers: Sequence[nn.Module], z_in: Tensor, level: NoiseLevel, condition: Context
    ) -> Hidden:
        """Runs `layers` on the noisy embeddings; see `LanguageModel.run_layers`."""
        cond, starts = self._cond(level), condition.starts
        z_in, inner = self._to_front(z_in, cond, starts)
        before, rotary = condition.x, condition.rotary
        attends = [cast(Attend, condition.attend)] * len(layers)
        if self.config.rows == "single":
            noisy = self._run_single(layers, before, z_in, inner, rotary, attends).x
        else:
            noisy = run_doubled(
                layers, before, self._noisy_rows(z_in, before), inner, rotary, attends,
                last=layers[-1],
            )[1]  # fmt: skip
        return Hidden(from_front(noisy, starts), cond)

    def new_cache(self, slots: Slots, layers: Sequence[nn.Module]) -> KVCache:
        """A cache for `run_cached` with these layers."""
        return KVCache(slots, len(layers))

    def run_cached(
        self,
        layers: Sequence[nn.Module],
        z_in: Tensor,
        level: NoiseLevel,
        tokens: Tensor,
        cache: KVCache,
        table: Tensor,
    ) -> Hidden:
        """As `run_layers` for some noisy rows; see `LanguageModel.run_cached`."""
        C, single = tokens.shape[1], self.config.rows == "single"
        rows = z_in.shape[1] + (0 if single else C)
        positions, attends = cache.positions(rows), cache.attends(rows)
        clean, cond, rotary = (
            self._embed(tokens, table), self._cond(level), self._rotary(positions)
        )  # fmt: skip
        if single:
            e = cache.before(clean, self.block_size)
            before = self._or_start(e, positions)
            hidden = self._run_single(layers, before, z_in, cond, rotary, attends)
            cache.commit(C, e[:, C:])
            noisy_cond = None if hidden.cond is None else hidden.cond[:, C:]
            return Hidden(hidden.x[:, C:], noisy_cond)
        _, noisy = run_doubled(
            layers, clean, self._noisy_rows(z_in, clean), cond, rotary, attends, last=layers[-1]
        )
        cache.commit(C)
        return Hidden(noisy, cond)

    @property
    def plain_noise_width(self) -> int:
        """0: the plain model draws nothing."""
        return 0

    def plain_steps(self, num_steps: int | None) -> int:
        """1: the plain model runs its layers once.

        Raises:
            ValueError: `num_steps` is another number.
        """
        if num_steps not in (None, 1):
            raise ValueError(
                "num_steps must be 1 or None for a plain CausalLM, which runs its layers once, "
                f"got {num_steps}"
            )
        return 1

    def next_token_logits(
        self, tokens: Tensor, *, num_steps: int = 1, generator: torch.Generator | None = None
    ) -> Tensor:
        """As `forward`; the generator is not drawn from."""
        check_generator(generator)
        return self(tokens)

    def new_plain_cache(self, slots: Slots, num_steps: int) -> KVCache:
        """A cache for `next_logits`."""
        return KVCache(slots, len(self.layers))

    def next_logits(
        self,
        tokens: Tensor,
        cache: KVCache,
        target: TokenTarget,
        *,
        num_steps: int = 1,
        normals: Tensor | None = None,
    ) -> Tensor:
        """The plain model's logits [N, V]; see `LanguageModel.next_logits`."""
        C = tokens.shape[1]
        rotary, x = self._rotary(cache.positions(C)), self._embed(tokens, target.rows())
        for layer, attend in zip(self.layers, cache.attends(C), strict=True):
            x = layer(x, None, rotary=rotary, attend=attend)
        x = cache.last_row(x)
        cache.commit(C)
        return target.next_logits(self._normed(x))[:, 0]

    def _run_single(
        self,
        layers: Sequence[nn.Module],
        before: Tensor,
        z_in: Tensor,
        cond: Tensor | None,
        rotary: Rotary,
        attends: Sequence[Attend | None],
    ) -> Hidden:
        """Runs a single stream: rows of the tokens before, plus noisy embeddings."""
        x, inner = self._with_level(before + self._noise(z_in).to(before.dtype), cond)
        for layer, attend in zip(layers, attends, strict=True):
            x = layer(x, inner, rotary=rotary, attend=attend)
        return Hidden(x, cond)

    def _or_start(self, e: Tensor, positions: Tensor) -> Tensor:
        """Embeddings `e` of the tokens one block earlier; a learned row where there is none."""
        known = positions >= self.block_size
        return torch.where(known[..., None], e, self.noisy_row.to(e.dtype))

    def _make_layers(self) -> None:
        self.layers = self._layers_of(self.config.depth, self.config.conditioning)

    def _plain_features(self, batch: TokenBatch, target: TokenTarget) -> Tensor:
        x, rotary = self._embed(batch.tokens, target.rows()), self._rotary(batch.positions())
        attend = batch.attend_causally()
        for layer in self.layers:
            x = layer(x, None, rotary=rotary, attend=attend)
        return self._normed(x)
