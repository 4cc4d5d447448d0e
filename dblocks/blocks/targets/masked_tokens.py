"""The tokens of a text, predicted where they are masked, from both sides."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from dblocks.blocks.targets.base import Batch, LossKind, Target
from dblocks.blocks.targets.classes import IGNORED, Linear, OutputHead
from dblocks.blocks.targets.token_batch import TokenBatch, TokenSizes
from dblocks.ops._checks import values_known
from dblocks.schedules import MASKED, MaskLevel


class MaskedTokenTarget(Target):
    """Tokens, int64 [N, T], under a `MaskSchedule`: masked ones are `MASKED` in z.

    A batch holds "tokens", and may hold "loss_mask", bool [N, T], false at tokens that are given:
    they are never masked and not scored. There is one t per sequence. Features are [N, T, D].

    Args:
        output_head: an `OutputHead`, or a matrix of V rows, such as an `nn.Linear`.
        sizes: vocabulary and longest text, such as a network's config.
        mask_token_id: the index in the vocabulary that stands for the mask and is never a target.
        padding: whether a batch may hold "attention_mask", which its network honours.
    """

    loss_kind: LossKind = "masked_cross_entropy"

    def __init__(
        self,
        output_head: OutputHead | Linear,
        sizes: TokenSizes,
        *,
        mask_token_id: int | None = None,
        padding: bool = False,
    ) -> None:
        if not isinstance(output_head, OutputHead):
            output_head = OutputHead(output_head)
        self.output_head = output_head
        self.sizes = sizes
        self.mask_token_id = mask_token_id
        self.padding = padding

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Target.reads`."""
        more = ("attention_mask",) if self.padding else ()
        return ("tokens", "loss_mask", *more)

    def check(self, batch: Batch) -> TokenBatch:
        """See `Target.check`; a batch that was checked is returned as it is.

        Raises:
            ValueError: the entries do not fit, or there are packed documents.
        """
        if isinstance(batch, TokenBatch):
            return batch
        if batch.get("cu_seqlens") is not None:
            raise ValueError(
                "a masked language model attends to all of a sequence, so a batch must not hold "
                "'cu_seqlens'; give each document a row of its own, padded, with a 'loss_mask'"
            )
        given = TokenBatch.of(batch, self.sizes, padding=self.padding)
        # Looked up where that does not synchronise, as in `check_tokens`.
        seen = self.mask_token_id is not None and values_known(given.tokens)
        if seen and (given.tokens == self.mask_token_id).any():
            raise ValueError(
                f"tokens must not hold the mask, {self.mask_token_id}: masks are drawn in training"
            )
        return given

    def sigma_shape(self, batch: Batch) -> tuple[int, ...]:
        """One t per sequence, [N]."""
        return (len(batch["tokens"]),)

    def scored(self, batch: Batch) -> Tensor | None:
        """The number of tokens that may be masked, if some are given."""
        mask = batch.get("loss_mask")
        return None if mask is None else mask.sum()

    def embed(self, batch: Batch) -> Tensor:
        """`batch["tokens"]`, int64 [N, T]."""
        return batch["tokens"]

    def known(self, batch: Batch) -> Tensor | None:
        """The tokens that are given, int64 [N, T] with `MASKED` elsewhere; None without any.

        Given tokens are those where "loss_mask" is false. Sampling passes none: they are in its
        state.
        """
        if batch.get("loss_mask") is None:
            return None
        return self.check(batch).tokens.masked_fill(batch["loss_mask"], MASKED)

    def predict(self, features: Tensor, z: Tensor, level: MaskLevel) -> Tensor:
        """Logits [N, T, V], float32 (float64)."""
        logits = self.output_head.logits(features)
        if logits.shape[-1] != self.sizes.vocab_size:
            raise ValueError(
                f"logits must have shape [N, T, V] with V = {self.sizes.vocab_size} tokens, got "
                f"{list(logits.shape)}; give the output head a row for each token"
            )
        return logits

    def denoise(self, prediction: Tensor, z: Tensor, level: MaskLevel) -> Tensor:
        """Probabilities of the tokens [N, T, V]: softmax where masked, else 1 for z itself."""
        known = nnf.one_hot(z.clamp(min=0), self.sizes.vocab_size).to(prediction.dtype)
        return torch.where((z == MASKED)[..., None], prediction.softmax(-1), known)

    def score(
        self, features: Tensor, z: Tensor, level: MaskLevel, y: Tensor, seed: Tensor, batch: Batch
    ) -> Tensor:
        """The cross-entropy summed over masked tokens, over T, of each sample [N].

        Where tokens are given, the sum is over the mean number of the others, so that the mean over
        all samples is that of the tokens that are scored.
        """
        masked, mask, count = z == MASKED, batch.get("loss_mask"), z.shape[1]
        if mask is not None:
            N = max(len(z), 1)
            masked, count = masked & mask, (mask.sum() / N).clamp(min=1 / N)
        losses = self.output_head.losses(features, torch.where(masked, y, IGNORED))
        return losses.sum(1) / count
