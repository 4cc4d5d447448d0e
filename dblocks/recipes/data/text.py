"""Text as tokens: Python's own prose, a dictionary or any file; tokenizers, splits and windows.

Nothing is downloaded. Batches are functions of (seed, step), as those of images.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import re
import string
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dblocks.recipes.data.digits import Part, generator_of

PYDOC_CHARACTERS = 400_000  # a prefix, so that a longer later edition is cut to the same size
GCIDE = Path("/usr/share/dictd/gcide.dict.dz")  # where Debian's package dict-gcide puts it
GCIDE_CHARACTERS = 20_000_000  # a prefix too, from A to "prosiliency"
SOURCE_LINE = re.compile(rb"^\s*\[[^\[\]\n]*\]$", re.MULTILINE)  # such as [1913 Webster]
LETTERS_AND_DIGITS = string.ascii_lowercase + string.digits
DIGITS = b"zero one two three four five six seven eight nine".split()
HELD_OUT = 0.1  # the tail of the text
VALIDATION = 0.1  # the tail of what is left
CHARACTERS_AT_A_TIME = 1 << 20  # that are looked up
UTF_32 = f"utf-32-{sys.byteorder[0]}e"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
TOKENIZER_FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """Text to token numbers and back."""

    @property
    def size(self) -> int:
        """How many tokens there are."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens."""
        ...

    def to_json(self) -> str:
        """What `tokenizer_from_json` makes the same tokenizer of."""
        ...


class Characters:
    """A token for each character of a text, sorted; token 0 stands for any other.

    Args:
        characters: the known characters, each once.
    """

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = (UNKNOWN, *sorted(set(characters) - {UNKNOWN}))
        codes = [ord(character) for character in self.characters]
        # Of each code point; the one after the largest known stands for all beyond.
        self._numbers = torch.zeros(max(codes) + 2, dtype=torch.int64, device="cpu")
        self._numbers[codes] = torch.arange(len(codes), device="cpu")

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """The number of each character; 0 for an unknown one."""
        return self.encode_tensor(text).tolist()

    def encode_tensor(self, text: str) -> Tensor:
        """As `encode`, int64 [characters]: for long texts, with no Python object a character."""
        found = torch.empty(len(text), dtype=torch.int64, device="cpu")
        for start in range(0, len(text), CHARACTERS_AT_A_TIME):
            # A str may hold single surrogates, which are no text in UTF-32 but code points.
            part = text[start : start + CHARACTERS_AT_A_TIME].encode(UTF_32, "surrogatepass")
            codes = torch.frombuffer(bytearray(part), dtype=torch.int32)
            known = codes.clamp_(max=len(self._numbers) - 1)
            found[start : start + len(codes)] = self._numbers[known]
        return found

    def decode(self, tokens: Iterable[int]) -> str:
        """The characters of these numbers."""
        return "".join(self.characters[token] for token in tokens)

    def to_json(self) -> str:
        """The known characters as JSON."""
        return json.dumps({"characters": "".join(self.characters[1:])})


class FileTokenizer:
    """A tokenizer of Hugging Face's package tokenizers.

    Args:
        text: the contents of its `tokenizer.json`.

    Raises:
        ImportError: the package is not installed.
        ValueError: it is not such a file.
    """

    def __init__(self, text: str) -> None:
        try:
            library: Any = importlib.import_module("tokenizers")
        except ImportError as error:
            raise ImportError(
                "a tokenizer file needs the package tokenizers, which is not installed; "
                "`pip install tokenizers`"
            ) from error
        try:
            self._tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(
                f"the tokenizer must be a Hugging Face tokenizer.json: {error}"
            ) from error

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special ones around it."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def to_json(self) -> str:
        """The contents of its file."""
        return self._tokenizer.to_str()


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer that `to_json` wrote, or that of a Hugging Face tokenizer.json.

    Raises:
        ValueError: the text is neither.
        ImportError: it needs the package tokenizers, which is not installed.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"a tokenizer must be a JSON file: {error}") from error
    if isinstance(values, dict) and set(values) == {"characters"}:
        return Characters(values["characters"])
    return FileTokenizer(text)


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
        text = Path(data).read_text(encoding="utf-8")
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


def random_windows(tokens: Tensor, length: int, batch_size: int, *, seed: int, step: int) -> Tensor:
    """Batch number `step`: windows of `length` tokens that start anywhere, [batch_size, length]."""
    _check_length(tokens, length)
    starts = torch.randint(
        len(tokens) - length + 1, (batch_size, 1), generator=generator_of(seed, step)
    )
    return tokens[starts + torch.arange(length)]


def scored_windows(
    tokens: Tensor, length: int, batch_size: int, *, windows: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows in which every token but the first of the text is scored exactly once.

    Windows follow one another by half of their length; each scores its second half, so with at
    least half a window of context, and the first one all but its first token.

    Args:
        tokens: int64 [tokens] of the text.
        length: tokens in a window.
        batch_size: windows at a time.
        windows: only so many of them, or all where there are fewer: from each of as many equal
            parts of the text the one in the middle.

    Yields:
        tokens [n, length] and bool [n, length], true where a token is scored.

    Raises:
        ValueError: the text is shorter than a window, or `windows` is not positive.
    """
    _check_length(tokens, length)
    if windows is not None and windows < 1:
        raise ValueError(f"windows must be positive, got {windows}")
    half = length // 2
    last = len(tokens) - length
    starts = torch.arange(0, last + half, half).clamp(max=last)
    scored = torch.ones(len(starts), length, dtype=torch.bool)
    scored[0, 0] = False
    ends = starts + length
    scored[1:] = torch.arange(length) >= (ends[:-1] - starts[1:])[:, None]
    if windows is not None and windows < len(starts):
        middle = (2 * torch.arange(windows) + 1) * len(starts) // (2 * windows)
        starts, scored = starts[middle], scored[middle]
    for at, mask in zip(starts.split(batch_size), scored.split(batch_size), strict=True):
        yield tokens[at[:, None] + torch.arange(length)], mask


def consecutive_windows(tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Windows that follow one another, in which every token of the text is scored exactly once.

    The last one begins early enough to be whole; what it shares with the one before is not scored.

    Returns:
        tokens [n, length] and bool [n, length], true where a token is scored.
    """
    _check_length(tokens, length)
    starts = torch.arange(0, len(tokens), length)
    last = len(tokens) - length
    position = torch.arange(length)
    scored = starts.clamp(max=last)[:, None] + position >= starts[:, None]
    return tokens[starts.clamp(max=last)[:, None] + position], scored


def _check_length(tokens: Tensor, length: int) -> None:
    if not 2 <= length <= len(tokens):
        raise ValueError(
            f"a window must have from 2 tokens to those of the text, {len(tokens)}, got {length}; "
            "choose a shorter context or a longer text"
        )
