"""Sizes, rates and speeds as text: 24GiB, 50GB/s, 400T."""

from __future__ import annotations

import math
import re

DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
NUMBER = r"(\d+(?:\.\d*)?|\.\d+)\s*"
BYTES = re.compile(NUMBER + r"((?:[kMGTP]|[KMGTP]i)?)B")
RATE = re.compile(BYTES.pattern + r"/s")
COUNT = re.compile(NUMBER + r"([kMGTP]?)")
SPEED = re.compile(NUMBER + r"([kMGTP]?)(?:FLOP/s|FLOPS)?")


def parse_bytes(name: str, text: str) -> int:
    """The bytes of a text such as "24GiB" (2^30 bytes each) or "24GB" (10^9 bytes each).

    Args:
        name: name of the option, for the error message.
        text: a number above 0 and a unit: B, kB, MB, GB, TB, PB, KiB, MiB, GiB, TiB or PiB.

    Raises:
        ValueError: the text has another form.
    """
    return math.floor(_parsed(name, text, BYTES, "a number of bytes such as 24GiB or 24GB"))


def parse_rate(name: str, text: str) -> float:
    """Bytes per second of a text such as "50GB/s"; as `parse_bytes`, followed by /s."""
    return _parsed(name, text, RATE, "bytes a second such as 50GB/s")


def parse_flops(name: str, text: str) -> float:
    """Operations per second of a text such as "400T": a number, and k, M, G, T or P."""
    return _parsed(name, text, SPEED, "operations a second such as 400T")


def parse_count(name: str, text: str) -> float:
    """A number such as "15T": a number, and k, M, G, T or P."""
    return _parsed(name, text, COUNT, "a number such as 15G or 15T")


def format_bytes(count: float) -> str:
    """A text such as 23.41 GiB, in the largest unit that is at most `count`."""
    for unit, size in reversed(BINARY.items()):
        if count >= size:
            return f"{count / size:,.2f} {unit}B"
    return f"{count:,.0f} B"


def format_seconds(seconds: float) -> str:
    """A text such as 1.25 s or 3.10 ms."""
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _parsed(name: str, text: str, pattern: re.Pattern[str], what: str) -> float:
    found = pattern.fullmatch(text.strip()) if isinstance(text, str) else None
    value = float(found[1]) * (DECIMAL | BINARY)[found[2]] if found else 0.0
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be {what}, above 0, got {text!r}")
    return value
