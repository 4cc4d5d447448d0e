"""The speeds that must hold, as ratios of a peer's time to that of dblocks in one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.ops.attention import SHAPES

BOUND_BY_MEMORY = ((2, 2048, 2048), "float32")  # 32 MiB a tensor: little but the copy remains
SMALL = (4, 64, 192)
WORDS = ((2048, 50_304, 768), "float32")


class Floor(NamedTuple):
    """dblocks is `at_least` as many times as fast as `peer`, at every shape and dtype or at one."""

    op: str
    direction: str
    peer: str
    at_least: float
    only: tuple[tuple[int, ...], str | None] | None = None
    but: tuple[tuple[tuple[int, ...], str | None], ...] = ()

    def covers(self, op: str, shape: Sequence[int], dtype: str, direction: str) -> bool:
        """Whether the floor speaks of this case."""
        if (op, direction) != (self.op, self.direction):
            return False
        if self.only is not None:
            return _is(self.only, shape, dtype)
        return not any(_is(case, shape, dtype) for case in self.but)


def _is(case: tuple[tuple[int, ...], str | None], shape: Sequence[int], dtype: str) -> bool:
    return tuple(shape) == case[0] and case[1] in (None, dtype)


def _attention() -> tuple[Floor, ...]:
    """Of doubled_attention on CPUs, by T: eager is PyTorch's attention with the dense mask."""
    at_least = {
        256: {"eager": 1.6},
        512: {"eager": 1.6, "causal_2T": 1.1, "flex": 1.0},
        1024: {"eager": 2.4, "causal_2T": 1.4, "flex": 1.5},
        2048: {"eager": 2.8, "causal_2T": 1.4, "flex": 1.5},
    }
    return tuple(
        Floor(
            "doubled_attention", "forward" if peer == "flex" else "both", peer, factor,
            only=(shape, None),
        )
        for shape in SHAPES["cpu"]
        for peer, factor in at_least[shape[3]].items()
    )  # fmt: skip


# Of the C++ ops and the composed attention, for CPUs with 2 cores and AVX-512.
FLOORS = (
    *_attention(),
    # Eager PyTorch holds the logits of all rows and their gradient.
    Floor("linear_cross_entropy", "both", "eager", 1 / 1.35, only=WORDS),
    Floor("adaln", "forward", "torch.compile", 1.4),
    Floor("adaln", "forward", "eager", 2.7, but=((SMALL, None),)),
    Floor("adaln", "forward", "eager", 2.5, only=(SMALL, None)),
    Floor("adaln", "both", "torch.compile", 1.5, but=(BOUND_BY_MEMORY,)),
    Floor("adaln", "both", "torch.compile", 1.15, only=BOUND_BY_MEMORY),
    Floor("adaln", "both", "eager", 1.8, but=(BOUND_BY_MEMORY,)),
    Floor("adaln", "both", "eager", 1.15, only=BOUND_BY_MEMORY),
    Floor("adaln_rms", "both", "torch.compile", 1.4),
    Floor("adaln_rms", "both", "eager", 4.0),
    Floor("residual_adaln", "both", "torch.compile", 1.5),
    Floor("residual_adaln", "both", "eager", 2.5),
    Floor("noise_inject", "forward", "eager", 4.0),
    Floor("noise_inject", "forward", "torch.compile", 3.0),
    Floor("edm_loss", "both", "eager", 3.0),
    Floor("euler_step", "forward", "torch.compile", 0.95),
    Floor("euler_step", "forward", "eager", 3.0),
)
