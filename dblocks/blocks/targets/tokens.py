"""The embeddings of a text's tokens, each predicted from those before it."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dblocks import functional as F
from dblocks.blocks.targets.base import Batch, Features
from dblocks.blocks.targets.classes import (
    IGNORED,
    EmbeddedTarget,
    Head,
    Linear,
    OutputHead,
    Table,
    precision_of,
    product,
)
from dblocks.blocks.targets.entries import check_scored, scored_shape
from dblocks.blocks.targets.token_batch import READS, TokenBatch, TokenSizes
from dblocks.schedules import NoiseLevel


class Matrices(NamedTuple):
    """The matrices between embeddings and logits."""

    rows: Tensor
    """Token embeddings E, [V, D]."""
    weight: Tensor
    """The matrix of the output head, W, [V, D]."""


class TokenTarget(EmbeddedTarget):
    """The embedding of each token of a text, predicted from the tokens before it.

    A batch is that of `TokenBatch`: "tokens" [N, T], optionally "loss_mask" and "cu_seqlens".
    Features are [N, T, D], of the row that predicts each token; see `EmbeddedTarget` for logits.
    In training, the logits of all rows are never in memory at once.

    Args:
        embedding: E, such as a `LabelEmbedding`.
        output_head: an `OutputHead`, or its matrix, such as an `nn.Linear`. `UnitRows(embedding)`
            as matrix, or None, ties W to the embeddings: its rows are theirs at unit norm.
        sizes: vocabulary and longest text, such as a network's config.
        head: "posterior" or "learned"; see `EmbeddedTarget`.
        tokens_per_sigma: how many consecutive tokens share a noise level; None: all of a sequence.
        tokens_per_block: how many consecutive tokens are predicted at once.
        softcap: bound c of the output head's logits, c*tanh(logits/c), as in Gemma 2; the term of
            the noisy embedding is added after it. Logits of all rows are then in memory at once.
        padding: whether the network supports an "attention_mask" in the batch.
    """

    def __init__(
        self,
        embedding: Table,
        output_head: OutputHead | Linear | None,
        sizes: TokenSizes,
        *,
        head: Head = "posterior",
        tokens_per_sigma: int | None = 1,
        tokens_per_block: int = 1,
        softcap: float | None = None,
        padding: bool = False,
    ) -> None:
        if not isinstance(output_head, OutputHead):
            output_head = OutputHead(UnitRows(embedding) if output_head is None else output_head)
        linear = output_head.linear
        self.tied = isinstance(linear, UnitRows) and linear.embedding is embedding
        if not self.tied and len(linear.weight) != len(embedding.weight):
            raise ValueError(
                "the output head must have a row for each embedding, got a weight of "
                f"{list(linear.weight.shape)} for embeddings {list(embedding.weight.shape)}; make "
                "them of one vocabulary"
            )
        super().__init__(embedding, output_head, head)
        self.sizes = sizes
        self.tokens_per_sigma = tokens_per_sigma
        self.tokens_per_block = tokens_per_block
        self.softcap = softcap
        self.padding = padding
        self._fixed: Matrices | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Target.reads`."""
        return (*READS, "attention_mask") if self.padding else READS

    def check(self, batch: Batch) -> TokenBatch:
        """See `Target.check` and `TokenBatch`; a batch that was checked is returned as it is."""
        if isinstance(batch, TokenBatch):
            return batch
        given = TokenBatch.of(batch, self.sizes, padding=self.padding)
        given.check_blocks(self.tokens_per_block)
        return given

    def sigma_shape(self, batch: Batch) -> tuple[int, ...]:
        """A noise level for every `tokens_per_sigma` tokens, [N, T/tokens_per_sigma], or [N]."""
        N, T = batch["tokens"].shape
        each = self.tokens_per_sigma
        if each is None:
            return (N,)
        if T % each:
            raise ValueError(
                f"tokens must be a multiple of tokens_per_sigma={each} long, got {T}; "
                "pad them, with a loss_mask, or change tokens_per_sigma"
            )
        return (N, T // each)

    def scored(self, batch: Batch) -> Tensor | None:
        """The number of scored tokens, if there is a mask, packed documents or but one token."""
        if batch["tokens"].shape[1] == 1:
            return torch.zeros((), dtype=torch.int64)  # known without a look at the device
        if all(batch.get(key) is None for key in ("loss_mask", "attention_mask", "cu_seqlens")):
            return None
        return (self.check(batch).labels() != IGNORED).sum()

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings of the tokens, [N, T, D]."""
        return self.rows()[batch["tokens"]]

    def predict(self, features: Tensor | Features, z: Tensor, level: NoiseLevel) -> Tensor:
        """Logits [N, T, V], float32 (float64)."""
        if self.softcap is not None:
            return self._capped(self.softcap, features, z, level)
        rows, weight = self._factors(features, z, level)
        return product(rows, weight, self.output_head.linear.bias)

    def score(
        self,
        features: Tensor | Features,
        z: Tensor,
        level: NoiseLevel,
        y: Tensor,
        seed: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Cross-entropy for each sigma: the mean over its tokens.

        Where tokens are not scored, their loss is 0 and the others' are scaled up, so that the
        mean over all sigmas is that over scored tokens.
        """
        labels = self.check(batch).labels()
        if self.softcap is not None:
            logits = self._capped(self.softcap, features, z, level)
            losses = nnf.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
            )
        else:
            rows, weight = self._factors(features, z, level)
            losses = F.linear_cross_entropy(
                rows, weight, labels, bias=self.output_head.linear.bias,
                ignore_index=IGNORED, reduction="none",
            )  # fmt: skip
        losses = losses * (labels.numel() / (labels != IGNORED).sum().clamp(min=1))
        sigma = level.sigma
        return losses if sigma.shape == losses.shape else losses.view(*sigma.shape, -1).mean(-1)

    # Without noise: end-to-end training, and generation

    def fixed(self) -> TokenTarget:
        """This target with the matrices as they are now, computed once for many calls."""
        target = copy.copy(self)
        target._fixed = self.matrices()
        return target

    def matrices(self) -> Matrices:
        """E and W; a `fixed` target returns the same tensors in every call."""
        if self._fixed is not None:
            return self._fixed
        rows = self.embedding.rows()
        return Matrices(
            rows, _unit(rows, self.embedding) if self.tied else self.output_head.linear.weight
        )

    def rows(self) -> Tensor:
        """E, [V, D]."""
        return self.embedding.rows() if self._fixed is None else self._fixed.rows

    def next_logits(self, m: Tensor) -> Tensor:
        """Logits of features [N, T, D] without noise, under the null conditioning: end to end."""
        return product(
            self.output_head.rows(m), self.matrices().weight, self.output_head.linear.bias
        )

    def next_loss(self, m: Tensor, batch: TokenBatch) -> Tensor:
        """The mean cross-entropy of features [N, T, D], each of which predicts the next token.

        Raises:
            ValueError: no token is scored.
        """
        scored_shape(self, batch)
        check_scored(self.scored(batch))
        return F.linear_cross_entropy(
            self.output_head.rows(m[:, :-1]), self.matrices().weight, batch.labels()[:, 1:],
            bias=self.output_head.linear.bias, ignore_index=IGNORED,
        )  # fmt: skip

    def _factors(
        self, features: Tensor | Features, z: Tensor, level: NoiseLevel
    ) -> tuple[Tensor, Tensor]:
        """The factors of the logits: rows [N, T, C] and a matrix [V, C].

        Both terms of a posterior are one product: of summed rows if both matrices are the same up
        to a factor, else of concatenated rows.
        """
        f, cond = features if isinstance(features, Features) else Features(features)
        table, weight = self.matrices()
        if self.head == "learned":
            m = F.edm_denoise(f, z, level.sigma, sigma_data=level.sigma_data)
            return self.output_head.rows(m, cond), weight
        rows, evidence = self.output_head.rows(f), precision_of(level, z) * z
        if self.tied:
            return rows + self.embedding.embed_scale * evidence, weight
        return torch.cat([rows, evidence], -1), torch.cat([weight.to(table.dtype), table], -1)

    def _capped(
        self, cap: float, features: Tensor | Features, z: Tensor, level: NoiseLevel
    ) -> Tensor:
        """Logits of a head with a soft cap, which are not a product of rows."""
        f, cond = features if isinstance(features, Features) else Features(features)
        table, weight = self.matrices()
        if self.head == "learned":
            f = F.edm_denoise(f, z, level.sigma, sigma_data=level.sigma_data)
        logits = product(self.output_head.rows(f, cond), weight, self.output_head.linear.bias)
        logits = cap * (logits / cap).tanh()
        if self.head == "learned":
            return logits
        return logits + product(precision_of(level, z) * z, table)


class UnitRows:
    """The embeddings at unit norm, as the matrix of an output head.

    Args:
        embedding: E, the embeddings of the tokens.
    """

    bias = None

    def __init__(self, embedding: Table) -> None:
        self.embedding = embedding

    @property
    def weight(self) -> Tensor:
        """[V, D]."""
        return _unit(self.embedding.rows(), self.embedding)


def _unit(rows: Tensor, embedding: Table) -> Tensor:
    return rows / embedding.embed_scale
