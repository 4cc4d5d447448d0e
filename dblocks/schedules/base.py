"""The interface of a schedule, and the registry of schedules for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from dblocks import functional as F
from dblocks.config import JsonConfig

OVERLAP = 0.05  # gamma; Shing et al. 2026


class Schedule(Protocol):
    """The interface of a schedule: how a target is corrupted.

    An `EDMSchedule` adds Gaussian noise of standard deviation sigma, a `MaskSchedule` masks tokens
    at time t. Here, sigma is the level of either.
    """

    corruption: ClassVar[Literal["noise", "masks"]]
    """The kind of corruption."""
    symbol: ClassVar[str]
    """The symbol of a level in messages."""
    loss_kinds: ClassVar[tuple[str, ...]]
    """The losses of models that this schedule trains; see `Target.loss_kind`."""
    weightings: ClassVar[tuple[str, ...]]
    """The supported weightings."""

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
        """The level and its coefficients, as the model gets them, each of the shape of sigma."""
        ...

    def state(self, z: Tensor) -> Tensor:
        """A corrupted target, converted to the dtype of the computation."""
        ...

    def corrupt(self, y: Tensor, level: Any, seed: int | Tensor | F.OffsetSeed) -> F.Noised:
        """The corrupted target z, and the network's input made from it; a function of the seed."""
        ...

    def scale_in(self, z: Tensor, level: Any) -> Tensor:
        """The network's input made from z."""
        ...

    def loss_weight(
        self, sigma: Tensor, /, block: int = 0, num_blocks: int = 1, *, overlap: float = 0.0
    ) -> Tensor:
        """The weight of a loss at levels that `sample` drew with these arguments."""
        ...


MEMBERS = (
    *(name for name in Schedule.__annotations__),
    *(name for name in vars(Schedule) if not name.startswith("_")),
)

# By the name in JSON; the first one is the default where JSON has no name.
SCHEDULES: dict[str, type[JsonConfig]] = {}

ScheduleType = TypeVar("ScheduleType", bound=type[JsonConfig])


def register(schedule: ScheduleType) -> ScheduleType:
    """Lets `BlocksConfig` read a schedule from JSON by its class name; a class decorator.

    Args:
        schedule: a frozen dataclass that derives from `JsonConfig` and has the members of
            `Schedule`, such as a subclass of `EDMSchedule`.

    Raises:
        TypeError: it is not such a class.
        ValueError: another class is registered by this name.
    """
    _check_class(schedule)
    name = schedule.__name__
    known = SCHEDULES.setdefault(name, schedule)
    # A reloaded module registers its class again.
    if (known.__module__, known.__qualname__) != (schedule.__module__, schedule.__qualname__):
        raise ValueError(
            f"a schedule's class name must be one that is not registered, got {name!r}, which is "
            f"{known.__module__}.{known.__qualname__}; rename the class"
        )
    SCHEDULES[name] = schedule
    return schedule


def check_schedule(schedule: object) -> None:
    """Raises TypeError unless `schedule` has the members of `Schedule`."""
    lacks = [name for name in MEMBERS if not hasattr(schedule, name)]
    if lacks or isinstance(schedule, type):
        raise TypeError(
            "schedule must be a schedule, such as dblocks.NoiseSchedule(), got "
            f"{schedule!r} of type {type(schedule).__name__}"
            + (f", which lacks {', '.join(lacks)}" if lacks and schedule is not None else "")
        )


def _check_class(schedule: Any) -> None:
    """Raises TypeError unless the class can be read from JSON."""
    # The base's decorator does not cover the fields that this class adds.
    own = vars(schedule).get("__dataclass_params__") if isinstance(schedule, type) else None
    if own is None or not own.frozen or not issubclass(schedule, JsonConfig):
        raise TypeError(
            "a schedule must be a frozen dataclass that derives from JsonConfig, such as an "
            f"EDMSchedule, got {schedule!r}; write @dataclass(frozen=True) below @register"
        )


def owner_of(levels: Tensor, boundaries: Tensor, symbol: str) -> Tensor:
    """The number of inner boundaries >= each level, compared in the levels' dtype (not float64)."""
    if not levels.is_floating_point():
        raise TypeError(f"{symbol} must be floating point, got {levels.dtype}")
    if levels.dtype == torch.float64:
        levels = levels.float()
    inner = boundaries[1:-1].to(device=levels.device, dtype=levels.dtype)
    return (inner >= levels[..., None]).sum(-1)
