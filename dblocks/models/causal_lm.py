"""An autoregressive language model that predicts a token by denoising its embedding.

The target of a position is the embedding of its token; noisy rows see the clean tokens before
their own. The same network runs end to end as a plain next-token model, the baseline.
`dblocks.generate` writes text with either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks import functional as F
from dblocks._config import JsonConfig
from dblocks._kv_cache import KVCache
from dblocks.blocks import Batch
from dblocks.models._tokens import IGNORED, TokenBatch
from dblocks.nn import (
    ConditioningKind,
    LabelEmbedding,
    Modulation,
    NoiseEmbedding,
    Norm,
    Rotary,
    TransformerLayer,
    conditioning_of,
    rotary_of,
)
from dblocks.schedule import NoiseLevel

NOISE_SCALE = 0.1
MLP_MULTIPLE = 8  # widths of matrix products that hardware likes


@dataclass(frozen=True)
class CausalLMConfig(JsonConfig):
    """Sizes of a `CausalLM`; the defaults are a small model of characters or bytes."""

    vocab_size: int = 256
    """Number of tokens V."""
    context: int = 128
    """Longest sequence or document."""
    width: int = 192
    """Width D of the rows."""
    depth: int = 12
    """Number of layers."""
    heads: int = 3
    """Attention heads; a divisor of the width that leaves heads of even width."""
    kv_heads: int | None = None
    """Key/value heads, a divisor of heads; as many as heads by default."""
    mlp_ratio: float = 8 / 3
    """Width inside the MLP over D, rounded up to a multiple of 8."""
    rope_theta: float = 10_000.0
    """Base of the rotary positions' frequencies."""
    conditioning: ConditioningKind = "dit"
    """How noisy rows are conditioned on the noise: dit, official, or none for plain Llama."""
    gate_init: float = 0.0
    """What the gates of conditioned layers start at: 0, as published, or 1, the plain layer."""
    embed_scale: float = 1.0
    """Norm of a token's embedding."""
    tied: bool = True
    """Whether the readout uses the token embeddings; else it has a matrix of its own."""
    logit_scale: float = 1.0
    """What the learned factor of the logits, an inverse temperature, starts at."""
    tokens_per_sigma: int | None = 1
    """How many consecutive tokens share a noise level; None: all of a sequence."""

    def __post_init__(self) -> None:
        conditioning_of(self.conditioning)
        for name in ("vocab_size", "context", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("kv_heads", "tokens_per_sigma"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive or None, got {value}")
        for name in ("mlp_ratio", "rope_theta", "embed_scale", "logit_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.gate_init < math.inf:
            raise ValueError(f"gate_init must be a finite number >= 0, got {self.gate_init}")
        if self.width % self.heads or self.width // self.heads % 2:
            raise ValueError(
                "width must be an even multiple of heads, which rotary positions need, "
                f"got {self.width} and {self.heads}"
            )

    @property
    def hidden_dim(self) -> int:
        """Width inside the MLP."""
        return MLP_MULTIPLE * math.ceil(self.width * self.mlp_ratio / MLP_MULTIPLE)


class Context(NamedTuple):
    """What noisy rows are predicted from."""

    x: Tensor
    """Embeddings of the clean tokens, [N, T, D]."""
    rotary: Rotary
    """Rotations of both halves' rows, clean ones first."""
    cu_seqlens: Tensor | None
    """Where the documents of a packed sequence begin and end."""


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


class CausalLM(nn.Module):
    """A Llama-like language model; `DiffusionBlocks(CausalLM(config), ...)` trains it in blocks.

    As denoiser it runs clean and noisy rows side by side, both at positions 0..T-1: clean row i
    attends to clean rows up to i, noisy row i to the clean rows before i and to itself. Clean rows
    have the null conditioning, so a cache of them serves every noise level. With F the normalised
    noisy row, W the rows of unit norm (`tied`) or a matrix of its own, and g a learned number,

        m = c_skip*z + c_out*F,   logits = g * W (m*(1 + scale) + shift)

    with shift and scale from the noise level; the loss is their cross-entropy with the token of
    the same position. The denoised estimate is the expected token embedding under the logits.

    End to end, `lm(tokens)` is the plain model under the null conditioning: row i predicts token
    i + 1.

    A batch holds "tokens", int64 [N, T]. The first token of a sequence is given (a token that marks
    the beginning, or the first of a text) and is never predicted, so that both ways are scored on
    the same tokens. It may hold "loss_mask", bool [N, T], false at tokens that are not scored,
    such as padding at the end; and, for N = 1, "cu_seqlens", int32 [documents + 1], the ends of
    documents packed one after the other: then positions begin again, and nothing attends, in each.

    RMS norms, rotary positions, SwiGLU, no biases but in modulations. Linear layers start from a
    normal of deviation s = sqrt(2/(5 D)) (Nguyen and Salazar 2019; .023 at D = 768), those that end
    a branch from s/sqrt(2*depth) (GPT-2), modulations at zero, but for gates at `gate_init`. A
    noisy row enters the layers as `r + a*embed_scale/sqrt(D) * z_in`, r learned and at the start as
    large as a clean row, a learned and .1 at the start. Without r its queries would be noise, and
    attention could not begin to look at the token before; as large as r, noise would drown what the
    first branches add: both made the first block learn several times more slowly (tried).

    Args:
        config: the sizes.

    Source: Shing et al. 2026; the layer: Touvron et al. 2023 (Llama 2).
    """

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.config = config
        D, kind = config.width, config.conditioning
        conditioned = kind != "none"
        self.target_embedding = LabelEmbedding(config.vocab_size, D, config.embed_scale)
        self.noise_embedding = (
            NoiseEmbedding(conditioning_of(kind).width(D)) if conditioned else None
        )
        self.layers = nn.ModuleList(
            TransformerLayer(
                D, config.heads, config.hidden_dim, kind=kind, causal=True,
                gate_init=config.gate_init, norm="rms", mlp="swiglu",
                num_kv_heads=config.kv_heads, bias=False,
            )
            for _ in range(config.depth)
        )  # fmt: skip
        self.norm = Norm(D, "none", norm="rms")
        self.modulation = Modulation(D, 2, kind) if conditioned else None
        self.readout = None if config.tied else nn.Linear(D, config.vocab_size, bias=False)
        # The logarithm, so that a step changes it by a factor.
        self.noisy_row = nn.Parameter(torch.empty(D))
        self.noise_scale = nn.Parameter(torch.tensor(NOISE_SCALE))
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale)))
        self.loss_kind: Literal["cross_entropy", "l2"] = "cross_entropy"
        self.condition_drop = 0.0
        self._init_weights()

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
        rows = self._readout_rows(self._plain_features(given, readout)[:, :-1], readout)
        return F.linear_cross_entropy(
            rows, readout.weight, given.labels()[:, 1:], ignore_index=IGNORED
        )

    def sigma_shape(self, batch: Batch) -> tuple[int, ...]:
        """A noise level for every `tokens_per_sigma` tokens, [N, T/tokens_per_sigma], or [N]."""
        N, T = TokenBatch.of(batch, self.config).tokens.shape
        each = self.config.tokens_per_sigma
        if each is None:
            return (N,)
        if T % each:
            raise ValueError(
                f"tokens must be a multiple of tokens_per_sigma={each} long, got {T}; "
                "pad them, with a loss_mask, or change CausalLMConfig.tokens_per_sigma"
            )
        return (N, T // each)

    def embed_target(self, batch: Batch) -> Tensor:
        """Embeddings of `batch["tokens"]` [N, T], float32 [N, T, D]."""
        return self.target_embedding(TokenBatch.of(batch, self.config).tokens)

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Context:
        """The clean rows of `batch["tokens"]` [N, T]; reads "cu_seqlens" too.

        Raises:
            ValueError: `drop` is given; a language model has no null condition.
        """
        if drop is not None:
            raise ValueError(
                "a CausalLM is not trained without its condition, so guidance_scale must be 1"
            )
        given = TokenBatch.of(batch, self.config)
        return Context(
            self._embed(given.tokens, self.target_embedding.rows()),
            self._rotary(given.positions().repeat(2)),
            given.cu_seqlens,
        )

    def run_layers(
        self, layers: Sequence[nn.Module], z_in: Tensor, level: NoiseLevel, condition: Context
    ) -> Hidden:
        """Runs `layers` on the noisy embeddings [N, T, D] beside the clean ones."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            query = "both" if q.shape[2] == k.shape[2] else "noisy"
            return F.doubled_attention(q, k, v, cu_seqlens=condition.cu_seqlens, query=query)

        cond = self._cond(level)
        clean, noisy = condition.x, self._noisy_rows(z_in, condition.x)
        for layer in layers:
            clean, noisy = cast(TransformerLayer, layer).doubled(
                clean, noisy, cond,
                rotary=condition.rotary, attend=attend, keys_only=layer is layers[-1],
            )  # fmt: skip
        return Hidden(noisy, cond)

    def run_cached(
        self,
        layers: Sequence[nn.Module],
        z_in: Tensor,
        level: NoiseLevel,
        tokens: Tensor,
        cache: KVCache,
        readout: Readout,
    ) -> Hidden:
        """As `run_layers` for one noisy row [N, 1, D] that follows the cached rows and `tokens`.

        `tokens` [N, C], C >= 0, are the clean ones after those of the cache, to which their rows
        are added; the noisy row is not kept.
        """
        C = tokens.shape[1]
        rotary = self._rotary(cache.positions(C + 1))
        clean, cond = self._embed(tokens, readout.rows), self._cond(level)
        noisy = self._noisy_rows(z_in, clean)
        attends = cache.attends(C + 1)
        for layer, attend in zip(layers, attends, strict=True):
            layer = cast(TransformerLayer, layer)
            if C == 0:
                noisy = layer(noisy, cond, rotary=rotary, attend=attend)
            else:
                clean, noisy = layer.doubled(
                    clean, noisy, cond, rotary=rotary, attend=attend, keys_only=layer is layers[-1]
                )
        cache.commit(C)
        return Hidden(noisy, cond)

    def next_logits(self, tokens: Tensor, cache: KVCache, readout: Readout) -> Tensor:
        """The plain model's logits [N, V] of the token after the cached ones and `tokens` [N, C].

        The rows of `tokens` are added to the cache.
        """
        C = tokens.shape[1]
        rotary, x = self._rotary(cache.positions(C)), self._embed(tokens, readout.rows)
        for layer, attend in zip(self.layers, cache.attends(C), strict=True):
            x = layer(x, None, rotary=rotary, attend=attend)
        x = cache.last_row(x)
        cache.commit(C)
        return self._logits(self.norm.modulate(x, None, None), readout)[:, 0]

    def read_out(
        self, hidden: Hidden, z: Tensor, level: NoiseLevel, readout: Readout | None = None
    ) -> Tensor:
        """Logits [N, T, V], float32; `readout` as `self.current_readout()` made it, if it did."""
        readout = self.current_readout() if readout is None else readout
        return self._logits(self._denoised_features(hidden, z, level), readout, hidden.cond)

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
        m = self._denoised_features(hidden, z, level)
        losses = F.linear_cross_entropy(
            self._readout_rows(m, readout, hidden.cond), readout.weight, labels,
            ignore_index=IGNORED, reduction="none",
        )  # fmt: skip
        losses = losses * (labels.numel() / (labels != IGNORED).sum().clamp(min=1))
        sigma = level.sigma
        return losses if sigma.shape == losses.shape else losses.view(*sigma.shape, -1).mean(-1)

    def current_readout(self) -> Readout:
        """The matrices of the readout as they are now: generation makes them once."""
        rows = self.target_embedding.rows()
        unit = rows / self.config.embed_scale if self.readout is None else self.readout.weight
        return Readout(rows, unit, self.log_logit_scale.exp())

    def _denoised_features(self, hidden: Hidden, z: Tensor, level: NoiseLevel) -> Tensor:
        f = self.norm.modulate(hidden.x, None, None)
        return F.edm_denoise(f, z, level.sigma, sigma_data=level.sigma_data)

    def _plain_features(self, batch: TokenBatch, readout: Readout) -> Tensor:
        x, rotary = self._embed(batch.tokens, readout.rows), self._rotary(batch.positions())
        attend = batch.attend_within_documents()
        for layer in self.layers:
            x = layer(x, None, rotary=rotary, attend=attend)
        return self.norm.modulate(x, None, None)

    def _embed(self, tokens: Tensor, rows: Tensor) -> Tensor:
        return rows[tokens].to(self.target_embedding.weight.dtype)

    def _noisy_rows(self, z_in: Tensor, clean: Tensor) -> Tensor:
        element = self.config.embed_scale / math.sqrt(self.config.width)  # of a clean row
        return (self.noisy_row + element * self.noise_scale * z_in).to(clean.dtype)

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
                m = m * (1 + _over_tokens(scale, m)) + _over_tokens(shift, m)
            return m * readout.scale.to(m.dtype)

    def _logits(self, m: Tensor, readout: Readout, cond: Tensor | None = None) -> Tensor:
        rows = self._readout_rows(m, readout, cond)
        with torch.autocast(m.device.type, enabled=False):
            return nnf.linear(rows, readout.weight.to(rows.dtype))

    def _init_weights(self) -> None:
        s = math.sqrt(2 / (5 * self.config.width))
        modulations = {m.linear for m in self.modules() if isinstance(m, Modulation)}
        ends = {layer.attention.out for layer in self.layers}  # pyright: ignore
        ends |= {layer.mlp.fc2 for layer in self.layers}  # pyright: ignore
        linears = [m for m in self.layers.modules() if isinstance(m, nn.Linear)]
        if self.readout is not None:
            linears.append(self.readout)
        for linear in (m for m in linears if m not in modulations):
            std = s / math.sqrt(2 * self.config.depth) if linear in ends else s
            nn.init.normal_(linear.weight, std=std)
        element = self.config.embed_scale / math.sqrt(self.config.width)
        nn.init.normal_(self.noisy_row, std=element)


def _over_tokens(value: Tensor, m: Tensor) -> Tensor:
    """`value` [N, D] or [N, S, D], of the shape that multiplies m [N, T, D]."""
    if value.ndim == 2:
        return value[:, None]
    return value.repeat_interleave(m.shape[1] // value.shape[1], dim=1)
