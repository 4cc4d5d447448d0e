"""Text as tokens, split for training and evaluation; large texts are memory-mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dblocks.recipes.data.cache import cached, key_of, mapped
from dblocks.recipes.data.splits import Part
from dblocks.recipes.data.text_sources import Fold, TextSource, open_text
from dblocks.recipes.data.tokenizers import Characters, Tokenizer

HELD_OUT = 0.1  # held-out fraction, the end of the text
VALIDATION = 0.1  # validation fraction, the end of the rest
IN_MEMORY = 64 * 2**20  # bytes; tokens of larger texts are cached in a file
FORMAT = 1  # version of these files
Ranges = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Text:
    """A text as tokens."""

    tokens: Tensor
    """Integers [tokens]: int64, or for large texts memory-mapped uint8, uint16 or int32."""
    characters: int
    """Number of characters of the text, the divisor of bits per character."""


@dataclass(frozen=True)
class Corpus:
    """Training and evaluation text: adjacent parts of one text."""

    training: Text
    evaluated: Text
    tokenizer: Tokenizer
    sha256: str
    """SHA-256 of the whole text before the split, in UTF-8."""


def read_text(data: str | Path = "pydoc", path: str | Path | None = None) -> str:
    """A whole text in memory; for the arguments see `open_text`."""
    return "".join(open_text(data, path).pieces())


def load_corpus(
    data: str | Path = "pydoc",
    *,
    path: str | Path | None = None,
    fold: Fold | None = None,
    part: Part = "final",
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """A text, tokenized and split.

    The held-out part is the data set's own test part; for text8, the last 5 %; otherwise the last
    10 % of the characters. The validation part is the last tenth of the rest; for text8, the 5 %
    after the first 90 %, which are the training part.

    Args:
        data: see `open_text`.
        path: see `open_text`.
        fold: see `open_text`.
        part: "final" evaluates on the held-out part; "selection" does not use it and evaluates on
            the validation part.
        tokenizer: by default, the characters of the training text of "final".

    Raises:
        ValueError: the text cannot be read, or is too short to split.
        ImportError: a package that its format needs is not installed.
    """
    source = open_text(data, path, fold)
    if source.size <= IN_MEMORY:
        found: list[Tensor] = []
        about = _tokenize(source, part, tokenizer, lambda tokens, size: found.append(tokens))
        tokens = torch.cat(found)
    else:
        name = None if tokenizer is None else tokenizer.to_json()
        key = key_of(
            source.files, format=FORMAT, data=str(data), fold=fold, part=part, tokenizer=name
        )

        def make(file: Any) -> dict[str, Any]:
            def write(tokens: Tensor, size: int) -> None:
                file.write(cast(Any, tokens.to(_dtype(size)).view(torch.uint8).numpy()))

            return _tokenize(source, part, tokenizer, write)

        tokens_file, about = cached(key, make)
        tokens = mapped(tokens_file, _dtype(about["size"]))
    tokenizer = tokenizer or Characters(about["known"])
    parts = zip(tokens.split(about["tokens"]), about["characters"], strict=True)
    training, evaluated = (Text(part, characters) for part, characters in parts)
    return Corpus(training, evaluated, tokenizer, about["sha256"])


def _tokenize(
    source: TextSource,
    part: Part,
    tokenizer: Tokenizer | None,
    write: Callable[[Tensor, int], None],
) -> dict[str, Any]:
    """Writes the tokens of both parts, one after the other; returns JSON values about them.

    The text is read twice, since its characters and their number must be known first.
    """
    counts, seen, sha256 = _survey(source)
    (_, end), _ = _ranges(source, counts, "final")
    known = "".join(c for c, first in seen.items() if first < end)
    tokenizer = tokenizer or Characters(known)
    ranges = _ranges(source, counts, part)
    found, position = [0, 0], 0
    for text in source.pieces():
        for i, (start, stop) in enumerate(ranges):
            if piece := text[max(start - position, 0) : max(stop - position, 0)]:
                tokens = _encode(piece, tokenizer)
                write(tokens, tokenizer.size)
                found[i] += len(tokens)
        position += len(text)
    return {
        "tokens": found,
        "characters": [stop - start for start, stop in ranges],
        "sha256": sha256,
        "size": tokenizer.size,
        "known": known,
    }


def _survey(source: TextSource) -> tuple[tuple[int, int], dict[str, int], str]:
    """Lengths of training and test part, first index of each character, and the text's SHA-256."""
    digest, first, position, training = hashlib.sha256(), dict[str, int](), 0, 0
    for pieces in (source.training, source.held_out):
        training = position
        for text in pieces() if pieces else ():
            digest.update(text.encode())
            for character in set(text) - first.keys():
                first[character] = position + text.index(character)
            position += len(text)
    return (training, position - training), first, digest.hexdigest()


def _ranges(source: TextSource, counts: tuple[int, int], part: Part) -> Ranges:
    """Ranges of characters of the training and evaluation text."""
    whole = sum(counts)
    end = counts[0] if counts[1] else round(whole * (1 - HELD_OUT))
    if source.thirds:
        middle = (end + whole) // 2
        evaluated = (middle, whole) if part == "final" else (end, middle)
        found = ((0, end), evaluated)
    elif part == "final":
        found = ((0, end), (end, whole))
    else:
        cut = round(end * (1 - VALIDATION))
        found = ((0, cut), (cut, end))
    if any(start >= stop for start, stop in found):
        raise ValueError(f"the text must be long enough to split, got {whole} characters")
    return found


def _encode(text: str, tokenizer: Tokenizer) -> Tensor:
    if isinstance(tokenizer, Characters):
        return tokenizer.encode_tensor(text)
    return torch.tensor(tokenizer.encode(text), dtype=torch.int64)


def _dtype(size: int) -> torch.dtype:
    """The smallest dtype for a number of tokens."""
    if size <= 2**8:
        return torch.uint8
    return torch.uint16 if size <= 2**16 else torch.int32
