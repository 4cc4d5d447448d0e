"""What a network and a schedule offer to be cut into blocks, and how they are cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from dblocks import functional as F
from dblocks._config import JsonConfig
from dblocks._numbers import check_count, check_share
from dblocks.mask_schedule import MaskSchedule
from dblocks.schedule import OVERLAP, NoiseSchedule

Batch = Mapping[str, Any]
Weighting = Literal["auto", "edm", "clamped", "none", "batch_mean"]
Shared = Literal["train", "frozen", "private", "reduce"]
LossKind = Literal["cross_entropy", "l2", "masked_cross_entropy"]
SHARED = ("train", "frozen", "private", "reduce")
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
TOP_SHARE = 0.6  # of targets that are one of K; chosen on validation data, see docs/results.md
VALUES = ("loss_kind", "condition_drop", "target_embedding")


class Schedule(Protocol):
    """What training, prediction and sampling ask of a schedule: how a target is corrupted.

    `NoiseSchedule` adds Gaussian noise of deviation sigma, `MaskSchedule` masks tokens at time t.
    What is called sigma here is the level of either.
    """

    symbol: ClassVar[str]
    """What a level is called."""
    loss_kinds: ClassVar[tuple[str, ...]]
    """The losses of models that this schedule trains; see `BlockModel.loss_kind`."""
    weightings: ClassVar[tuple[str, ...]]
    """The weightings that have a meaning."""

    def boundaries(self, num_blocks: int) -> Tensor:
        """The levels that separate the blocks, descending float64 [B+1] on the CPU."""
        ...

    def range_of(self, block: int, num_blocks: int, *, overlap: float = 0.0) -> tuple[float, float]:
        """The lowest and highest level that a block is trained on."""
        ...

    def sample(
        self,
        block: int,
        num_blocks: int,
        shape: Sequence[int],
        *,
        overlap: float = ...,
        top_share: float = ...,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws levels of one block, float32 of the given shape."""
        ...

    def block_of(self, sigma: Tensor, /, num_blocks: int) -> Tensor:
        """The block that owns each level, int64 of the same shape."""
        ...

    def level(self, sigma: Tensor, /) -> Any:
        """What a model is told of the levels, each of the shape of sigma."""
        ...

    def state(self, z: Tensor) -> Tensor:
        """A corrupted target as given, in the dtype that the calls compute in."""
        ...

    def corrupt(self, y: Tensor, level: Any, seed: int | Tensor) -> F.Noised:
        """The corrupted target z, and z as the network takes it; a function of the seed."""
        ...

    def scale_in(self, z: Tensor, level: Any) -> Tensor:
        """z as the network takes it."""
        ...

    def loss_weight(
        self, sigma: Tensor, /, block: int = 0, num_blocks: int = 1, *, overlap: float = 0.0
    ) -> Tensor:
        """The weight of a loss at levels that `sample` drew with these arguments."""
        ...


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


@dataclass(frozen=True)
class BlocksConfig(JsonConfig):
    """How a network is cut into blocks and how each is trained."""

    num_blocks: int
    """Number of blocks."""
    layers_per_block: tuple[int, ...] | None = None
    """Layers of each block, first to last; evenly by default, extra layers to the first blocks."""
    schedule: NoiseSchedule | MaskSchedule = field(default_factory=NoiseSchedule)
    """Levels of noise, or of masks, and their partition."""
    overlap: float = OVERLAP
    """Widening of each block's range in training, as a fraction of its length (of ln sigma, or of
    the share of masked tokens)."""
    top_share: float | Literal["auto"] = "auto"
    """Share of every block's draws that are at the highest level (sigma_max, or all masked), where
    the condition alone tells anything: so later blocks learn to read it too. It changes training
    only, not which block a level belongs to. auto is .6 for a cross-entropy with noise, else 0."""
    weighting: Weighting = "auto"
    """Weight of a sample's loss; auto is edm for L2, none for cross-entropy, and the weight of the
    bound for masks."""
    shared: Shared = "train"
    """What happens to parameters outside the layers: train, frozen, private or reduce."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_blocks", check_count("num_blocks", self.num_blocks))
        if self.layers_per_block is not None:
            counts = (check_count("layers_per_block", n) for n in self.layers_per_block)
            object.__setattr__(self, "layers_per_block", tuple(counts))
        if self.weighting not in self.schedule.weightings:
            raise ValueError(
                f"weighting must be one of {self.schedule.weightings} with a "
                f"{type(self.schedule).__name__}, got {self.weighting!r}"
            )
        if self.shared not in SHARED:
            raise ValueError(f"shared must be one of {SHARED}, got {self.shared!r}")
        if self.shared == "reduce":
            raise ValueError(
                "shared='reduce' needs block-parallel training, which comes with "
                "dblocks.distributed; use 'train', 'frozen' or 'private'"
            )
        if self.top_share != "auto":
            check_share("top_share", self.top_share)
        # The schedule checks that its partition makes as many blocks, and the overlap.
        self.schedule.range_of(0, self.num_blocks, overlap=self.overlap)
        self._check_layers()

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The schedule, of those that add noise.

        Raises:
            TypeError: it masks tokens.
        """
        if not isinstance(self.schedule, NoiseSchedule):
            raise TypeError(
                "noise levels need blocks with a NoiseSchedule, "
                f"got a {type(self.schedule).__name__}; masked tokens are sampled by dblocks.unmask"
            )
        return self.schedule

    def top_share_for(self, loss_kind: str) -> float:
        """`top_share`, as "auto" means it for this kind of loss."""
        if self.top_share == "auto":
            return TOP_SHARE if loss_kind == "cross_entropy" else 0.0
        return self.top_share

    def layer_ranges(self, num_layers: int) -> tuple[tuple[int, int], ...]:
        """The layers [first, last) of each block, which cover every layer once.

        Raises:
            ValueError: there are fewer layers than blocks, or `layers_per_block` does not sum to
                `num_layers`.
        """
        if num_layers < self.num_blocks:
            raise ValueError(
                f"num_blocks must be at most the number of layers, {num_layers}, "
                f"got {self.num_blocks}"
            )
        counts = self.layers_per_block
        if counts is None:
            each, extra = divmod(num_layers, self.num_blocks)
            counts = tuple(each + (b < extra) for b in range(self.num_blocks))
        if sum(counts) != num_layers:
            raise ValueError(
                f"layers_per_block must sum to the number of layers, {num_layers}, got {counts}"
            )
        ends = [sum(counts[: b + 1]) for b in range(self.num_blocks)]
        return tuple((end - count, end) for end, count in zip(ends, counts, strict=True))

    def _check_layers(self) -> None:
        counts = self.layers_per_block
        if counts is None:
            return
        if len(counts) != self.num_blocks:
            raise ValueError(
                f"layers_per_block must have num_blocks={self.num_blocks} entries, got {counts}"
            )
