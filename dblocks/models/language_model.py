"""Base of autoregressive language models: embeddings, noisy rows, the target.

`dblocks.generate` and `dblocks.sampling.likelihood` work with every `LanguageModel`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dblocks.blocks import Batch, Features, OutputHead, TokenTarget
from dblocks.blocks.targets.padding import to_front
from dblocks.blocks.targets.token_batch import TokenBatch, moved_to_front
from dblocks.blocks.targets.tokens import UnitRows
from dblocks.models.language_config import LanguageModelConfig
from dblocks.nn import (
    ConditioningKind,
    LabelEmbedding,
    Modulation,
    NoiseEmbedding,
    Norm,
    Rotary,
    TransformerLayer,
    conditioning_of,
    over_rows,
    rotary_of,
)
from dblocks.nn.scalars import accept_scalars, number
from dblocks.sampling.cache import KVCache, Slots
from dblocks.sampling.interface import RowsKind
from dblocks.schedules import NoiseLevel

NOISE_SCALE = 0.1


class Hidden(NamedTuple):
    """The result of the layers."""

    x: Tensor
    """Noisy rows [N, T, D]."""
    cond: Tensor | None
    """Conditioning vectors [N, cond_dim] or [N, S, cond_dim]; None for the null one."""


class LanguageModel(nn.Module, ABC):
    """Predicts a token by denoising its embedding, or as a plain next-token model.

    As a denoiser it has one row per token (`rows="single"`): the sum of the embedding of the token
    before and the noisy embedding. The noise in earlier rows belongs to tokens that the row sees
    clean, each with its own level, so nothing leaks. Or clean and noisy rows run side by side
    (`rows="doubled"`, as published), both at positions 0..T-1, clean ones with the null
    conditioning.

    With h the normalised row of the noisy embedding z, E the token embeddings, W the rows of E at
    unit norm (`tied`) or a separate matrix, and g a learned scalar,

        posterior   logits = g W h + E z / sigma^2
        learned     logits = g W (m*(1 + scale) + shift),   m = c_skip*z + c_out*h

    with shift and scale from the noise level; see `EmbeddedTarget`. The loss is the cross-entropy
    with the token at the same position. See `TokenBatch` for the entries of a batch. The first
    token of a sequence is given and never predicted, so that denoiser and plain model are scored on
    the same tokens.

    RMS norms, rotary positions, SwiGLU, no biases except in modulations. Initialisation: linear
    layers normal with std s = sqrt(2/(5 D)) (Nguyen and Salazar 2019; .023 at D = 768), the last of
    a branch s/sqrt(2*depth) (GPT-2), modulations zero, gates `gate_init`. A noisy embedding enters
    as `r + a*embed_scale/sqrt(D) * z_in`, where r is the row of the token before or, without one, a
    learned row of the size of a clean row; a is learned, initially .1. A single stream without
    AdaLN also adds an embedding of the level. Without r the queries would be noise, and attention
    could not learn to attend to the token before; noise as large as r would dominate the output of
    the first branches: both made the first block learn several times more slowly (tried).

    Subclasses define the layers and how rows run through them.

    Args:
        config: the sizes.
    """

    layers: nn.ModuleList

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        D, kind = config.width, config.conditioning
        conditioned, single = kind != "none", config.rows == "single"
        self.target_embedding = LabelEmbedding(config.vocab_size, D, config.embed_scale)
        self.noise_embedding = (
            NoiseEmbedding(conditioning_of(kind).width(D)) if conditioned or single else None
        )
        self._make_layers()
        self.norm = Norm(D, "none", norm="rms")
        learned = config.head == "learned"
        self.modulation = Modulation(D, 2, kind) if conditioned and learned else None
        self.output_head = None if config.tied else nn.Linear(D, config.vocab_size, bias=False)
        # The logarithm, so that steps change it by a factor.
        self.noisy_row = nn.Parameter(torch.empty(D))
        self.noise_scale = number(NOISE_SCALE)
        self.log_logit_scale = number(math.log(config.logit_scale))
        self._init_weights()

    @property
    def width(self) -> int:
        """Width D of a target."""
        return self.config.width

    @property
    def sizes(self) -> LanguageModelConfig:
        """Sizes of the vocabulary and of the longest text."""
        return self.config

    @property
    def rows_kind(self) -> RowsKind:
        """Whether noisy rows replace clean ones ("single") or run next to them ("doubled")."""
        return self.config.rows

    @property
    def block_size(self) -> int:
        """Number of consecutive tokens that are predicted at once."""
        return 1

    @property
    def target(self) -> TokenTarget:
        """The embedding of each token."""
        config = self.config
        head = OutputHead(
            UnitRows(self.target_embedding) if self.output_head is None else self.output_head,
            modulation=self.modulation, log_scale=self.log_logit_scale,
        )  # fmt: skip
        return TokenTarget(
            self.target_embedding, head, config, head=config.head,
            tokens_per_sigma=config.tokens_per_sigma, tokens_per_block=self.block_size,
            padding=True,
        )  # fmt: skip

    # How rows run through the layers

    @abstractmethod
    def _make_layers(self) -> None:
        """Registers `layers` and the other modules that rows run through."""

    @abstractmethod
    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Any:
        """The context of the noisy rows, from `batch["tokens"]` [N, T] and its optional entries.

        Raises:
            ValueError: `drop` is given; a language model has no null condition.
        """

    @abstractmethod
    def run_layers(
        self, layers: Sequence[nn.Module], z_in: Tensor, level: NoiseLevel, condition: Any
    ) -> Hidden:
        """Runs `layers` on the noisy embeddings [N, T, D], in single or doubled rows."""

    @abstractmethod
    def new_cache(self, slots: Slots, layers: Sequence[nn.Module]) -> KVCache:
        """A cache for `run_cached` with these layers."""

    @abstractmethod
    def run_cached(
        self,
        layers: Sequence[nn.Module],
        z_in: Tensor,
        level: NoiseLevel,
        tokens: Tensor,
        cache: KVCache,
        table: Tensor,
    ) -> Hidden:
        """As `run_layers` for the noisy rows that follow the cached rows and `tokens`.

        `tokens` [N, C], C >= 0, are the clean tokens after those in the cache, to which their rows
        are added; the noisy rows are not kept. In doubled rows z_in [N, R, D] is for the noisy
        rows; in a single stream z_in [N, C + R, D] and the level [N, C + R] include the rows of
        `tokens`. `table` holds the embeddings of all tokens, [V, D].

        Returns:
            The result of the layers for the R noisy rows.
        """

    # The plain model

    @property
    @abstractmethod
    def plain_noise_width(self) -> int:
        """Number of normals that the plain model draws for each token."""

    @abstractmethod
    def plain_steps(self, num_steps: int | None) -> int:
        """How often the plain model runs `layers`: `num_steps`, if it supports that.

        Raises:
            ValueError: it does not.
        """

    @abstractmethod
    def next_token_logits(
        self, tokens: Tensor, *, num_steps: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """The plain model's logits [N, T, V] of the tokens that follow `tokens` [N, T]."""

    @abstractmethod
    def new_plain_cache(self, slots: Slots, num_steps: int) -> KVCache:
        """A cache for `next_logits` with this number of steps."""

    @abstractmethod
    def next_logits(
        self, tokens: Tensor, cache: KVCache, target: TokenTarget, *,
        num_steps: int, normals: Tensor,
    ) -> Tensor:  # fmt: skip
        """The plain model's logits [N, V] of the token after the cached ones and `tokens` [N, C].

        The rows of `tokens` are added to the cache. `target` is that of this model, best `fixed`.
        `normals` [N, positions, plain_noise_width] holds those of the token at each position.
        """

    # The same for all subclasses

    def by_parts(self, layers: Sequence[nn.Module]) -> list[nn.Module]:
        """The modules that are not called where these layers run; see `BlockModel`."""
        if self.config.rows == "single":
            return []
        run = [*layers, *getattr(self, "coda", ())]
        attention: Any = getattr(run[-1], "attention", None)
        found = (*run, attention, getattr(attention, "qkv", None))
        return [module for module in found if module is not None]

    def features(self, hidden: Hidden) -> Features:
        """The noisy rows, normalised, [N, T, D]."""
        return Features(self._normed(hidden.x), hidden.cond)

    # Helpers of subclasses

    def _layers_of(self, count: int, kind: ConditioningKind) -> nn.ModuleList:
        config = self.config
        return nn.ModuleList(
            TransformerLayer(
                config.width, config.heads, config.hidden_dim, conditioning=kind, causal=True,
                gate_init=config.gate_init, norm="rms", mlp="swiglu",
                num_kv_heads=config.kv_heads, bias=False,
            )
            for _ in range(count)
        )  # fmt: skip

    def _checked(self, batch: Batch, drop: Tensor | None) -> tuple[TokenBatch, Tensor | None]:
        """The batch with padding behind the texts, and where these began."""
        if drop is not None:
            raise ValueError(
                f"a {type(self).__name__} is not trained without its condition, "
                "so guidance_scale must be 1"
            )
        return moved_to_front(self.target.check(batch))

    def _normed(self, x: Tensor) -> Tensor:
        return self.norm.modulate(x, None, None)

    def _embed(self, tokens: Tensor, rows: Tensor) -> Tensor:
        return rows[tokens].to(self.target_embedding.weight.dtype)

    def _noisy_rows(self, z_in: Tensor, clean: Tensor) -> Tensor:
        return (self.noisy_row + self._noise(z_in)).to(clean.dtype)

    def _noise(self, z_in: Tensor) -> Tensor:
        return self._element * self.noise_scale * z_in

    def _to_front(
        self, z_in: Tensor, cond: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Noisy embeddings and their conditioning, as the rows of texts that began at `starts`."""
        if starts is not None and cond is not None and cond.ndim == 3:
            cond = to_front(over_rows(cond, z_in), starts)
        return to_front(z_in, starts), cond

    def _with_level(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The rows of a single stream with the level added, and the conditioning of its layers."""
        if cond is None or self.config.conditioning != "none":
            return x, cond
        return x + (self._element * over_rows(cond, x)).to(x.dtype), None

    @property
    def _element(self) -> float:
        """The typical size of an element of a token's embedding."""
        return self.config.embed_scale / math.sqrt(self.config.width)

    def _rotary(self, positions: Tensor) -> Rotary:
        return rotary_of(positions, self.config.width // self.config.heads, self.config.rope_theta)

    def _cond(self, level: NoiseLevel) -> Tensor | None:
        return None if self.noise_embedding is None else self.noise_embedding(level.c_noise)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        accept_scalars(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _init_weights(self) -> None:
        s = math.sqrt(2 / (5 * self.config.width))
        special = {m.linear for m in self.modules() if isinstance(m, Modulation)}
        if self.noise_embedding is not None:
            special |= set(self.noise_embedding.modules())
        layers = [m for m in self.modules() if isinstance(m, TransformerLayer)]
        ends = {end for layer in layers for end in (layer.attention.out, layer.mlp.fc2)}
        linears = (m for m in self.modules() if isinstance(m, nn.Linear))
        for linear in (m for m in linears if m not in special):
            std = s / math.sqrt(2 * len(layers)) if linear in ends else s
            nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.noisy_row, std=self._element)
