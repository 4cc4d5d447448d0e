"""Targets that are one of K embeddings, classified by an output head; the class of a sample."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from dblocks import functional as F
from dblocks.blocks.targets.base import (
    Batch,
    CheckedBatch,
    Features,
    LossKind,
    Target,
    missing,
)
from dblocks.nn import Modulation, over_rows
from dblocks.ops._checks import values_known
from dblocks.schedules import NoiseLevel

Head = Literal["posterior", "learned"]
TOP_SHARE = 0.6  # chosen on validation data, see docs/results.md
IGNORED = -100  # PyTorch's ignore_index


class Linear(Protocol):
    """The matrix of an output head: an `nn.Linear`, or any object with its attributes."""

    @property
    def weight(self) -> Tensor:
        """[K, D]."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """[K]."""
        ...


class OutputHead:
    """Logits of features m, in float32 (float64) whatever the layers' dtype.

        logits = W (g*(m*(1 + scale) + shift)) + b

    Args:
        linear: W and b, such as an `nn.Linear`, or `UnitRows`.
        modulation: computes shift and scale from the conditioning vector; none by default.
        log_scale: ln g; g is 1 by default. If it is a parameter, create the target in a property of
            the network, as parameters may be replaced (`load_state_dict(assign=True)`).

    Raises:
        TypeError: `linear` is a module that does not compute `nn.Linear`, such as one with an
            adapter or packed weights: only weight and bias are used here.
    """

    def __init__(
        self,
        linear: Linear,
        *,
        modulation: Modulation | None = None,
        log_scale: Tensor | None = None,
    ) -> None:
        _check_linear(linear)
        self.linear = linear
        self.modulation = modulation
        self.log_scale = log_scale

    def rows(self, m: Tensor, cond: Tensor | None = None) -> Tensor:
        """The input of the product with W, from features [N, D] or [N, T, D]."""
        with torch.autocast(m.device.type, enabled=False):
            m = at_least_float32(m)
            if self.modulation is not None:
                shift, scale = self.modulation(cond, len(m))
                if m.ndim == 3:
                    shift, scale = over_rows(shift, m), over_rows(scale, m)
                m = m * (1 + scale) + shift
            return m if self.log_scale is None else m * self.log_scale.exp().to(m.dtype)

    def logits(
        self, m: Tensor, cond: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Logits [N, K] or [N, T, K]; `dtype`, by default that of m, is for heads of other
        classes."""
        return product(self.rows(m, cond), self.linear.weight, self.linear.bias)

    def losses(self, m: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of features [N, T, D] with `labels` [N, T], 0 where they are `IGNORED`.

        Logits of all rows are never in memory at once.
        """
        return F.linear_cross_entropy(
            self.rows(m), self.linear.weight, labels, bias=self.linear.bias,
            ignore_index=IGNORED, reduction="none",
        )  # fmt: skip


class Table(Protocol):
    """Embeddings of K targets, such as a `LabelEmbedding`."""

    embed_scale: float
    """Norm of every row."""

    @property
    def weight(self) -> Tensor:
        """The parameter of the rows, [K, D]."""
        ...

    def rows(self) -> Tensor:
        """All rows at their norm, float32 or float64 [K, D]."""
        ...

    def parameters(self) -> Iterable[nn.Parameter]:
        """The trained parameters."""
        ...


class EmbeddedTarget(Target):
    """Base of targets that are one of K embeddings, classified by an output head.

    With h the features, E the embeddings and `head` the logits of an `OutputHead`,

        posterior   logits = head(h) + E z / sigma^2
        learned     logits = head(c_skip*z + c_out*h)

    The first is Bayes' rule, since all rows of E have the same norm: if head(h) is ln p(k |
    condition) up to a constant, the logits are ln p(k | z, condition) up to a constant. Its terms
    are float32 (float64) under autocast too: in bfloat16 the error of the second would be hundreds
    of nats at sigma_min. The learned head, as published, has to learn a factor between 4 and
    250,000.

    The loss is the cross-entropy of the logits; the denoised estimate is the expected embedding.

    Args:
        embedding: E, such as a `LabelEmbedding`.
        output_head: computes the logits of features.
        head: "posterior" or "learned".
    """

    loss_kind: LossKind = "cross_entropy"
    top_share = TOP_SHARE

    def __init__(self, embedding: Table, output_head: OutputHead, head: Head = "posterior") -> None:
        check_head(head)
        if not callable(getattr(embedding, "rows", None)):
            raise TypeError(
                "the embedding of a target must have rows of one norm, such as a "
                f"dblocks.nn.LabelEmbedding(num_classes, dim), got a {type(embedding).__name__}"
            )
        self.embedding = embedding
        self.output_head = output_head
        self.head: Head = head

    def parameters(self) -> Iterable[nn.Parameter]:
        """Those of the embedding."""
        return self.embedding.parameters()

    def scored(self, batch: Batch) -> Tensor | None:
        """None: all of them."""
        return None

    def rows(self) -> Tensor:
        """The embeddings of all targets, [K, D]."""
        return self.embedding.rows()

    def denoise(self, prediction: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        """The expected embedding `softmax(logits) @ E`, [N, D] or [N, T, D]."""
        with torch.autocast(z.device.type, enabled=False):
            return prediction.softmax(-1) @ self.rows().to(prediction.dtype)


class ClassTarget(EmbeddedTarget):
    """The embedding of a sample's class, with one noise level per sample.

    A batch holds "labels", int64 [N], and the input to classify. Features are [N, D].

    Args:
        embedding: of the classes, such as a `LabelEmbedding`.
        output_head: an `OutputHead`, or a plain `nn.Linear`.
        head: "posterior" or "learned"; see `EmbeddedTarget`.
        given: the key of the input to classify.
    """

    def __init__(
        self,
        embedding: Table,
        output_head: OutputHead | nn.Linear,
        head: Head = "posterior",
        *,
        given: str = "images",
    ) -> None:
        if isinstance(output_head, nn.Linear):
            output_head = OutputHead(output_head)
        super().__init__(embedding, output_head, head)
        self.given = given

    @property
    def reads(self) -> tuple[str, ...]:
        """See `Target.reads`."""
        return ("labels", self.given)

    def check(self, batch: Batch) -> Batch:
        """See `Target.check`; there must be a label in 0..K-1 for each sample."""
        for key in ("labels", self.given):
            if not isinstance(batch.get(key), Tensor):
                raise missing(batch, key, f"{{'labels': [N], {self.given!r}: [N, ...]}}")
        labels, given = batch["labels"], batch[self.given]
        check_labels(labels)
        check_label_values(labels, len(self.embedding.weight))
        if len(given) != len(labels):
            raise ValueError(
                f"{self.given} and labels must have the same number of samples, "
                f"got {len(given)} {self.given} and {len(labels)} labels; pair them"
            )
        return CheckedBatch(batch)

    def sigma_shape(self, batch: Batch) -> tuple[int, ...]:
        """[N]."""
        return (len(batch["labels"]),)

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings of the labels, [N, D]."""
        return self.rows()[batch["labels"]]

    def predict(self, features: Tensor | Features, z: Tensor, level: NoiseLevel) -> Tensor:
        """Logits [N, K], float32 (float64)."""
        f, cond = features if isinstance(features, Features) else Features(features)
        check_features(f, z, any_width=self.head == "posterior")
        if self.head == "posterior":
            logits = check_logits(self.output_head.logits(f), f, self.embedding)
            return posterior_logits(logits, z, self.rows(), level)
        m = F.edm_denoise(f, z, level.sigma, sigma_data=level.sigma_data)
        return check_logits(self.output_head.logits(m, cond, dtype=f.dtype), f, self.embedding)

    def score(
        self,
        features: Tensor | Features,
        z: Tensor,
        level: NoiseLevel,
        y: Tensor,
        seed: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Cross-entropy of each sample, [N]."""
        logits = self.predict(features, z, level)
        return nnf.cross_entropy(logits, batch["labels"], reduction="none")


def check_head(head: str) -> None:
    """Raises unless `head` is one of `Head`."""
    if head not in get_args(Head):
        raise ValueError(f"head must be one of {get_args(Head)}, got {head!r}")


def check_features(features: Tensor, z: Tensor, *, any_width: bool) -> None:
    """Raises ValueError unless there is a row of features for each noisy embedding, [N, D]."""
    expected = z.shape[:-1] if any_width else z.shape
    if (features.shape[:-1] if any_width else features.shape) != expected:
        width = "D" if any_width else str(z.shape[-1])
        raise ValueError(
            f"features must have shape [{', '.join(map(str, z.shape[:-1]))}, {width}], a row for "
            f"each noisy embedding {list(z.shape)}, got {list(features.shape)}; see features() of "
            "the network"
        )


def check_logits(logits: Tensor, features: Tensor, embedding: Table) -> Tensor:
    """`logits`, which must have one for each embedding in each row; ValueError."""
    expected = (*features.shape[:-1], len(embedding.weight))
    if logits.shape != expected:
        raise ValueError(
            f"logits must have shape {list(expected)}, one for each of {expected[-1]} embeddings, "
            f"got {list(logits.shape)} from features {list(features.shape)}; give the output head "
            "as many rows as there are embeddings"
        )
    return logits


def precision_of(level: NoiseLevel, z: Tensor) -> Tensor:
    """`1/sigma^2` in float32 (float64), of the shape that multiplies z [N, D] or [N, T, D]."""
    precision = level.sigma.square().reciprocal()
    return precision[:, None] if z.ndim == 2 else over_rows(precision.view(len(z), -1, 1), z)


def posterior_logits(logits: Tensor, z: Tensor, rows: Tensor, level: NoiseLevel) -> Tensor:
    """Logits given the noisy embedding of the class, from those without it.

        ln p(k | z, c) = ln p(k | c) + E_k z / sigma^2 + const,   z = E_k + sigma*eps

    Args:
        logits: `ln p(k | c)` up to a constant, [N, K].
        z: noisy embeddings, [N, D].
        rows: E, [K, D].
        level: of z, [N].
    """
    with torch.autocast(z.device.type, enabled=False):
        scaled = precision_of(level, z) * z
        return logits + scaled @ rows.to(scaled.dtype).t()


def check_labels(labels: Tensor) -> None:
    """Raises TypeError or ValueError unless labels are int64 [N]."""
    if labels.dtype != torch.int64:
        # uint8 and bool would select rows as masks do.
        raise TypeError(f"labels must be int64, got {labels.dtype}; call labels.long()")
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape [N], got {list(labels.shape)}; flatten them")


def check_label_values(labels: Tensor, num_classes: int) -> None:
    """Raises ValueError unless labels are classes, where reading them does not synchronise."""
    # On a GPU reading the values would synchronise; there indexing itself asserts.
    if not values_known(labels) or not labels.numel():
        return
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must be in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 (float64 stays), as losses and estimates are computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias` in the dtype of the rows, under autocast too."""
    with torch.autocast(rows.device.type, enabled=False):
        bias = None if bias is None else bias.to(rows.dtype)
        return nnf.linear(rows, weight.to(rows.dtype), bias)


def _check_linear(linear: object) -> None:
    """Raises if the module's own forward, which would be bypassed, is not that of `nn.Linear`."""
    if (
        isinstance(linear, nn.Module)
        and getattr(type(linear), "forward", None) is not nn.Linear.forward
    ):
        raise TypeError(
            "an output head must be an nn.Linear, whose weight and bias are multiplied without "
            f"calling it, got a {type(linear).__name__}; merge its adapter, or leave the head out "
            "of those that get one"
        )
