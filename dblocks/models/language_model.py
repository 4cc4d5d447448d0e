"""What autoregressive language models share: embeddings, noisy rows, the readout, the loss.

`dblocks.generate` and `dblocks.sampling.likelihood` work with every `LanguageModel`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks import functional as F
from dblocks.blocks import Batch
from dblocks.models.language_config import LanguageModelConfig
from dblocks.models.posterior import precision_of
from dblocks.models.token_batch import IGNORED, TokenBatch
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
from dblocks.sampling.cache import KVCache, Slots
from dblocks.sampling.interface import RowsKind
from dblocks.schedules import NoiseLevel

NOISE_SCALE = 0.1


class Hidden(NamedTuple):
    """What the layers leave for the readout."""

    x: Tensor
    """Noisy rows [N, T, D]."""
    cond: Tensor | None
    """Their conditioning vectors [N, cond_dim] or [N, S, cond_dim]; None for the null one."""


class Readout(NamedTuple):
    """The matrices between embeddings and logits."""

    rows: Tensor
    """Token embeddings, float32 [V, D]."""
    weight: Tensor
    """What features are multiplied with for the logits, [V, D]."""
    scale: Tensor
    """Factor of the logits, 0-d."""


class LanguageModel(nn.Module, ABC):
    """A model that predicts a token by denoising its embedding, or as plain next-token model.

    As denoiser it has one row a token (`rows="single"`): the row before which a token is known is
    what it is predicted from, and holds its noisy embedding. Rows before it hold noise about tokens
    that it knows anyway, each at a level of its own, so nothing leaks. Or clean and noisy rows run
    side by side (`rows="doubled"`, as published), both at positions 0..T-1, clean ones under the
    null conditioning.

    With h the normalised row of the noisy embedding z, E the token embeddings, W the rows of E at
    unit norm (`tied`) or a matrix of its own, and g a learned number,

        posterior   logits = g W h + E z / sigma^2
        learned     logits = g W (m*(1 + scale) + shift),   m = c_skip*z + c_out*h

    with shift and scale from the noise level. The first is Bayes' rule: where g W h is ln p(k)
    given the text, the logits are ln p(k) given text and z, since all rows of E are of one norm;
    its terms are float32. The second has to learn a factor that goes from 4 to 250,000. The loss is
    the cross-entropy with the token of the same position; the denoised estimate is the expected
    token embedding under the logits.

    A batch holds "tokens", int64 [N, T]. The first token of a sequence is given (a token that marks
    the beginning, or the first of a text) and is never predicted, so that both ways are scored on
    the same tokens. It may hold "loss_mask", bool [N, T], false at tokens that are not scored,
    such as padding at the end; and, for N = 1, "cu_seqlens", int32 [documents + 1], the ends of
    documents packed one after the other: then positions begin again, and nothing attends, in each.

    RMS norms, rotary positions, SwiGLU, no biases but in modulations. Linear layers start from a
    normal of deviation s = sqrt(2/(5 D)) (Nguyen and Salazar 2019; .023 at D = 768), those that end
    a branch from s/sqrt(2*depth) (GPT-2), modulations at zero, but for gates at `gate_init`. A
    noisy embedding enters as `r + a*embed_scale/sqrt(D) * z_in`, where r is the row of the token
    before or, without one, learned and at the start as large as a clean row; a is learned and .1 at
    the start. A single stream without AdaLN also adds a vector of the level. Without r its queries
    would be noise, and attention could not begin to look at the token before; as large as r, noise
    would drown what the first branches add: both made the first block learn several times more
    slowly (tried).

    Subclasses say which layers there are and how rows run through them.

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
        self.readout = None if config.tied else nn.Linear(D, config.vocab_size, bias=False)
        # The logarithm, so that a step changes it by a factor.
        self.noisy_row = nn.Parameter(torch.empty(D))
        self.noise_scale = nn.Parameter(torch.tensor(NOISE_SCALE))
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale)))
        self.loss_kind: Literal["cross_entropy", "l2"] = "cross_entropy"
        self.condition_drop = 0.0
        self._init_weights()

    @property
    def width(self) -> int:
        """Width D of a target."""
        return self.config.width

    @property
    def sizes(self) -> LanguageModelConfig:
        """Of the vocabulary and of the longest text."""
        return self.config

    @property
    def rows_kind(self) -> RowsKind:
        """Whether noisy rows take the place of clean ones or run beside them."""
        return self.config.rows

    @property
    def block_size(self) -> int:
        """How many consecutive tokens are predicted at once."""
        return 1

    # How rows run through the layers

    @abstractmethod
    def _make_layers(self) -> None:
        """Registers `layers`, and what else rows run through."""

    @abstractmethod
    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Any:
        """What noisy rows are predicted from, of `batch["tokens"]` [N, T] and "cu_seqlens".

        Raises:
            ValueError: `drop` is given; a language model has no null condition.
        """

    @abstractmethod
    def run_layers(
        self, layers: Sequence[nn.Module], z_in: Tensor, level: NoiseLevel, condition: Any
    ) -> Hidden:
        """Runs `layers` on the noisy embeddings [N, T, D], in clean rows or beside them."""

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
        readout: Readout,
    ) -> Hidden:
        """As `run_layers` for the noisy rows that follow the cached rows and `tokens`.

        `tokens` [N, C], C >= 0, are the clean ones after those of the cache, to which their rows
        are added; the noisy rows are not kept. In doubled rows z_in [N, R, D] is theirs; in a
        single stream [N, C + R, D] and the level [N, C + R] are of the rows of `tokens` too.

        Returns:
            What the layers leave of the R noisy rows.
        """

    # The plain model

    @property
    @abstractmethod
    def plain_noise_width(self) -> int:
        """Normals that the plain model draws for each token."""

    @abstractmethod
    def plain_steps(self, num_steps: int | None) -> int:
        """How often the plain model runs `layers`, `num_steps` if it can.

        Raises:
            ValueError: it cannot.
        """

    @abstractmethod
    def next_token_logits(
        self, tokens: Tensor, *, num_steps: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """The plain model's logits [N, T, V] of the tokens that follow `tokens` [N, T]."""

    @abstractmethod
    def new_plain_cache(self, slots: Slots, num_steps: int) -> KVCache:
        """A cache for `next_logits` with as many steps."""

    @abstractmethod
    def next_logits(
        self, tokens: Tensor, cache: KVCache, readout: Readout, *, num_steps: int, noise: Tensor
    ) -> Tensor:
        """The plain model's logits [N, V] of the token after the cached ones and `tokens` [N, C].

        The rows of `tokens` are added to the cache. `noise` [N, positions, plain_noise_width]
        holds the normals of the token at each position.
        """

    # The parts of a `BlockModel` that are the same for all

    def sigma_shape(self, batch: Batch) -> tuple[int, ...]:
        """A noise level for every `tokens_per_sigma` tokens, [N, T/tokens_per_sigma], or [N]."""
        given = TokenBatch.of(batch, self.config)
        given.check_blocks(self.block_size)
        N, T = given.tokens.shape
        each = self.config.tokens_per_sigma
        if each is None:
            return (N,)
        if T % each:
            raise ValueError(
                f"tokens must be a multiple of tokens_per_sigma={each} long, got {T}; "
                f"pad them, with a loss_mask, or change {type(self.config).__name__}."
                "tokens_per_sigma"
            )
        return (N, T // each)

    def embed_target(self, batch: Batch) -> Tensor:
        """Embeddings of `batch["tokens"]` [N, T], float32 [N, T, D]."""
        return self.target_embedding(TokenBatch.of(batch, self.config).tokens)

    def read_out(
        self, hidden: Hidden, z: Tensor, level: NoiseLevel, readout: Readout | None = None
    ) -> Tensor:
        """Logits [N, T, V], float32; `readout` as `self.current_readout()` made it, if it did."""
        readout = self.current_readout() if readout is None else readout
        rows, weight = self._scored_rows(hidden, z, level, readout)
        with torch.autocast(z.device.type, enabled=False):
            return nnf.linear(rows, weight.to(rows.dtype))

    def denoise(
        self, prediction: Tensor, z: Tensor, level: NoiseLevel, readout: Readout | None = None
    ) -> Tensor:
        """The expected token embedding `softmax(logits) @ rows`, [N, T, D]."""
        rows = self.target_embedding.rows() if readout is None else readout.rows
        with torch.autocast(z.device.type, enabled=False):
            return prediction.softmax(-1) @ rows.to(prediction.dtype)

    def score(
        self, hidden: Hidden, z: Tensor, level: NoiseLevel, y: Tensor, seed: Tensor, batch: Batch
    ) -> Tensor:
        """Cross-entropy for each sigma: the mean over its tokens.

        Where tokens are not scored, their loss is 0 and the others' are scaled up, so that the
        mean over all sigmas is that over scored tokens.
        """
        labels = TokenBatch.of(batch, self.config).labels()
        readout = self.current_readout()
        rows, weight = self._scored_rows(hidden, z, level, readout)
        losses = F.linear_cross_entropy(
            rows, weight, labels, ignore_index=IGNORED, reduction="none"
        )
        losses = losses * (labels.numel() / (labels != IGNORED).sum().clamp(min=1))
        sigma = level.sigma
        return losses if sigma.shape == losses.shape else losses.view(*sigma.shape, -1).mean(-1)

    def current_readout(self) -> Readout:
        """The matrices of the readout as they are now: generation makes them once."""
        rows = self.target_embedding.rows()
        unit = rows / self.config.embed_scale if self.readout is None else self.readout.weight
        return Readout(rows, unit, self.log_logit_scale.exp())

    # What subclasses build on

    def _layers_of(self, count: int, kind: ConditioningKind) -> nn.ModuleList:
        config = self.config
        return nn.ModuleList(
            TransformerLayer(
                config.width, config.heads, config.hidden_dim, kind=kind, causal=True,
                gate_init=config.gate_init, norm="rms", mlp="swiglu",
                num_kv_heads=config.kv_heads, bias=False,
            )
            for _ in range(count)
        )  # fmt: skip

    def _checked(self, batch: Batch, drop: Tensor | None) -> TokenBatch:
        if drop is not None:
            raise ValueError(
                f"a {type(self).__name__} is not trained without its condition, "
                "so guidance_scale must be 1"
            )
        return TokenBatch.of(batch, self.config)

    def _plain_loss(self, features: Tensor, batch: TokenBatch, readout: Readout) -> Tensor:
        """The mean cross-entropy of features [N, T, D], each of which predicts the next token."""
        rows = self._readout_rows(features[:, :-1], readout)
        return F.linear_cross_entropy(
            rows, readout.weight, batch.labels()[:, 1:], ignore_index=IGNORED
        )

    def _scored_rows(
        self, hidden: Hidden, z: Tensor, level: NoiseLevel, readout: Readout
    ) -> tuple[Tensor, Tensor]:
        """What is multiplied for the logits at a noise level: rows [N, T, C] and a matrix [V, C].

        Both terms of a posterior are one product: of the sum of rows where both matrices are the
        same but for a factor, else of rows side by side.
        """
        f = self.norm.modulate(hidden.x, None, None)
        if self.config.head == "learned":
            m = F.edm_denoise(f, z, level.sigma, sigma_data=level.sigma_data)
            return self._readout_rows(m, readout, hidden.cond), readout.weight
        rows, evidence = self._readout_rows(f, readout), precision_of(level, z) * z
        if self.readout is None:
            return rows + self.config.embed_scale * evidence, readout.weight
        weight = readout.weight.to(readout.rows.dtype)
        return torch.cat([rows, evidence], -1), torch.cat([weight, readout.rows], -1)

    def _embed(self, tokens: Tensor, rows: Tensor) -> Tensor:
        return rows[tokens].to(self.target_embedding.weight.dtype)

    def _noisy_rows(self, z_in: Tensor, clean: Tensor) -> Tensor:
        return (self.noisy_row + self._noise(z_in)).to(clean.dtype)

    def _noise(self, z_in: Tensor) -> Tensor:
        return self._element * self.noise_scale * z_in

    def _with_level(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The rows of a single stream, and the conditioning of its layers."""
        if cond is None or self.config.conditioning != "none":
            return x, cond
        return x + (self._element * over_rows(cond, x)).to(x.dtype), None

    @property
    def _element(self) -> float:
        """The size of an element of a token's embedding."""
        return self.config.embed_scale / math.sqrt(self.config.width)

    def _rotary(self, positions: Tensor) -> Rotary:
        return rotary_of(positions, self.config.width // self.config.heads, self.config.rope_theta)

    def _cond(self, level: NoiseLevel) -> Tensor | None:
        return None if self.noise_embedding is None else self.noise_embedding(level.c_noise)

    def _readout_rows(self, m: Tensor, readout: Readout, cond: Tensor | None = None) -> Tensor:
        """What the readout's matrix is multiplied with, `g*(m*(1 + scale) + shift)`."""
        # The logits are float32 whatever the layers' dtype, and so is this.
        with torch.autocast(m.device.type, enabled=False):
            m = m.to(torch.promote_types(m.dtype, torch.float32))
            if self.modulation is not None:
                shift, scale = self.modulation(cond, m.shape[0])
                m = m * (1 + over_rows(scale, m)) + over_rows(shift, m)
            return m * readout.scale.to(m.dtype)

    def _logits(self, m: Tensor, readout: Readout, cond: Tensor | None = None) -> Tensor:
        rows = self._readout_rows(m, readout, cond)
        with torch.autocast(m.device.type, enabled=False):
            return nnf.linear(rows, readout.weight.to(rows.dtype))

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
