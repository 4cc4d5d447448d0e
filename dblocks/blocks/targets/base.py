"""The interface of a target: what a network predicts, and how the prediction is scored."""

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
    """A batch that its target has checked, once per training step."""


class Features(NamedTuple):
    """The input of an output head that is conditioned on the noise level."""

    x: Tensor
    """[N, D] or [N, T, D]."""
    cond: Tensor | None = None
    """Conditioning vectors [N, cond_dim] or [N, S, cond_dim]; None for the null conditioning."""


class Target(metaclass=ABCMeta):
    """What a network predicts: it checks batches, embeds them, scores and denoises predictions.

    A target is a plain object, not an `nn.Module`: it refers to modules of its network and adds no
    names to the state_dict. A network holds it as `target`: an attribute, or, if its modules may be
    replaced later, a property that creates it.

    `N...` stands for the shape of sigma: [N], or for a target [N, T, D] also [N, S], one level for
    each of S segments of T/S tokens. `level` is the result of the schedule's `level`, and
    `features` that of the network's `features`: a tensor, or `Features`.
    """

    loss_kind: LossKind
    """What `score` returns: a cross-entropy; the L2 loss in F space (which carries the weight);
    or, with a `MaskSchedule`, the cross-entropy summed over masked tokens over the number of
    tokens."""
    top_share: float = 0.0
    """The value of `BlocksConfig.top_share` for this target if it is "auto"."""
    reads: tuple[str, ...] | None = None
    """The entries of a batch that it reads; None accepts any entry. A subclass that overrides
    methods must define it again."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """The parameters of `embed`, which all blocks share, since they define the target."""
        return ()

    def check(self, batch: Batch) -> Batch:
        """The checked batch, as the other methods and `embed_condition` get it in training.

        A `check` that returns a `CheckedBatch` is called once per step.

        Raises:
            ValueError: for an entry that is missing, or of a shape or value that does not fit.
            TypeError: for an entry of another dtype.
        """
        return CheckedBatch(batch)

    @abstractmethod
    def sigma_shape(self, batch: Batch) -> tuple[int, ...]:
        """The shape of sigma for this batch, `N...`."""

    def scored(self, batch: Batch) -> Tensor | None:
        """The number of scored parts of a batch, 0-d, if `score` is a mean over some of them.

        With several processes, their means are weighted by it, so that the result is the mean over
        all scored parts. None: the same number in all batches of one shape.
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
        """The losses, exactly of the shape of sigma; `seed` regenerates the noise in z."""


TARGET = [n for n in ("loss_kind", *vars(Target)) if n[0] != "_" and n not in OPTIONAL]


def missing(batch: Batch, key: str, content: str, *, of: str = "a") -> ValueError:
    """The error for a batch that has no tensor `key`.

    Args:
        batch: what was given.
        key: the missing key.
        content: the expected batch, in words.
        of: the owner of the batch, such as "a DiT's".
    """
    value = batch.get(key)
    return ValueError(
        f"{of} batch must hold a tensor {key!r}, got the keys {sorted(batch)}"
        f"{'' if value is None else f' with {key} of type {type(value).__name__}'}; it is {content}"
    )
