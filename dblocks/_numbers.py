"""Checks of the numbers that configs and calls are given."""

from __future__ import annotations

import math
import operator


def check_block(block: int, num_blocks: int) -> int:
    """`block` as an int, which must be one of 0 .. num_blocks - 1.

    Integers of any library will do; a tensor on a GPU is read, which synchronises.
    """
    index = _integer(block)
    if index is None:
        raise TypeError(
            f"block must be an integer, got {block!r} of type {type(block).__name__}; "
            "convert it with int()"
        )
    if not 0 <= index < num_blocks:
        raise ValueError(f"block must be in 0..{num_blocks - 1}, got {index}")
    return index


def check_overlap(overlap: float) -> None:
    """Raises unless `overlap` is a finite number that is not negative."""
    check_finite("overlap", overlap)
    if overlap < 0:
        raise ValueError(f"overlap must not be negative, got {overlap}")


def check_share(name: str, value: float) -> None:
    """Raises unless `value` is a number in [0, 1]."""
    check_finite(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_count(name: str, value: int) -> int:
    """`value` as an int, which must be positive; integers of any library will do."""
    count = _integer(value)
    if count is None or count < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return count


def _integer(value: object) -> int | None:
    # Not operator.index alone: a compiled graph need not know it.
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def check_finite(name: str, value: float) -> None:
    """Raises unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
