"""Text as tokens: Python's own prose, a dictionary or any file, split for training and evaluation.

Nothing is downloaded.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import re
import string
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dblocks.recipes.data.splits import Part
from dblocks.recipes.data.tokenizers import Characters, Tokenizer

PYDOC_CHARACTERS = 400_000  # a prefix, so that a longer later edition is cut to the same size
GCIDE = Path("/usr/share/dictd/gcide.dict.dz")  # where Debian's package dict-gcide puts it
GCIDE_CHARACTERS = 20_000_000  # a prefix too, from A to "prosiliency"
SOURCE_LINE = re.compile(rb"^\s*\[[^\[\]\n]*\]$", re.MULTILINE)  # such as [1913 Webster]
LETTERS_AND_DIGITS = string.ascii_lowercase + string.digits
DIGITS = b"zero one two three four five six seven eight nine".split()
HELD_OUT = 0.1  # the tail of the text
VALIDATION = 0.1  # the tail of what is left


@dataclass(frozen=True)
class Text:
    """A text as tokens."""

    tokens: Tensor
    """int64 [tokens]."""
    characters: int
    """How many characters they stand for, which bits per character divide by."""


@dataclass(frozen=True)
class Corpus:
    """What to train on and what to evaluate on: neighbouring parts of one text."""

    training: Text
    evaluated: Text
    tokenizer: Tokenizer
    sha256: str
    """Of the whole text before it was split, in UTF-8."""


def read_text(data: str | Path = "pydoc") -> str:
    """The text called `data`.

    Args:
        data: "pydoc", the first 400,000 characters of the documentation that Python ships
            (`pydoc_data.topics`, joined in the order of their names; another edition with another
            version of Python); "gcide", the first 20,000,000 characters of the Collaborative
            International Dictionary of English, which Debian's package dict-gcide installs, made
            letters and spaces by `letters_and_spaces`; or the path of a text file in UTF-8.

    Raises:
        ValueError: the file or the package is not there, the file is damaged or not UTF-8, or the
            text is empty.
    """
    if data == "pydoc":
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        return "\n".join(topics[name] for name in sorted(topics))[:PYDOC_CHARACTERS]
    if data == "gcide":
        return letters_and_spaces(_gcide())[:GCIDE_CHARACTERS]
    try:
        text = Path(data).read_text(encoding="utf-8-sig")  # a BOM is no text
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data must be 'pydoc', 'gcide' or a text file in UTF-8: {error}"
        ) from error
    if not text:
        raise ValueError(f"data must hold some text, got the empty file {data}")
    return text


def letters_and_spaces(text: bytes) -> str:
    """English as text8 has it: lower-case a to z, and single spaces between words.

    Digits are spelled out one by one; any other byte is a space. There is none at the ends.

    Args:
        text: in ASCII, or in an encoding that extends it; case is that of ASCII.

    Source: Mahoney 2006, about the test data of the Large Text Compression Benchmark.
    """
    kept = bytes(byte if chr(byte) in LETTERS_AND_DIGITS else 32 for byte in range(256))
    text = text.lower().translate(kept)
    for digit, word in enumerate(DIGITS):
        text = text.replace(str(digit).encode(), b" " + word + b" ")
    return b" ".join(text.split()).decode()


def _gcide() -> bytes:
    """The dictionary as it is installed, without the lines that only name an entry's source."""
    try:
        with gzip.open(GCIDE) as file:
            return SOURCE_LINE.sub(b"", file.read())
    except FileNotFoundError as error:
        raise ValueError(
            f"gcide must be in {GCIDE}, and is not; install Debian's package dict-gcide, or give a "
            "text file instead of the name"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{GCIDE} cannot be read: {error}") from error


def load_corpus(
    data: str | Path = "pydoc", *, part: Part = "final", tokenizer: Tokenizer | None = None
) -> Corpus:
    """A text, tokenized and split.

    Args:
        data: see `read_text`.
        part: "final" trains on the first 90 % of the characters and evaluates on the held-out tail
            of 10 %; "selection" never sees that tail: it evaluates on the last tenth of the rest.
        tokenizer: by default the characters of what "final" trains on.

    Raises:
        ValueError: the text cannot be read, or is too short to split.
    """
    text = read_text(data)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    rest, held_out = _split(text, HELD_OUT)
    tokenizer = tokenizer or Characters(rest)
    training, evaluated = (rest, held_out) if part == "final" else _split(rest, VALIDATION)
    return Corpus(_text(training, tokenizer), _text(evaluated, tokenizer), tokenizer, sha256)


def _split(text: str, fraction: float) -> tuple[str, str]:
    cut = round(len(text) * (1 - fraction))
    if not 0 < cut < len(text):
        raise ValueError(f"the text must be long enough to split, got {len(text)} characters")
    return text[:cut], text[cut:]


def _text(text: str, tokenizer: Tokenizer) -> Text:
    if isinstance(tokenizer, Characters):
        return Text(tokenizer.encode_tensor(text), len(text))
    return Text(torch.tensor(tokenizer.encode(text), dtype=torch.int64), len(text))
