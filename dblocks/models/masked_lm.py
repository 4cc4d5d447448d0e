"""A masked diffusion language model: it predicts the masked tokens of a text, from both sides.

`dblocks.unmask` writes text with it, also in the gaps of a given one, and
`dblocks.sampling.masked_likelihood` measures its bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks import functional as F
from dblocks.blocks import Batch
from dblocks.models.masked_tokens import MaskedTokens
from dblocks.models.token_batch import IGNORED, TokenBatch
from dblocks.models.token_sizes import TokenModelConfig
from dblocks.nn import (
    Modulation,
    NoiseEmbedding,
    Norm,
    TransformerLayer,
    conditioning_of,
    rotary_of,
)
from dblocks.schedules import MASKED, MaskLevel

# Standard deviation of a number of an embedding at the start. With .06 a small model on characters
# took twice the steps to learn more than their frequencies, with .7 a few more (tried), though with
# .2 the logits of the tied readout begin too sharp.
EMBEDDING_STD = 0.2


@dataclass(frozen=True)
class MaskedLMConfig(TokenModelConfig):
    """Sizes of a `MaskedLM`; the mask is none of the V tokens."""

    depth: int = 12
    """Number of layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise ValueError(f"depth must be positive, got {self.depth}")


class Hidden(NamedTuple):
    """What the layers leave for the readout."""

    x: Tensor
    """Rows [N, T, D]."""
    cond: Tensor | None
    """Their conditioning vectors [N, cond_dim]; None without conditioning."""


class MaskedLM(MaskedTokens, nn.Module):
    """A bidirectional transformer over masked text, for `DiffusionBlocks` with a `MaskSchedule`.

        DiffusionBlocks(MaskedLM(config), BlocksConfig(3, schedule=MaskSchedule("cosine")))

    A state z holds tokens, and `MASKED` where they are masked; the rows are token embeddings, and
    for masks one learned row. There are logits for the V tokens only, so the mask is never
    predicted; the estimate of a text is the softmax of the logits where it is masked, and the
    token itself elsewhere. The loss of a sample is the cross-entropy summed over its masked tokens,
    divided by T: weighted, it is the bound in nats a token.

    A batch holds "tokens", int64 [N, T]. It may hold "loss_mask", bool [N, T], false at tokens that
    are given: they are never masked and not scored, such as a prompt or padding. The bound is then
    that of the others, given these, still for each token.

    RMS norms, rotary positions, SwiGLU, no biases but in modulations. Weights start from a normal
    of deviation s = sqrt(2/(5 D)) (Nguyen and Salazar 2019), those that end a branch from
    s/sqrt(2*depth) (GPT-2), embeddings from one of deviation .2, modulations at zero, but for gates
    at `gate_init`.

    Args:
        config: the sizes.

    Source: Shi et al. 2024 (MD4), arXiv 2406.04329.
    """

    def __init__(self, config: MaskedLMConfig) -> None:
        super().__init__()
        self.config = config
        D, kind = config.width, config.conditioning
        conditioned = kind != "none"
        # The last row is the mask's.
        self.embedding = nn.Embedding(config.vocab_size + 1, D)
        self.noise_embedding = (
            NoiseEmbedding(conditioning_of(kind).width(D)) if conditioned else None
        )
        self.layers = nn.ModuleList(
            TransformerLayer(
                D, config.heads, config.hidden_dim, kind=kind, gate_init=config.gate_init,
                norm="rms", mlp="swiglu", num_kv_heads=config.kv_heads, bias=False,
            )
            for _ in range(config.depth)
        )  # fmt: skip
        self.norm = Norm(D, "none", norm="rms")
        self.modulation = Modulation(D, 2, kind) if conditioned else None
        self.readout = None if config.tied else nn.Linear(D, config.vocab_size, bias=False)
        self.loss_kind: Literal["masked_cross_entropy"] = "masked_cross_entropy"
        self._init_weights()

    def run_layers(
        self,
        layers: Sequence[nn.Module],
        z_in: Tensor,
        level: MaskLevel,
        condition: Tensor | None,
    ) -> Hidden:
        """Runs `layers` on tokens `z_in` [N, T], masked or given."""
        T, config = z_in.shape[1], self.config
        if config.context < T:
            raise ValueError(
                f"tokens must be at most context={config.context} long, got {T}; cut them"
            )
        if condition is not None:
            z_in = torch.where(condition == MASKED, z_in, condition)
        x = self.embedding(torch.where(z_in == MASKED, config.vocab_size, z_in))
        positions = torch.arange(T, device=z_in.device)
        rotary = rotary_of(positions, config.width // config.heads, config.rope_theta)
        cond = None if self.noise_embedding is None else self.noise_embedding(level.c_noise)
        for layer in layers:
            x = layer(x, cond, rotary=rotary)
        return Hidden(x, cond)

    def read_out(self, hidden: Hidden, z: Tensor, level: MaskLevel) -> Tensor:
        """Logits [N, T, V], float32 whatever the layers' dtype."""
        rows = self._features(hidden)
        with torch.autocast(rows.device.type, enabled=False):
            return nnf.linear(rows, self._readout_weight().to(rows.dtype))

    def score(
        self, hidden: Hidden, z: Tensor, level: MaskLevel, y: Tensor, seed: Tensor, batch: Batch
    ) -> Tensor:
        """The cross-entropy summed over masked tokens, over T, of each sample [N].

        Where tokens are given, the others' are scaled up; see `MaskedTokens.scored`.
        """
        masked, T = self.scored(z, batch)
        losses = F.linear_cross_entropy(
            self._features(hidden), self._readout_weight(), torch.where(masked, y, IGNORED),
            ignore_index=IGNORED, reduction="none",
        )  # fmt: skip
        return losses.sum(1) / T

    @property
    def sizes(self) -> MaskedLMConfig:
        """Of the vocabulary and of the longest text."""
        return self.config

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.config.vocab_size

    def checked(self, batch: Batch) -> TokenBatch:
        """The entries of a batch; see `MaskedTokens.checked`."""
        if batch.get("cu_seqlens") is not None:
            raise ValueError(
                "a MaskedLM attends to all of a sequence, so a batch must not hold 'cu_seqlens'; "
                "give each document a sequence of its own, padded, with a 'loss_mask'"
            )
        return TokenBatch.of(batch, self.config)

    def _features(self, hidden: Hidden) -> Tensor:
        """What the readout's matrix is multiplied with, `norm(x)*(1 + scale) + shift`, float32."""
        x = hidden.x
        with torch.autocast(x.device.type, enabled=False):
            shift = scale = None
            if self.modulation is not None:
                shift, scale = self.modulation(hidden.cond, len(x))
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return self.norm.modulate(x, shift, scale)

    def _readout_weight(self) -> Tensor:
        if self.readout is not None:
            return self.readout.weight
        return self.embedding.weight[: self.config.vocab_size]

    def _init_weights(self) -> None:
        s = math.sqrt(2 / (5 * self.config.width))
        end = s / math.sqrt(2 * self.config.depth)
        for layer in (m for m in self.layers if isinstance(m, TransformerLayer)):
            attention, mlp = layer.attention, layer.mlp
            for linear, std in (
                (attention.qkv, s),
                (attention.out, end),
                (mlp.fc1, s),
                (mlp.fc2, end),
            ):
                nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        if self.readout is not None:
            nn.init.normal_(self.readout.weight, std=s)
