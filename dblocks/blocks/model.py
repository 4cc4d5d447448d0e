"""What a network offers to be cut into blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from torch import Tensor, nn

Batch = Mapping[str, Any]
LossKind = Literal["cross_entropy", "l2", "masked_cross_entropy"]
LOSS_KINDS = get_args(LossKind)
PARTS = (
    "sigma_shape",
    "embed_target",
    "embed_condition",
    "run_layers",
    "read_out",
    "denoise",
    "score",
)
VALUES = ("loss_kind", "condition_drop", "target_embedding")


class BlockModel(Protocol):
    """What a network offers to be trained in blocks; it is also an `nn.Module`.

    Four parts: embed the target, embed the condition, run some of the layers, read out and score.
    Parameters outside `layers` are shared by all blocks. A batch is a mapping; sampling passes the
    keys that `embed_condition` reads. `N...` stands for the shape of sigma: [N], or for a target
    [N, T, D] also [N, S], one level for each of S segments of T/S tokens. `level` is what the
    schedule's `level` returns: a `NoiseLevel`, or a `MaskLevel` where the target are tokens that
    are masked, int64 [N, T]; then `run_layers` takes them as they are.

    `score` returns one loss for each sigma. `F.edm_loss` averages over all but the first dimension,
    so an L2 model with a sigma for every segment hands it the segments as samples; noise depends on
    the position of an element only, and stays that of z:

        F.edm_loss(f.reshape(N*S, T//S, D), y.reshape(N*S, T//S, D), sigma.reshape(-1), seed,
                   sigma_data=level.sigma_data).view(N, S)

    Smallest examples: `ConvDenoiser` in `tests/test_blocks.py` (L2), `dblocks/models/vit.py`.
    """

    layers: nn.ModuleList
    """The residual layers, first to last."""
    condition_drop: float
    """Probability with which training drops a sample's condition."""

    @property
    def loss_kind(self) -> LossKind:
        """What `score` returns; an attribute will do.

        Cross-entropy; the L2 loss in F space (which carries the weight); or, with a `MaskSchedule`,
        the cross-entropy summed over masked tokens over the number of tokens.
        """
        ...

    @property
    def target_embedding(self) -> nn.Module | None:
        """What holds the parameters of `embed_target`, if it has any; an attribute will do."""
        ...

    def sigma_shape(self, batch: Batch) -> tuple[int, ...]:
        """The shape of sigma for this batch, `N...`."""
        ...

    def embed_target(self, batch: Batch) -> Tensor:
        """The clean target y, [N..., ...]."""
        ...

    def embed_condition(self, batch: Batch, drop: Tensor | None) -> Any:
        """What the target is predicted from; the same for every noise level.

        `drop` [N] is true where the condition gives way to the null condition.
        """
        ...

    def run_layers(
        self, layers: Sequence[nn.Module], z_in: Tensor, level: Any, condition: Any
    ) -> Any:
        """Runs some of the layers on the scaled noisy target `z_in = c_in*z`."""
        ...

    def read_out(self, hidden: Any, z: Tensor, level: Any) -> Tensor:
        """The prediction from the layers' result: logits, or F for the L2 loss."""
        ...

    def denoise(self, prediction: Tensor, z: Tensor, level: Any) -> Tensor:
        """The estimate of y from a prediction, of the shape of z."""
        ...

    def score(
        self, hidden: Any, z: Tensor, level: Any, y: Tensor, seed: Tensor, batch: Batch
    ) -> Tensor:
        """The losses, exactly of the shape of sigma; noise regenerated from `seed` is that of z."""
        ...


@runtime_checkable
class Divisible(Protocol):
    """What a network also offers whose layers are not the children of `layers` alone.

    `DiffusionBlocks` divides others itself: a converted model keeps its layers where they were.
    """

    def with_layers(self, layers: dict[str, nn.Module], *, shared: bool) -> nn.Module:
        """A view of layers, by their number, with all that is outside the layers, or without."""
        ...

    def without_layers(self) -> nn.Module:
        """A deep copy of what is outside the layers."""
        ...


def check_model(model: object) -> None:
    """Raises unless `model` is an `nn.Module` with the members of `BlockModel`."""
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {name}")
    if not isinstance(getattr(model, "layers", None), nn.ModuleList):
        raise TypeError(
            f"{name} must hold its residual layers in an nn.ModuleList `layers`; "
            "see dblocks.blocks.BlockModel"
        )
    missing = [f"{part}()" for part in PARTS if not callable(getattr(model, part, None))]
    missing += [value for value in VALUES if not hasattr(model, value)]
    if missing:
        raise TypeError(
            f"{name} must have all members of dblocks.blocks.BlockModel, "
            f"got none of {', '.join(missing)}; add them to it or to a subclass"
        )
    if model.loss_kind not in LOSS_KINDS:
        raise ValueError(
            f"loss_kind of {name} must be one of {LOSS_KINDS}, got {model.loss_kind!r}; "
            "it says what score() returns"
        )
    target = model.target_embedding
    if not (target is None or isinstance(target, nn.Module)):
        raise TypeError(
            f"target_embedding of {name} must be an nn.Module or None, "
            f"got {type(target).__name__}; wrap a parameter in a module"
        )
