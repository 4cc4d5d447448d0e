"""A converted classifier: the target is the embedding of the class, as in dblocks' `ViT`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks.blocks import Batch, ClassTarget, Features
from dblocks.blocks.targets.base import missing
from dblocks.blocks.targets.classes import Head, at_least_float32
from dblocks.blocks.targets.entries import checked
from dblocks.integrations.convert.heads import FunctionHead
from dblocks.integrations.convert.layers import ConditionedLayer, cond_dim
from dblocks.integrations.convert.network import Converted, check_some
from dblocks.integrations.convert.text_entries import whole_text
from dblocks.nn import LabelEmbedding, Modulation
from dblocks.nn.scalars import number
from dblocks.schedules import NoiseLevel

NOISE_SCALE = 0.1  # of the noisy embedding, relative to the elements of the class token


class ClassFamily(Protocol):
    """The differences between classifiers."""

    input: str
    """The entry of a batch to classify: images or tokens."""
    reads: tuple[str, ...]
    """Further entries of a batch that are read."""
    class_row: bool
    """Whether the first row is the class token; else all rows are pooled."""

    def enter(self, model: nn.Module, batch: Batch) -> Tensor:
        """Rows [N, P, D], as they enter the first layer."""
        ...

    def context(self, model: nn.Module, rows: Tensor, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of the layers' attention."""
        ...

    def pool(self, model: nn.Module, x: Tensor) -> Tensor:
        """The output of the layers as one row per sample, [N, D]."""
        ...

    def head(self, model: nn.Module, pooled: Tensor) -> Tensor:
        """Logits of pooled rows."""
        ...

    def example(self, model: nn.Module) -> Batch:
        """A small batch for a trial run."""
        ...

    def plain_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's own logits."""
        ...


class Context(NamedTuple):
    """The context from which the noisy label is predicted."""

    rows: Tensor
    """Rows [N, P, D], as they enter the layers."""
    attention: Mapping[str, Any]
    """Keyword arguments of the attention."""


class Hidden(NamedTuple):
    """The output of the layers."""

    x: Tensor
    """Rows [N, P, D]."""
    cond: Tensor
    """Conditioning vector [N, D]."""


class ConvertedClassifier(Converted):
    """A classifier, for `DiffusionBlocks` with a `NoiseSchedule`.

    The noisy embedding z of the class, scaled by c_in and by a learned number, is added to the row
    of the class token, or to all rows where the model pools them. With h the layers' rows, E the
    embeddings of the classes and the model's own pooling and head,

        posterior   logits = head(pool(h)) + E z / sigma^2
        learned     logits = head(g*(m*(1 + scale) + shift)),   m = c_skip*z + c_out*pool(h)

    The first is Bayes' rule: what the layers have to give is ln p(class | what is classified), as
    the model itself does. In the second, g is a learned number, 1/sigma_data at the start: at the
    highest noise the head sees pool(h).

    A batch holds "labels" [N], and what is classified, which is all that sampling needs. Beside
    tokens it may hold "attention_mask", 0 at padding before or after each text, and "position_ids"
    and "token_type_ids" where the model has them, each [N, T].

    Args:
        model: the user's model.
        layers: `ConditionedLayer`s by name.
        family: the model's family.
        num_classes: number of classes of its head.
        width: D of its rows.
        sigma_data: standard deviation of the data, from the schedule.
        embed_scale: norm of the target embedding of a class.
        head_kind: form of the logits, as `head` of `convert`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, ConditionedLayer],
        family: ClassFamily,
        *,
        num_classes: int,
        width: int,
        sigma_data: float,
        embed_scale: float,
        head_kind: Head,
    ) -> None:
        super().__init__(model, layers, width, conditioned=True)
        self.family = family
        self.reads = family.reads
        self.call_reads = (family.input, *family.reads)
        self.num_classes = num_classes
        self.target_embedding = LabelEmbedding(num_classes, width, embed_scale)
        self.head_kind: Head = head_kind
        self.noise_scale = number(NOISE_SCALE)
        self.head_modulation = self.log_scale = None
        if head_kind == "learned":
            self.head_modulation = Modulation(width, 2, cond_dim=cond_dim(width))
            self.log_scale = number(-math.log(sigma_data))
        self.added_to_()

    @property
    def target(self) -> ClassTarget:
        """The embedding of the class."""
        head = FunctionHead(
            partial(self.family.head, self.model),
            modulation=self.head_modulation, log_scale=self.log_scale,
        )  # fmt: skip
        return ClassTarget(self.target_embedding, head, self.head_kind, given=self.family.input)

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Context:
        """The embedded images or tokens."""
        if drop is not None:
            raise ValueError(
                "a converted classifier is not trained without its condition, "
                "so guidance_scale must be 1"
            )
        key = self.family.input
        if not isinstance(batch.get(key), Tensor):
            raise missing(
                batch,
                key,
                f"{{{key!r}: [N, ...], 'labels': [N]}}, of which sampling needs the {key}",
                of="a converted classifier's",
            )
        check_some(batch[key])
        batch = self._given(batch)
        rows = self.family.enter(self.model, batch)
        return Context(rows, self.family.context(self.model, rows, batch))

    def run_layers(
        self, layers: Sequence[nn.Module], z_in: Tensor, level: NoiseLevel, condition: Context
    ) -> Hidden:
        """Runs `layers` on the rows, to which the noisy embedding [N, D] is added."""
        cond, rows = cast(Tensor, self._cond(level)), condition.rows
        noise = (self.noise_scale * z_in).to(rows.dtype)[:, None]
        if self.family.class_row:
            x = torch.cat([rows[:, :1] + noise, rows[:, 1:]], dim=1)
        else:
            x = rows + noise
        for layer in layers:
            x = layer(x, cond, condition.attention, checkpointing=self.checkpointing)
        return Hidden(x, cond)

    def features(self, hidden: Hidden) -> Features:
        """The pooled rows, [N, D]."""
        return Features(self.family.pool(self.model, hidden.x), hidden.cond)

    def compare(self) -> tuple[Tensor, Tensor]:
        """See `Converted.compare`; compares logits."""
        batch = self.family.example(self.model)
        own = self.family.plain_logits(self.model, batch)
        condition = self.embed_condition(batch)
        x = condition.rows
        for layer in self.layers:
            x = layer(x, None, condition.attention)
        return own, self.family.head(self.model, self.family.pool(self.model, x))

    def plain_loss(self, batch: Batch, z: Tensor | None = None) -> Tensor:
        """The model's own mean cross-entropy."""
        given = self._given(checked(self, batch, self.target))
        logits = self.family.plain_logits(self.model, given)
        return nnf.cross_entropy(at_least_float32(logits), given["labels"])

    def _given(self, batch: Batch) -> Batch:
        return whole_text(self.model, batch) if self.family.input == "tokens" else batch
