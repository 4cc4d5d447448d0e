"""A masked diffusion language model, which predicts the masked tokens of a text from both sides.

`dblocks.unmask` generates text with it and fills gaps; `dblocks.sampling.masked_likelihood`
computes its bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks.blocks import Batch, MaskedTokenTarget
from dblocks.blocks.targets.padding import check_attention_mask
from dblocks.models.token_sizes import TokenModelConfig
from dblocks.nn import (
    Attend,
    Modulation,
    NoiseEmbedding,
    Norm,
    TransformerLayer,
    conditioning_of,
    rotary_of,
)
from dblocks.schedules import MASKED, MaskLevel

# Initial std of an element of an embedding. With .06 a small model on characters took twice the
# steps to learn more than their frequencies, with .7 a few more (tried), though with .2 the logits
# of the tied output head start too sharp.
EMBEDDING_STD = 0.2


@dataclass(frozen=True)
class MaskedLMConfig(TokenModelConfig):
    """Sizes of a `MaskedLM`; the mask is not one of the V tokens."""

    depth: int = 12
    """Number of layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1:
            raise ValueError(f"depth must be positive, got {self.depth}")


class Context(NamedTuple):
    """What is known about texts, in addition to their state."""

    known: Tensor | None
    """The tokens that are given, int64 [N, T] with `MASKED` elsewhere; None without any."""
    shown: Tensor | None
    """bool [N, T], false at padding, which nothing attends to; None without padding."""


class Hidden(NamedTuple):
    """The result of the layers."""

    x: Tensor
    """Rows [N, T, D]."""
    cond: Tensor | None
    """Their conditioning vectors [N, cond_dim]; None without conditioning."""


class FirstRows:
    """The embeddings of the tokens, without that of the mask, as the matrix of the output head.

    Args:
        embedding: embeddings of the tokens and the mask.
    """

    bias = None

    def __init__(self, embedding: nn.Embedding) -> None:
        self.embedding = embedding

    @property
    def weight(self) -> Tensor:
        """[V, D]."""
        return self.embedding.weight[:-1]


class MaskedLM(nn.Module):
    """A bidirectional transformer over masked text, for `DiffusionBlocks` with a `MaskSchedule`.

        DiffusionBlocks(MaskedLM(config), BlocksConfig(3, schedule=MaskSchedule("cosine")))

    A state z holds tokens, and `MASKED` where they are masked; the rows are token embeddings, and
    one learned row for masks. There are logits for the V tokens only, so the mask is never
    predicted; the estimate of a text is the softmax of the logits where it is masked, and the token
    itself elsewhere. The loss of a sample is the cross-entropy summed over its masked tokens,
    divided by T: with the schedule's weight, it is the bound in nats per token.

    A batch holds "tokens", int64 [N, T]. Optional: "loss_mask", bool [N, T], false at given tokens,
    such as a prompt, which are never masked or scored; the bound is then that of the other tokens
    given these. "attention_mask", [N, T], 0 at padding before or after each text, which does not
    affect the text: nothing attends to it, and it is never masked or scored. Positions are
    relative, so that they may begin anywhere.

    RMS norms, rotary positions, SwiGLU, no biases except in modulations. Initialisation: weights
    normal with std s = sqrt(2/(5 D)) (Nguyen and Salazar 2019), the last of a branch
    s/sqrt(2*depth) (GPT-2), embeddings .2; modulations zero, gates `gate_init`.

    Args:
        config: the sizes.

    Source: Shi et al. 2024 (MD4), arXiv 2406.04329.
    """

    reads = ()  # in addition to its target's
    call_reads = ("attention_mask",)

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
                D, config.heads, config.hidden_dim, conditioning=kind, gate_init=config.gate_init,
                norm="rms", mlp="swiglu", num_kv_heads=config.kv_heads, bias=False,
            )
            for _ in range(config.depth)
        )  # fmt: skip
        self.norm = Norm(D, "none", norm="rms")
        self.modulation = Modulation(D, 2, kind) if conditioned else None
        self.output_head = None if config.tied else nn.Linear(D, config.vocab_size, bias=False)
        self._init_weights()

    @property
    def target(self) -> MaskedTokenTarget:
        """The masked tokens."""
        head = FirstRows(self.embedding) if self.output_head is None else self.output_head
        return MaskedTokenTarget(head, self.config, padding=True)

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Context:
        """The context: given tokens, and where there is no padding.

        Raises:
            ValueError: `drop` is given; a language model has no null condition.
        """
        if drop is not None:
            raise ValueError(
                "a masked language model is not trained without its condition, "
                "so guidance_scale must be 1"
            )
        return Context(self.target.known(batch), batch.get("attention_mask"))

    def run_layers(
        self,
        layers: Sequence[nn.Module],
        z_in: Tensor,
        level: MaskLevel,
        condition: Context,
    ) -> Hidden:
        """Runs `layers` on tokens `z_in` [N, T], masked or given."""
        T, config = z_in.shape[1], self.config
        if config.context < T:
            raise ValueError(
                f"tokens must be at most context={config.context} long, got {T}; cut them"
            )
        known, attend = condition.known, None
        if known is not None:
            z_in = torch.where(known == MASKED, z_in, known)
        if condition.shown is not None:
            attend = _attend_to(check_attention_mask(condition.shown, tuple(z_in.shape)))
        x = self.embedding(torch.where(z_in == MASKED, config.vocab_size, z_in))
        positions = torch.arange(T, device=z_in.device)
        rotary = rotary_of(positions, config.width // config.heads, config.rope_theta)
        cond = None if self.noise_embedding is None else self.noise_embedding(level.c_noise)
        for layer in layers:
            x = layer(x, cond, rotary=rotary, attend=attend)
        return Hidden(x, cond)

    @property
    def sizes(self) -> MaskedLMConfig:
        """Sizes of the vocabulary and of the longest text."""
        return self.config

    def features(self, hidden: Hidden) -> Tensor:
        """Rows for the output head, `norm(x)*(1 + scale) + shift` [N, T, D], float32 (float64)."""
        x = hidden.x
        with torch.autocast(x.device.type, enabled=False):
            shift = scale = None
            if self.modulation is not None:
                shift, scale = self.modulation(hidden.cond, len(x))
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return self.norm.modulate(x, shift, scale)

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
        if self.output_head is not None:
            nn.init.normal_(self.output_head.weight, std=s)


def _attend_to(shown: Tensor) -> Attend:
    """Attention of all rows to those where `shown`, bool [N, T], is true."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nnf.scaled_dot_product_attention(
            q, k, v, attn_mask=shown[:, None, None], enable_gqa=q.shape[1] != k.shape[1]
        )

    return attend
