"""A converted masked language model, trained as masked diffusion, as dblocks' `MaskedLM`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks.blocks import Batch, MaskedTokenTarget
from dblocks.blocks.targets.classes import IGNORED, at_least_float32
from dblocks.blocks.targets.entries import checked
from dblocks.blocks.targets.padding import from_front, to_front
from dblocks.blocks.targets.token_batch import TokenBatch
from dblocks.integrations.convert.heads import FunctionHead
from dblocks.integrations.convert.layers import ConditionedLayer, cond_dim
from dblocks.integrations.convert.network import Converted, Sizes, check_some
from dblocks.integrations.convert.text_entries import text_entries
from dblocks.nn import Modulation
from dblocks.schedules import MASKED, MaskLevel


class MaskedFamily(Protocol):
    """The differences between masked language models."""

    reads: tuple[str, ...]
    """Entries of a batch that are read in addition to tokens."""

    def sizes(self, model: nn.Module) -> Sizes:
        """Sizes of the vocabulary and of the longest text."""
        ...

    def enter(self, model: nn.Module, batch: Batch) -> Tensor:
        """Rows [N, T, D] of tokens, as they enter the first layer."""
        ...

    def context(self, model: nn.Module, rows: Tensor, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of the layers' attention."""
        ...

    def head(self, model: nn.Module, x: Tensor) -> Tensor:
        """Logits [N, T, V] of the layers' output."""
        ...

    def example(self, model: nn.Module) -> Tensor:
        """Tokens [N, T] for a trial run."""
        ...

    def plain_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's own logits."""
        ...


class Context(NamedTuple):
    """The condition of texts, in addition to their state."""

    known: Tensor | None
    """The known tokens; see `MaskedTokenTarget.known`."""
    entries: Mapping[str, Tensor]
    """See `text_entries`."""
    starts: Tensor | None
    """The first token of each text, int64 [N]; None without padding."""


class Hidden(NamedTuple):
    """The output of the layers."""

    x: Tensor
    """Rows [N, T, D]."""
    cond: Tensor
    """Conditioning vectors [N, D]."""


class ConvertedMaskedLM(Converted):
    """A masked language model, for `DiffusionBlocks` with a `MaskSchedule`.

    Masked tokens enter as the model's own mask; rows are modulated by t, as is the input of the
    head. The mask itself is never predicted. The loss and the batch are those of `MaskedLM`; the
    batch may also hold "attention_mask", 0 at padding before or after each text, which is never
    masked or scored, and "position_ids" and "token_type_ids" where the model has them, each [N, T].

    Args:
        model: the user's model.
        layers: `ConditionedLayer`s by name.
        family: the model's family.
        width: D of its rows.
        mask_token_id: index of the mask token.
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
        self.family = family
        self.reads = self.call_reads = family.reads
        self.mask_token_id = mask_token_id
        self.head_modulation = Modulation(width, 2, cond_dim=cond_dim(width))
        self.added_to_()

    @property
    def sizes(self) -> Sizes:
        """Those of the model by now, whose embedding may have been resized."""
        return self.family.sizes(self.model)

    @property
    def target(self) -> MaskedTokenTarget:
        """The masked tokens."""
        head = FunctionHead(partial(_logits, self.family, self.model, self.mask_token_id))
        return MaskedTokenTarget(head, self.sizes, mask_token_id=self.mask_token_id, padding=True)

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Context:
        """The known tokens and the further entries of the batch."""
        if drop is not None:
            raise ValueError(
                "a masked language model is not trained without its condition, "
                "so guidance_scale must be 1"
            )
        shape = None
        if "tokens" in batch:
            check_some(batch["tokens"])
            shape = tuple(batch["tokens"].shape)
        return Context(self.target.known(batch), *text_entries(self.model, batch, shape))

    def run_layers(
        self,
        layers: Sequence[nn.Module],
        z_in: Tensor,
        level: MaskLevel,
        condition: Context,
    ) -> Hidden:
        """Runs `layers` on tokens `z_in` [N, T], some of them masked."""
        known, entries, starts = condition
        for name, value in entries.items():
            alike = name != "attention_mask" and len(value) == 1
            if value.shape[alike:] != z_in.shape[alike:]:
                raise ValueError(
                    f"{name} must have the shape of the tokens, {list(z_in.shape)}, "
                    f"got {list(value.shape)}; give each text a row of its own"
                )
        entries = {name: value.expand_as(z_in) for name, value in entries.items()}
        if known is not None:
            z_in = torch.where(known == MASKED, z_in, known)
        cond = cast(Tensor, self._cond(level))
        tokens = to_front(z_in.masked_fill(z_in == MASKED, self.mask_token_id), starts)
        batch = {**entries, "tokens": tokens}
        x = self.family.enter(self.model, batch)
        context = self.family.context(self.model, x, batch)
        for layer in layers:
            x = layer(x, cond, context, checkpointing=self.checkpointing)
        return Hidden(from_front(x, starts), cond)

    def features(self, hidden: Hidden) -> Tensor:
        """Rows for the head, modulated by the level, [N, T, D]."""
        shift, scale = self.head_modulation(hidden.cond, len(hidden.x))
        return (hidden.x * (1 + scale[:, None]) + shift[:, None]).to(hidden.x.dtype)

    def compare(self) -> tuple[Tensor, Tensor]:
        """See `Converted.compare`; compares logits."""
        batch = {"tokens": self.family.example(self.model)}
        x = self.family.enter(self.model, batch)
        context = self.family.context(self.model, x, batch)
        for layer in self.layers:
            x = layer(x, None, context)
        return self.family.plain_logits(self.model, batch), self.family.head(self.model, x)

    def plain_loss(self, batch: Batch, z: Tensor | None = None) -> Tensor:
        """The model's own cross-entropy, the mean over the tokens that are masked in z."""
        given = cast(TokenBatch, checked(self, batch, self.target))
        if z is None:
            raise ValueError("the loss of a masked language model needs z, to say what is masked")
        masked = z == MASKED
        if given.loss_mask is not None:
            masked = masked & given.loss_mask
        labels = torch.where(masked, given.tokens, IGNORED)
        tokens = given.tokens.masked_fill(masked, self.mask_token_id)
        entries, starts = text_entries(self.model, given, tuple(tokens.shape))
        tokens, labels = to_front(tokens, starts), to_front(labels, starts).flatten()
        logits = self.family.plain_logits(self.model, {**entries, "tokens": tokens})
        logits = at_least_float32(logits).flatten(0, 1)
        total = nnf.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return total / masked.sum().clamp(min=1)


def _logits(family: MaskedFamily, model: nn.Module, mask: int, rows: Tensor) -> Tensor:
    """Logits [N, T, V]; -inf for the mask."""
    logits = at_least_float32(family.head(model, rows))
    masks = torch.arange(logits.shape[-1], device=logits.device) == mask
    return logits.masked_fill(masks, float("-inf"))
