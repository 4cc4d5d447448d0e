"""An autoregressive language model that predicts a token by denoising its embedding.

The target of a position is the embedding of its token; noisy rows see the clean tokens before
their own. The same network runs end to end as a plain next-token model, the baseline.
`dblocks.generate` writes text with either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dblocks._kv_cache import KVCache, Slots
from dblocks.blocks import Batch
from dblocks.models._causal import Hidden, LanguageModel, Readout
from dblocks.models._causal_config import LanguageModelConfig
from dblocks.models._doubled import attend_doubled, run_doubled
from dblocks.models._tokens import TokenBatch
from dblocks.nn import Rotary
from dblocks.schedule import NoiseLevel


@dataclass(frozen=True)
class CausalLMConfig(LanguageModelConfig):
    """Sizes of a `CausalLM`; the defaults are a small model of characters or bytes."""

    depth: int = 12
    """Number of layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise ValueError(f"depth must be positive, got {self.depth}")


class Context(NamedTuple):
    """What noisy rows are predicted from."""

    x: Tensor
    """Embeddings of the clean tokens, [N, T, D]."""
    rotary: Rotary
    """Rotations of both halves' rows, clean ones first."""
    cu_seqlens: Tensor | None
    """Where the documents of a packed sequence begin and end."""


class CausalLM(LanguageModel):
    """A Llama-like language model; `DiffusionBlocks(CausalLM(config), ...)` trains it in blocks.

    As denoiser it runs clean and noisy rows side by side: clean row i attends to clean rows up to
    i, noisy row i to the clean rows before i and to itself. Clean rows have the null conditioning,
    so a cache of them serves every noise level. `LanguageModel` tells of batches, the readout, the
    loss and the start of the weights.

    End to end, `lm(tokens)` is the plain model under the null conditioning: row i predicts token
    i + 1.

    Args:
        config: the sizes.

    Source: Shing et al. 2026; the layer: Touvron et al. 2023 (Llama 2).
    """

    config: CausalLMConfig

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__(config)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """The plain model: tokens [N, T] to logits [N, T, V] of the tokens that follow, float32.

        With `cu_seqlens` the attention's mask is a tensor of T*T elements.
        """
        batch = TokenBatch.of({"tokens": tokens, "cu_seqlens": cu_seqlens}, self.config)
        readout = self.current_readout()
        return self._logits(self._plain_features(batch, readout), readout)

    def next_token_loss(self, batch: Batch) -> Tensor:
        """The mean cross-entropy of the plain model over the tokens that are scored, 0-d, in nats.

        Args:
            batch: as for training in blocks.
        """
        given = TokenBatch.of(batch, self.config)
        readout = self.current_readout()
        return self._plain_loss(self._plain_features(given, readout), given, readout)

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Context:
        """The clean rows; see `LanguageModel.embed_condition`."""
        given = self._checked(batch, drop)
        return Context(
            self._embed(given.tokens, self.target_embedding.rows()),
            self._rotary(given.positions().repeat(2)),
            given.cu_seqlens,
        )

    def run_layers(
        self, layers: Sequence[nn.Module], z_in: Tensor, level: NoiseLevel, condition: Context
    ) -> Hidden:
        """Runs `layers` on the noisy embeddings [N, T, D] beside the clean ones."""
        cond = self._cond(level)
        _, noisy = run_doubled(
            layers, condition.x, self._noisy_rows(z_in, condition.x), cond, condition.rotary,
            [attend_doubled(condition.cu_seqlens)] * len(layers), last=layers[-1],
        )  # fmt: skip
        return Hidden(noisy, cond)

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
        readout: Readout,
    ) -> Hidden:
        """As `run_layers` for one noisy row; see `LanguageModel.run_cached`."""
        C = tokens.shape[1]
        rotary = self._rotary(cache.positions(C + 1))
        clean, cond = self._embed(tokens, readout.rows), self._cond(level)
        _, noisy = run_doubled(
            layers, clean, self._noisy_rows(z_in, clean), cond, rotary, cache.attends(C + 1),
            last=layers[-1],
        )  # fmt: skip
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
        """As `forward`."""
        return self(tokens)

    def new_plain_cache(self, slots: Slots, num_steps: int) -> KVCache:
        """A cache for `next_logits`."""
        return KVCache(slots, len(self.layers))

    def next_logits(
        self,
        tokens: Tensor,
        cache: KVCache,
        readout: Readout,
        *,
        num_steps: int = 1,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The plain model's logits [N, V]; see `LanguageModel.next_logits`."""
        C = tokens.shape[1]
        rotary, x = self._rotary(cache.positions(C)), self._embed(tokens, readout.rows)
        for layer, attend in zip(self.layers, cache.attends(C), strict=True):
            x = layer(x, None, rotary=rotary, attend=attend)
        x = cache.last_row(x)
        cache.commit(C)
        return self._logits(self.norm.modulate(x, None, None), readout)[:, 0]

    def _make_layers(self) -> None:
        self.layers = self._layers_of(self.config.depth, self.config.conditioning)

    def _plain_features(self, batch: TokenBatch, readout: Readout) -> Tensor:
        x, rotary = self._embed(batch.tokens, readout.rows), self._rotary(batch.positions())
        attend = batch.attend_within_documents()
        for layer in self.layers:
            x = layer(x, None, rotary=rotary, attend=attend)
        return self.norm.modulate(x, None, None)
