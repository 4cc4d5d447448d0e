"""The targets of the kernels on an H200, with the times of the cycle model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks.kernels.check import Caught
from benchmarks.kernels.model import attention, rows

WIDTHS = (768, 1152, 1536, 2048, 3072, 4096, 5120, 8192)
CLASSES = (32_000, 50_257, 50_304, 128_256)
HEAD_WIDTHS = (128, 64)
# Smallest fraction of a copy's bandwidth.
OF_COPY = {
    "adaln fwd": (0.90, WIDTHS),
    "rms fwd": (0.90, WIDTHS),
    "adaln bwd": (0.85, WIDTHS),
    "rms bwd": (0.85, WIDTHS),
    "residual_adaln fwd": (0.90, WIDTHS),
    "residual_adaln bwd": (0.85, WIDTHS),
    "noise_inject z_in": (0.60, (2048,)),
    "edm_loss fwd": (0.60, (2048,)),
    "edm_loss fwd in training": (0.60, (2048,)),
    "edm_loss bwd": (0.85, (2048,)),
    "cross_entropy": (0.85, CLASSES),
}
# Smallest TFLOP/s of the loop without a mask. Goals of the forward are a little below its figures
# when they were set; blocks of 32 are compared with blocks of 1.
FORWARD_TFLOPS = {128: 500, 64: 500}
DKV_TFLOPS, DKV_STACK = 500, 64
OF_BLOCK_1 = 0.95
GROUP_GRADS = 0.10  # largest time relative to the backward


class Row(NamedTuple):
    """A row of the table: functions for its launch and its figure."""

    kernel: str
    width: str
    wanted: str
    launch: Callable[[], Caught]
    model: Callable[[], Figure]


class Figure(NamedTuple):
    """The model's figure, whether it reaches the goal, and properties of the compiled kernel."""

    text: str
    reached: bool
    code: str


def table() -> list[Row]:
    """Every row, in the order of the goals."""
    found = []
    for name, (wanted, widths) in OF_COPY.items():
        for width in widths:
            goal = f">= {wanted:.0%} of a copy"
            launch = partial(rows.launch_at, name, width)
            figure = partial(_of_copy, name, width, wanted)
            found.append(Row(name, str(width), goal, launch, figure))
    shape = " x ".join(map(str, rows.GROUP_SHAPE))
    goal = f"<= +{GROUP_GRADS:.0%}"
    found.append(
        Row("group_grads", shape, goal, lambda: rows.group_grads_launches()[1], _group_grads)
    )
    for D in HEAD_WIDTHS:
        goals = {
            ("fwd", 1): (f">= {FORWARD_TFLOPS[D]} TFLOP/s", _forward),
            ("fwd", 32): (f">= {OF_BLOCK_1} of block 1", _blocked),
            ("bwd_dq", 32): (f">= {OF_BLOCK_1} of block 1", _blocked),
            ("bwd_dkv", 1): (f">= {DKV_TFLOPS} TFLOP/s, stack <= {DKV_STACK}", _dkv),
            ("bwd_dkv", 32): (f">= {DKV_TFLOPS} TFLOP/s, stack <= {DKV_STACK}", _dkv),
        }
        for (which, block), (goal, judge) in goals.items():
            name = f"attention {which}, block {block}"
            launch = partial(attention.launch_of, which, D, block)
            found.append(Row(name, f"d{D}", goal, launch, partial(judge, which, D, block)))
    return found


def _of_copy(name: str, width: int, wanted: float) -> Figure:
    found = rows.model(name, width)
    k = found.kernel
    code = f"{k.warps} warps, {k.registers} registers, stack {k.stack}, {k.ctas} CTAs"
    return Figure(f"{found.share:.0%}", round(found.share, 2) >= wanted, code)


def _group_grads() -> Figure:
    on_top, from_l2 = rows.group_grads_on_top()
    return Figure(f"+{on_top:.0%}", round(on_top, 2) <= GROUP_GRADS, f"+{from_l2:.0%} from L2")


def _forward(which: str, D: int, block: int) -> Figure:
    found = attention.model(which, D, block)
    return Figure(_tflops(found), found.best >= FORWARD_TFLOPS[D], _code(found))


def _blocked(which: str, D: int, block: int) -> Figure:
    found, plain = attention.model(which, D, block), attention.model(which, D, 1)
    ratio = found.best / plain.best
    text = f"{_tflops(found)}, {ratio:.2f} of block 1"
    return Figure(text, round(ratio, 2) >= OF_BLOCK_1 and not found.serialized, _code(found))


def _dkv(which: str, D: int, block: int) -> Figure:
    found = attention.model(which, D, block)
    enough = found.best >= DKV_TFLOPS and found.kernel.stack <= DKV_STACK
    return Figure(_tflops(found), enough, _code(found))


def _tflops(found: attention.Modelled) -> str:
    return f"{' / '.join(f'{loop.tflops:.0f}' for loop in found.loops)} TFLOP/s"


def _code(found: attention.Modelled) -> str:
    k = found.kernel
    text = f"{k.warps} warps, {k.registers} registers, stack {k.stack}, {k.ctas} CTAs"
    return f"{text}, serialized" if found.serialized else text
