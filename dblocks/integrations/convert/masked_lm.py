"""A converted masked language model, trained as masked diffusion, as dblocks' `MaskedLM`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks.blocks import Batch
from dblocks.integrations.convert.causal_lm import Sizes
from dblocks.integrations.convert.layers import ConditionedLayer, cond_dim
from dblocks.integrations.convert.network import Converted, at_least_float32, check_some
from dblocks.models.masked_tokens import MaskedTokens
from dblocks.models.token_batch import IGNORED, TokenBatch
from dblocks.nn import Modulation
from dblocks.schedules import MASKED, MaskLevel


class MaskedFamily(Protocol):
    """What differs between masked language models."""

    def sizes(self, model: nn.Module) -> Sizes:
        """Of the vocabulary and of the longest text."""
        ...

    def enter(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Rows [N, T, D] of tokens, as they enter the first layer."""
        ...

    def head(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits [N, T, V] of what the layers leave."""
        ...

    def plain_logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """The model's own logits."""
        ...


class Hidden(NamedTuple):
    """What the layers leave for the readout."""

    x: Tensor
    """Rows [N, T, D]."""
    cond: Tensor
    """Conditioning vectors [N, D]."""


class ConvertedMaskedLM(MaskedTokens, Converted):
    """A masked language model, for `DiffusionBlocks` with a `MaskSchedule`.

    Masked tokens enter as the model's own mask; rows are modulated by t, and so is what the head
    sees. The mask itself is never predicted. The loss and the batch are those of `MaskedLM`.

    Args:
        model: the user's.
        layers: `ConditionedLayer`s by name.
        family: what is special of the model.
        width: D of its rows.
        mask_token_id: number of the mask.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, ConditionedLayer],
        family: MaskedFamily,
        *,
        width: int,
        mask_token_id: int,
    ) -> None:
        super().__init__(model, layers, width, conditioned=True)
        self.loss_kind: Literal["masked_cross_entropy"] = "masked_cross_entropy"
        self.family = family
        self.sizes = family.sizes(model)
        self.mask_token_id = mask_token_id
        self.readout_modulation = Modulation(width, 2, cond_dim=cond_dim(width))
        self.added_to_()

    def run_layers(
        self,
        layers: Sequence[nn.Module],
        z_in: Tensor,
        level: MaskLevel,
        condition: Tensor | None,
    ) -> Hidden:
        """Runs `layers` on tokens `z_in` [N, T], masked or given."""
        if condition is not None:
            z_in = torch.where(condition == MASKED, z_in, condition)
        cond = cast(Tensor, self._cond(level))
        x = self.family.enter(self.model, z_in.masked_fill(z_in == MASKED, self.mask_token_id))
        for layer in layers:
            x = layer(x, cond, checkpointing=self.checkpointing)
        return Hidden(x, cond)

    def read_out(self, hidden: Hidden, z: Tensor, level: MaskLevel) -> Tensor:
        """Logits [N, T, V], float32 where the head's arithmetic is; -inf for the mask."""
        shift, scale = self.readout_modulation(hidden.cond, len(hidden.x))
        x = (hidden.x * (1 + scale[:, None]) + shift[:, None]).to(hidden.x.dtype)
        logits = at_least_float32(self.family.head(self.model, x))
        masks = torch.arange(logits.shape[-1], device=logits.device) == self.mask_token_id
        return logits.masked_fill(masks, float("-inf"))

    def score(
        self, hidden: Hidden, z: Tensor, level: MaskLevel, y: Tensor, seed: Tensor, batch: Batch
    ) -> Tensor:
        """The cross-entropy summed over masked tokens, over T, of each sample; as `MaskedLM`'s."""
        masked, T = self.scored(z, batch)
        logits = self.read_out(hidden, z, level)
        labels = torch.where(masked, y, IGNORED)
        losses = nnf.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return losses.sum(1) / T

    def plain_loss(self, batch: Batch, z: Tensor | None = None) -> Tensor:
        """The model's own cross-entropy, the mean over the tokens that are masked in z."""
        if z is None:
            raise ValueError("the loss of a masked language model needs z, to say what is masked")
        tokens = self.checked(batch).tokens
        masked = z == MASKED
        given = tokens.masked_fill(masked, self.mask_token_id)
        logits = at_least_float32(self.family.plain_logits(self.model, given)).flatten(0, 1)
        labels = torch.where(masked, tokens, IGNORED).flatten()
        total = nnf.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return total / masked.sum().clamp(min=1)

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.sizes.vocab_size

    def checked(self, batch: Batch) -> TokenBatch:
        """The entries of a batch; see `MaskedTokens.checked`."""
        if batch.get("cu_seqlens") is not None:
            raise ValueError(
                "a masked language model attends to all of a sequence, so a batch must not hold "
                "'cu_seqlens'; give each document a row of its own, padded, with a 'loss_mask'"
            )
        given = TokenBatch.of(batch, self.sizes)
        check_some(given.tokens)
        # Looked up where that does not synchronise, as in `check_tokens`.
        seen = given.tokens.is_cpu and not torch.compiler.is_compiling()
        if seen and (given.tokens == self.mask_token_id).any():
            raise ValueError(
                f"tokens must not hold the mask, {self.mask_token_id}: masks are drawn in training"
            )
        return given
