"""A converted classifier: the target is the embedding of the class, as in dblocks' `ViT`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks import functional as F
from dblocks.blocks import Batch
from dblocks.integrations.convert.layers import ConditionedLayer, cond_dim
from dblocks.integrations.convert.network import Converted, at_least_float32, check_some
from dblocks.models.images import check_label_values, check_labels, check_pairs, entry
from dblocks.models.posterior import Head, posterior_logits
from dblocks.nn import LabelEmbedding, Modulation
from dblocks.schedules import NoiseLevel

NOISE_SCALE = 0.1  # of a row's numbers, whose size the model's class token tells


class ClassFamily(Protocol):
    """What differs between classifiers."""

    input: str
    """The batch's key of what is classified: images or tokens."""
    class_row: bool
    """The first row stands for the class; else all rows together do."""

    def enter(self, model: nn.Module, batch: Batch) -> Tensor:
        """Rows [N, P, D], as they enter the first layer."""
        ...

    def context(self, model: nn.Module, rows: Tensor, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of the layers' attention."""
        ...

    def pool(self, model: nn.Module, x: Tensor) -> Tensor:
        """What the layers leave, as one row a sample, [N, D]."""
        ...

    def head(self, model: nn.Module, pooled: Tensor) -> Tensor:
        """Logits of pooled rows."""
        ...

    def plain_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's own logits."""
        ...


class Context(NamedTuple):
    """What the noisy label is predicted from."""

    rows: Tensor
    """Rows [N, P, D], as they enter the layers."""
    attention: Mapping[str, Any]
    """Of the layers' attention."""


class Hidden(NamedTuple):
    """What the layers leave for the readout."""

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

    A batch holds "labels" [N], and what is classified, which is all that sampling needs.

    Args:
        model: the user's.
        layers: `ConditionedLayer`s by name.
        family: what is special of the model.
        num_classes: of its head.
        width: D of its rows.
        sigma_data: of the schedule.
        embed_scale: norm of a class' embedding.
        head_kind: what logits are.
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
        self.loss_kind: Literal["cross_entropy"] = "cross_entropy"
        self.family = family
        self.num_classes = num_classes
        self.target_embedding = LabelEmbedding(num_classes, width, embed_scale)
        self.head_kind: Head = head_kind
        self.noise_scale = nn.Parameter(torch.tensor(NOISE_SCALE))
        if head_kind == "learned":
            self.readout_modulation = Modulation(width, 2, cond_dim=cond_dim(width))
            self.log_scale = nn.Parameter(torch.tensor(-math.log(sigma_data)))
        self.added_to_()

    def rows(self) -> Tensor:
        """Embeddings of the classes, [num_classes, D]."""
        return cast(LabelEmbedding, self.target_embedding).rows()

    def sigma_shape(self, batch: Batch) -> tuple[int, ...]:
        """One noise level a sample: [N]."""
        given, labels = self._given(batch), self._labels(batch)
        check_pairs(given, labels)
        check_some(labels)
        return (len(labels),)

    def embed_target(self, batch: Batch) -> Tensor:
        """Embeddings of `batch["labels"]` [N], [N, D]."""
        labels = self._labels(batch)
        check_label_values(labels, self.num_classes)
        return self.rows()[labels]

    def embed_condition(self, batch: Batch, drop: Tensor | None = None) -> Context:
        """The rows of what is classified."""
        if drop is not None:
            raise ValueError(
                "a converted classifier is not trained without its condition, "
                "so guidance_scale must be 1"
            )
        self._given(batch)
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

    def read_out(self, hidden: Hidden, z: Tensor, level: NoiseLevel) -> Tensor:
        """Logits [N, num_classes], float32 or float64."""
        pooled = self.family.pool(self.model, hidden.x)
        if self.head_kind == "posterior":
            logits = at_least_float32(self.family.head(self.model, pooled))
            return posterior_logits(logits, z, self.rows(), level)
        m = F.edm_denoise(pooled, z, level.sigma, sigma_data=level.sigma_data)
        with torch.autocast(m.device.type, enabled=False):
            shift, scale = self.readout_modulation(hidden.cond, len(m))
            m = (m * (1 + scale) + shift) * self.log_scale.exp().to(m.dtype)
        logits = self.family.head(self.model, m.to(pooled.dtype))
        return at_least_float32(logits)

    def denoise(self, prediction: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        """The expected embedding of the class, [N, D]."""
        with torch.autocast(z.device.type, enabled=False):
            return prediction.softmax(-1) @ self.rows().to(prediction.dtype)

    def score(
        self, hidden: Hidden, z: Tensor, level: NoiseLevel, y: Tensor, seed: Tensor, batch: Batch
    ) -> Tensor:
        """Cross-entropy of each sample, [N]."""
        logits = self.read_out(hidden, z, level)
        return nnf.cross_entropy(logits, batch["labels"], reduction="none")

    def plain_loss(self, batch: Batch, z: Tensor | None = None) -> Tensor:
        """The model's own mean cross-entropy."""
        logits = self.family.plain_logits(self.model, batch)
        return nnf.cross_entropy(at_least_float32(logits), self._labels(batch))

    def _given(self, batch: Batch) -> Tensor:
        key = self.family.input
        return entry(batch, key, of="a converted classifier", sampling=f"the {key}")

    def _labels(self, batch: Batch) -> Tensor:
        labels = entry(
            batch, "labels", of="a converted classifier", sampling=f"the {self.family.input}"
        )
        check_labels(labels)
        return labels
