"""Options, tiles and layouts of the launches of doubled_attention's kernels."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dblocks.kernels._common import launches

LARGE = ("sm_80", "sm_90", "sm_100", "sm_103")  # targets with 160 KB of shared memory or more


class Tiles(NamedTuple):
    """Query rows and keys of a tile, and how a program works on them."""

    BLOCK_M: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Options(NamedTuple):
    """The options of a call, in the order of the op's arguments."""

    block_size: int
    token: bool  # clean_causal="token"
    scale: float
    cu_seqlens: Tensor | None = None
    noisy_only: bool = False  # query="noisy"
    noisy_first: bool = False  # order="noisy_clean"
    valid: Tensor | None = None
    window: int | None = None
    softcap: float | None = None
    alibi_slopes: Tensor | None = None
    backend: str | None = None  # of the composed attention; unused here

    @property
    def loaded(self) -> bool:
        """Whether a score takes more registers than the plain mask does."""
        extras = (self.window, self.softcap, self.alibi_slopes)
        return (self.token and self.block_size > 1) or extras != (None, None, None)


class Settings(NamedTuple):
    """The tiles of the three kernels with matrix products."""

    forward: Tiles
    dq: Tiles
    dkv: Tiles


# By the most columns of a head. The accumulators take M x D registers in the forward and in dq and
# 2 x K x D in dkv, of the 64K that the 8 warps of a program can have; 4 warps leave room for a
# second program. Scores of M x K take most of the rest, stages what shared memory is left. 128 rows
# are what two warp groups multiply at once by wgmma. In dkv two programs of 64 keys wait less than
# one of 128.
_LARGE = {
    64: Settings(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)),
    128: Settings(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(32, 64, 4, 2)),
    256: Settings(Tiles(128, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 2)),
}
_SMALL = {  # 99 KB of shared memory
    64: Settings(Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    128: Settings(Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2), Tiles(32, 64, 8, 2)),
    256: Settings(Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
}
_AMD = {  # 64 KB, and 64 threads a warp
    64: Settings(Tiles(128, 64, 4, 2), Tiles(128, 64, 4, 1), Tiles(64, 64, 4, 1)),
    128: Settings(Tiles(128, 64, 4, 1), Tiles(128, 32, 4, 1), Tiles(32, 64, 4, 1)),
    256: Settings(Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1)),
}
# Without matrix instructions a thread holds whole rows of its operands: small tiles, many threads.
_FLOAT32 = {
    64: Settings(*3 * [Tiles(32, 32, 8, 1)]),
    128: Settings(*3 * [Tiles(32, 16, 8, 1)]),
    256: Settings(*3 * [Tiles(16, 16, 8, 1)]),
}


def settings(width: int, dtype: torch.dtype, target: str, loaded: bool = False) -> Settings:
    """The tiles for a head width on a target such as "sm_90": a function of these alone.

    A `loaded` forward has 8 warps, since 4 would spill. Results repeat bit for bit on one target;
    between targets they differ in the last bits, as tiles and matrix units do.
    """
    if dtype == torch.float32:
        table = _FLOAT32
    elif target.startswith("gfx"):
        table = _AMD
    else:
        table = _LARGE if target in LARGE else _SMALL
    found = table[next(columns for columns in table if width <= columns)]
    if loaded and table is _LARGE:
        found = found._replace(forward=found.forward._replace(num_warps=8))
    return found


@functools.cache
def target(device: torch.device) -> str:
    """The compile target of `device`; the interpreter uses the tiles of sm_90."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def copies(tensors: Sequence[Tensor], *whole: Any) -> list[int]:
    """The positions of what is made contiguous: tensors of another last stride, and all of `whole`.

    Among the latter, which follow the tensors, may be other things than tensors.
    """
    rest = [
        i
        for i, x in enumerate(whole, len(tensors))
        if isinstance(x, Tensor) and not x.is_contiguous()
    ]
    return [*launches.copies(*tensors), *rest]


def halves(T: int, options: Options) -> tuple[int, int]:
    """The first row of the clean and of the noisy half of the keys."""
    return (T, 0) if options.noisy_first else (0, T)


def window_of(T: int, options: Options) -> int | None:
    """The window, where it hides anything."""
    window = options.window
    return None if window is None or window >= T else window


def strides(*tensors: Tensor) -> list[int]:
    """The first three strides of each tensor, or of its copy."""
    return [s for x in tensors for s in launches.unit_last(x).stride()[:3]]


def slopes_stride(options: Options) -> int:
    """Of the samples of slopes [N, H] with adjacent heads; 0 of [H]."""
    slopes = options.alibi_slopes
    return 0 if slopes is None or slopes.ndim == 1 else slopes.shape[1]


def widths(D: int, DV: int) -> tuple[int, int, int, int]:
    """Columns of keys and of values, each with the power of two that holds them."""
    return D, launches.next_power_of_2(D), DV, launches.next_power_of_2(DV)


def forms(options: Options) -> tuple[bool, bool, bool]:
    """PACKED, SELF and TOKEN of the kernels."""
    alone = options.block_size == 1
    return not options.noisy_only, alone, options.token and not alone
