"""A run of one of the methods, as its record holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from benchmarks.study.methods.ensemble import EnsembleTrainer
from benchmarks.study.methods.forward_forward import ForwardForwardTrainer
from benchmarks.study.methods.greedy import GreedyTrainer
from benchmarks.study.methods.noprop import NoPropTrainer
from benchmarks.study.methods.units import UnitTrainer
from dblocks.recipes.data.images import load_images
from dblocks.recipes.run import Run

Method = Literal["greedy", "forward_forward", "noprop", "ensemble"]
TRAINERS: Mapping[Method, Callable[..., UnitTrainer]] = {
    "greedy": GreedyTrainer,
    "forward_forward": ForwardForwardTrainer,
    "noprop": NoPropTrainer,
    "ensemble": EnsembleTrainer,
}


@dataclass(frozen=True, kw_only=True)
class MethodRun(Run):
    """Train a vision transformer by another method; `blocks` units of equally many layers."""

    method: Method
    """How it is trained."""
    data: str = "digits"
    """See `dblocks train vit`."""
    image_size: int | None = None
    """See `dblocks train vit`."""
    batch_size: int = 128
    """Images in a batch."""
    width: int = 64
    """Width of the tokens."""
    heads: int = 4
    """Attention heads."""
    mlp_ratio: float = 2.0
    """Width inside an MLP over that of the tokens."""
    patch_size: int | None = None
    """Side of a patch, by default as of `dblocks train vit`."""
    flip: bool = False
    """Mirror half of the views, where a method makes views."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}, got {self.method!r}")
        if self.end_to_end or self.depth % self.blocks:
            raise ValueError(
                f"blocks must divide the {self.depth} layers, and end_to_end be False, got "
                f"{self.blocks} and {self.end_to_end}"
            )

    @property
    def name(self) -> str:
        """What a progress bar calls it."""
        return f"{self.method.replace('_', '-')}, {self.blocks} units"

    def trainer(self) -> UnitTrainer:
        """The network of this run with its data, ready to train."""
        data = load_images(self.data, self.part, size=self.image_size)
        return TRAINERS[self.method](self, *data)


def steps_of(run: MethodRun, layer_evaluations: int) -> MethodRun:
    """The run with as many steps as that many layer evaluations last."""
    per_step = TRAINERS[run.method].layers_per_step(run)  # pyright: ignore
    return replace(run, steps=round(layer_evaluations / per_step))
