"""Tokenizers: one token per character, or a Hugging Face tokenizer.json."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dblocks.config import parse_json, read_text

CHARACTERS_AT_A_TIME = 1 << 20  # that are looked up
UTF_32 = f"utf-32-{sys.byteorder[0]}e"
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
TOKENIZER_FILE = "tokenizer.json"
LONGEST_TOKENIZER = 256 * 2**20  # bytes


class Tokenizer(Protocol):
    """Converts text to tokens and back."""

    @property
    def size(self) -> int:
        """Number of tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens."""
        ...

    def to_json(self) -> str:
        """The tokenizer as JSON, for `tokenizer_from_json`."""
        ...


class Characters:
    """One token per character, in sorted order; token 0 stands for unknown characters.

    Args:
        characters: the known characters, each once.
    """

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = (UNKNOWN, *sorted(set(characters) - {UNKNOWN}))
        codes = [ord(character) for character in self.characters]
        # Token of each code point; the last entry stands for all larger ones.
        self._numbers = torch.zeros(max(codes) + 2, dtype=torch.int64, device="cpu")
        self._numbers[codes] = torch.arange(len(codes), device="cpu")

    @property
    def size(self) -> int:
        """How many tokens there are."""
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """The token of each character; 0 for unknown ones."""
        return self.encode_tensor(text).tolist()

    def encode_tensor(self, text: str) -> Tensor:
        """As `encode`, int64 [characters]; without a Python object per character."""
        found = torch.empty(len(text), dtype=torch.int64, device="cpu")
        for start in range(0, len(text), CHARACTERS_AT_A_TIME):
            # A str may hold lone surrogates, which are code points but not valid UTF-32.
            part = text[start : start + CHARACTERS_AT_A_TIME].encode(UTF_32, "surrogatepass")
            codes = torch.frombuffer(bytearray(part), dtype=torch.int32)
            known = codes.clamp_(max=len(self._numbers) - 1)
            found[start : start + len(codes)] = self._numbers[known]
        return found

    def decode(self, tokens: Iterable[int]) -> str:
        """The characters of tokens."""
        return "".join(self.characters[token] for token in tokens)

    def to_json(self) -> str:
        """The known characters as JSON."""
        return json.dumps({"characters": "".join(self.characters[1:])})


class FileTokenizer:
    """A tokenizer of Hugging Face's package tokenizers.

    Args:
        text: the contents of a `tokenizer.json`.

    Raises:
        ImportError: the package is not installed.
        ValueError: the text is not a tokenizer.json.
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
        """One more than the largest token; unused numbers in between count as tokens."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=False)

    def to_json(self) -> str:
        """The contents of the tokenizer.json."""
        return self._tokenizer.to_str()


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer written by `to_json`, or that of a Hugging Face tokenizer.json.

    Raises:
        ValueError: the text is neither.
        ImportError: the package tokenizers is needed and not installed.
    """
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(f"a tokenizer must be a JSON file: {error}") from error
    if isinstance(values, dict) and set(values) == {"characters"}:
        return Characters(values["characters"])
    return FileTokenizer(text)


def read_tokenizer(path: str | None) -> Tokenizer | None:
    """The tokenizer in a file; None if no path is given.

    Raises:
        ValueError: the file cannot be read, or holds no tokenizer.
        ImportError: the package tokenizers is needed and not installed.
    """
    if path is None:
        return None
    try:
        text = read_text(Path(path), longest=LONGEST_TOKENIZER)
    except ValueError as error:
        raise ValueError(f"tokenizer must be a readable JSON file: {error}") from error
    return tokenizer_from_json(text)
