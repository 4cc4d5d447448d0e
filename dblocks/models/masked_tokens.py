"""What masked language models share, the library's own and converted ones."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dblocks.blocks import Batch
from dblocks.models.token_batch import TokenBatch
from dblocks.schedules import MASKED, MaskLevel


class MaskedTokens(ABC):
    """The parts of a `BlockModel` whose target are tokens, masked ones `MASKED`."""

    target_embedding = None
    condition_drop = 0.0

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of logits."""

    @abstractmethod
    def checked(self, batch: Batch) -> TokenBatch:
        """The entries of a batch.

        Raises:
            ValueError: they do not fit, or hold packed documents.
        """

    def sigma_shape(self, batch: Batch) -> tuple[int, ...]:
        """A t for every sequence, [N]."""
        return (len(self.checked(batch).tokens),)

    def embed_target(self, batch: Batch) -> Tensor:
        """`batch["tokens"]`, int64 [N, T]."""
        return self.checked(batch).tokens

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Tensor | None:
        """The tokens that are given, int64 [N, T] with `MASKED` elsewhere; None without any.

        Reads "tokens" and "loss_mask" where there is a "loss_mask"; sampling passes neither, as
        given tokens are in its state.

        Raises:
            ValueError: `drop` is given; a language model has no null condition.
        """
        if drop is not None:
            raise ValueError(
                "a masked language model is not trained without its condition, "
                "so guidance_scale must be 1"
            )
        if batch.get("loss_mask") is None:
            return None
        return self.checked(batch).tokens.masked_fill(batch["loss_mask"], MASKED)

    def denoise(self, prediction: Tensor, z: Tensor, level: MaskLevel) -> Tensor:
        """Probabilities of the tokens [N, T, V]: softmax where masked, else 1 for z itself."""
        known = nnf.one_hot(z.clamp(min=0), self.vocab_size).to(prediction.dtype)
        return torch.where((z == MASKED)[..., None], prediction.softmax(-1), known)

    def scored(self, z: Tensor, batch: Batch) -> tuple[Tensor, float | Tensor]:
        """Which tokens are masked and scored, bool [N, T], and what a sample's sum is divided by.

        T; where tokens are given, the mean number of the others, so that the mean over all samples
        is that of the tokens that are scored.
        """
        masked, mask = z == MASKED, self.checked(batch).loss_mask
        if mask is None:
            return masked, z.shape[1]
        N = max(len(z), 1)
        return masked & mask, (mask.sum() / N).clamp(min=1 / N)
