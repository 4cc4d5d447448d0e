"""Required speeds, as ratios of a baseline's time to that of dblocks in one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.ops.attention import SHAPES

BOUND_BY_MEMORY = ((2, 2048, 2048), "float32")  # 32 MiB per tensor: close to the time of a copy
SMALL = (4, 64, 192)
WORDS = ((2048, 50_304, 768), "float32")


class Target(NamedTuple):
    """dblocks must be `at_least` this many times as fast as `baseline`, in all cases or in one."""

    op: str
    direction: str
    baseline: str
    at_least: float
    only: tuple[tuple[int, ...], str | None] | None = None
    but: tuple[tuple[tuple[int, ...], str | None], ...] = ()

    def covers(self, op: str, shape: Sequence[int], dtype: str, direction: str) -> bool:
        """Whether the target applies to a case."""
        if (op, direction) != (self.op, self.direction):
            return False
        if self.only is not None:
            return _is(self.only, shape, dtype)
        return not any(_is(case, shape, dtype) for case in self.but)


def _is(case: tuple[tuple[int, ...], str | None], shape: Sequence[int], dtype: str) -> bool:
    return tuple(shape) == case[0] and case[1] in (None, dtype)


def _attention() -> tuple[Target, ...]:
    """Targets of doubled_attention on CPUs, by T; eager is PyTorch's with a dense mask."""
    at_least = {
        256: {"eager": 1.6},
        512: {"eager": 1.6, "causal_2T": 1.1, "flex": 1.0},
        1024: {"eager": 2.4, "causal_2T": 1.4, "flex": 1.5},
        2048: {"eager": 2.8, "causal_2T": 1.4, "flex": 1.5},
    }
    return tuple(
        Target(
            "doubled_attention", "forward" if baseline == "flex" else "both", baseline, factor,
            only=(shape, None),
        )
        for shape in SHAPES["cpu"]
        for baseline, factor in at_least[shape[3]].items()
    )  # fmt: skip


# For the C++ ops and composed attention, on CPUs with 2 cores and AVX-512.
TARGETS = (
    *_attention(),
    # Eager PyTorch stores the logits of all rows and their gradient.
    Target("linear_cross_entropy", "both", "eager", 1 / 1.35, only=WORDS),
    Target("adaln", "forward", "torch.compile", 1.4),
    Target("adaln", "forward", "eager", 2.7, but=((SMALL, None),)),
    Target("adaln", "forward", "eager", 2.5, only=(SMALL, None)),
    Target("adaln", "both", "torch.compile", 1.5, but=(BOUND_BY_MEMORY,)),
    Target("adaln", "both", "torch.compile", 1.15, only=BOUND_BY_MEMORY),
    Target("adaln", "both", "eager", 1.8, but=(BOUND_BY_MEMORY,)),
    Target("adaln", "both", "eager", 1.15, only=BOUND_BY_MEMORY),
    Target("adaln_rms", "both", "torch.compile", 1.4),
    Target("adaln_rms", "both", "eager", 4.0),
    Target("residual_adaln", "both", "torch.compile", 1.5),
    Target("residual_adaln", "both", "eager", 2.5),
    Target("noise_inject", "forward", "eager", 4.0),
    Target("noise_inject", "forward", "torch.compile", 3.0),
    Target("edm_loss", "both", "eager", 3.0),
    Target("euler_step", "forward", "torch.compile", 0.95),
    Target("euler_step", "forward", "eager", 3.0),
)
