"""What a target offers: what a network is trained to tell, and how its prediction is scored."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn

Batch = Mapping[str, Any]
LossKind = Literal["cross_entropy", "l2", "masked_cross_entropy"]
LOSS_KINDS = get_args(LossKind)
METHODS = ("embed_condition", "run_layers", "features")  # of a network, see `BlockModel`
OPTIONAL = ("reads", "call_reads")


class CheckedBatch(dict[str, Any]):
    """A batch that its target has checked, which a training step does once."""


class Features(NamedTuple):
    """What an output head multiplies, where a learned head is told of the noise too."""

    x: Tensor
    """[N, D] or [N, T, D]."""
    cond: Tensor | None = None
    """Conditioning vectors [N, cond_dim] or [N, S, cond_dim]; None for the null conditioning."""


class Target(metaclass=ABCMeta):
    """What a network predicts: it checks batches, embeds them, scores and denoises predictions.

    A target is a plain object, no `nn.Module`: it refers to modules of its network and adds no
    names to the state_dict. A network holds it as `target`, an attribute or, where its modules may
    be replaced later, a property that makes it anew.

    `N...` stands for the shape of sigma: [N], or for a target [N, T, D] also [N, S], one level for
    each of S segments of T/S tokens. `level` is what the schedule's `level` returns. `features` is
    what the network's `features` returned: a tensor, or `Features`.
    """

    loss_kind: LossKind
    """What `score` returns: a cross-entropy; the L2 loss in F space (which carries the weight);
    or, with a `MaskSchedule`, the cross-entropy summed over masked tokens over the number of
    tokens."""
    top_share: float = 0.0
    """What `BlocksConfig.top_share` is for this target where it is "auto"."""
    reads: tuple[str, ...] | None = None
    """The entries of a batch that it reads; None: not said, and no entry is refused. A class that
    overrides methods says it anew."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """The parameters of `embed`, which all blocks share, since they say what the target is."""
        return ()

    def check(self, batch: Batch) -> Batch:
        """The batch, checked: what the other methods and `embed_condition` get in training.

        One that returns a `CheckedBatch` is called once a step.

        Raises:
            ValueError: for an entry that is missing, or of a shape or value that does not fit.
            TypeError: for an entry of another dtype.
        """
        return CheckedBatch(batch)

    @abstractmethod
    def sigma_shape(self, batch: Batch) -> tuple[int, ...]:
        """The shape of sigma for this batch, `N...`."""

    def scored(self, batch: Batch) -> Tensor | None:
        """How many parts of a batch, 0-d, the mean of `score` is over, where not all are scored.

        Where several processes have a part of the batch each, their means are weighted by it, so
        that the mean is that over all that is scored. None: as many in batches of one shape.
        """
        return None

    @abstractmethod
    def embed(self, batch: Batch) -> Tensor:
        """The clean target y, [N..., ...]."""

    @abstractmethod
    def predict(self, features: Any, z: Tensor, level: Any) -> Tensor:
        """The prediction: logits, or F for the L2 loss."""

    @abstractmethod
    def denoise(self, prediction: Tensor, z: Tensor, level: Any) -> Tensor:
        """The estimate of y from a prediction, of the shape of z."""

    @abstractmethod
    def score(
        self, features: Any, z: Tensor, level: Any, y: Tensor, seed: Tensor, batch: Batch
    ) -> Tensor:
        """The losses, exactly of the shape of sigma; noise regenerated from `seed` is that of z."""


TARGET = [n for n in ("loss_kind", *vars(Target)) if n[0] != "_" and n not in OPTIONAL]


def missing(batch: Batch, key: str, content: str, *, of: str = "a") -> ValueError:
    """The error for a batch that has no tensor `key`.

    Args:
        batch: what was given.
        key: what it lacks.
        content: what such a batch is.
        of: whose batch it is, such as "a DiT's".
    """
    value = batch.get(key)
    return ValueError(
        f"{of} batch must hold a tensor {key!r}, got the keys {sorted(batch)}"
        f"{'' if value is None else f' with {key} of type {type(value).__name__}'}; it is {content}"
    )
