"""The interface of a network that can be divided into blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from dblocks.blocks.targets.base import LOSS_KINDS, METHODS, TARGET, Batch, Target


class BlockModel(Protocol):
    """The interface of a network that can be trained in blocks; it is also an `nn.Module`.

    Three methods and a target: embed the condition, run some of the layers, and return the features
    from which the target makes a prediction. Optional attributes: `condition_drop`, the probability
    with which training drops a sample's condition, 0 by default; `reads`, a tuple of the entries of
    a batch that it reads in addition to those of its target, so that any other entry, such as a
    misspelt one, raises an error; `call_reads`, the entries that `embed_condition` reads, the only
    ones that a call or sampler then accepts; a method `before_use()`, called before each loss and
    before a condition is bound; and a method `by_parts(layers)`, the modules that are not called
    where these layers run, since their parts are: hooks on them are refused.

    Parameters outside `layers` are shared by all blocks. A batch is a mapping; sampling passes the
    keys that `embed_condition` reads, and training what `target.check` returned. `level` is what
    the schedule's `level` returns: a `NoiseLevel`, or a `MaskLevel` if tokens are masked; then the
    `z_in` of `run_layers` is int64 [N, T].

    Examples: `docs/custom.md` (L2), `dblocks/models/vit.py` (classes).
    """

    layers: nn.ModuleList
    """The residual layers, first to last."""

    @property
    def target(self) -> Target:
        """What the network predicts; may be a plain attribute."""
        ...

    def embed_condition(self, batch: Batch, drop: Tensor | None) -> Any:
        """Embeds the condition that the target is predicted from; the same for every noise level.

        `drop` [N] is true where the null condition replaces the condition; None for nowhere.
        """
        ...

    def run_layers(
        self, layers: Sequence[nn.Module], z_in: Tensor, level: Any, condition: Any
    ) -> Any:
        """Runs some of the layers on the scaled noisy target `z_in = c_in*z`."""
        ...

    def features(self, hidden: Any) -> Any:
        """The input of the target's prediction, from the layers' result.

        The rows for its output head, or F for an `L2Target`.
        """
        ...


@runtime_checkable
class Divisible(Protocol):
    """Further methods of a network whose layers are not only the children of `layers`.

    `DiffusionBlocks` divides other networks itself; a converted model keeps its layers in place.
    """

    names: tuple[str, ...]
    """The paths of its layers."""

    def with_layers(self, layers: dict[str, nn.Module], *, shared: bool) -> nn.Module:
        """A view with these layers, by index, and `shared`: with the modules outside the layers."""
        ...

    def without_layers(self) -> nn.Module:
        """A deep copy of the modules outside the layers."""
        ...

    def follow_(self, other: Any) -> None:
        """Copies the settings of the network of which this is such a copy, before it runs."""
        ...

    def follow_original_(self, *, moved: bool) -> None:
        """Of such a copy: takes over the original's modes, freezing, dtypes and, `moved`, devices.

        Only what was changed in the original since the last call; before a batch is drawn.
        """
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
    missing = [f"{method}()" for method in METHODS if not callable(getattr(model, method, None))]
    missing += [] if hasattr(model, "target") else ["target"]
    if missing:
        raise TypeError(
            f"{name} must have all members of dblocks.blocks.BlockModel, "
            f"got none of {', '.join(missing)}; add them to it or to a subclass"
        )
    target: Any = model.target
    lacks = [member for member in TARGET if not hasattr(target, member)]
    if lacks or isinstance(target, type):
        got = f"the class {target.__name__}" if isinstance(target, type) else type(target).__name__
        without = f" without {', '.join(lacks)}" if lacks else ""
        raise TypeError(
            f"target of {name} must be a dblocks.blocks.Target, such as L2Target('images'), "
            f"got {got}{without}"
        )
    if target.loss_kind not in LOSS_KINDS:
        raise ValueError(
            f"loss_kind of the target of {name} must be one of {LOSS_KINDS}, "
            f"got {target.loss_kind!r}; it says what score() returns"
        )
