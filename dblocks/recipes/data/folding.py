"""Reduces English to letters and spaces, as in text8."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator

LETTERS_AND_DIGITS = string.ascii_lowercase + string.digits
DIGITS = b"zero one two three four five six seven eight nine".split()


def letters_and_spaces(text: bytes) -> str:
    """English in the form of text8: lower-case a to z, and single spaces between words.

    Digits are spelled out one by one; any other byte becomes a space. The result does not begin or
    end with a space.

    Args:
        text: text in ASCII or an encoding that extends it; only ASCII letters are lower-cased.

    Source: Mahoney 2006, about the test data of the Large Text Compression Benchmark.
    """
    kept = bytes(byte if chr(byte) in LETTERS_AND_DIGITS else 32 for byte in range(256))
    text = text.lower().translate(kept)
    for digit, word in enumerate(DIGITS):
        text = text.replace(str(digit).encode(), b" " + word + b" ")
    return b" ".join(text.split()).decode()


def folded(pieces: Iterable[str]) -> Iterator[str]:
    """`letters_and_spaces` for a text in pieces that end between words."""
    space = ""
    for piece in pieces:
        if words := letters_and_spaces(piece.encode()):
            yield space + words
            space = " "
