"""The texts of the fine-tuning benchmark: prose for pretraining, source code for fine-tuning."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dblocks.recipes.data.text import Text, load_corpus
from dblocks.recipes.data.tokenizers import Characters

# Modules of every Python from 3.10 on. Whole modules are held out, so that the evaluated text is
# not close to the training text.
TRAINING = (
    "argparse", "ast", "bdb", "calendar", "cmd", "codeop", "configparser", "contextlib", "csv",
    "dataclasses", "difflib", "dis", "enum", "filecmp", "fractions", "functools", "getpass",
    "gettext", "glob", "gzip", "heapq", "inspect", "ipaddress", "mailbox", "numbers", "optparse",
)  # fmt: skip
VALIDATION = ("pdb", "pickletools", "platform", "plistlib")
HELD_OUT = ("shelve", "shutil", "socketserver", "statistics", "string", "tarfile", "textwrap")
CHARACTERS = 12_000  # characters from the start of each module


class Code(NamedTuple):
    """Source code as tokens, in three parts."""

    training: Text
    validation: Text
    held_out: Text
    sha256: str
    """SHA-256 of the three parts joined, in UTF-8."""
    unknown: int
    """Number of characters that do not occur in the prose and become token 0."""


class Domains(NamedTuple):
    """The text for pretraining and the code for fine-tuning."""

    old: Text
    old_held_out: Text
    old_sha256: str
    new: Code
    tokenizer: Characters


def domains() -> Domains:
    """The documentation that ships with Python, and the source of its standard library."""
    corpus = load_corpus("pydoc")
    tokenizer = corpus.tokenizer
    assert isinstance(tokenizer, Characters)
    parts = [source_of(names) for names in (TRAINING, VALIDATION, HELD_OUT)]
    training, validation, held_out = (_text(tokenizer.encode(part)) for part in parts)
    unknown = sum(int((t.tokens == 0).sum()) for t in (training, validation, held_out))
    sha256 = hashlib.sha256("".join(parts).encode()).hexdigest()
    new = Code(training, validation, held_out, sha256, unknown)
    return Domains(corpus.training, corpus.evaluated, corpus.sha256, new, tokenizer)


def source_of(names: Sequence[str]) -> str:
    """The first `CHARACTERS` of each module's source, in the order of their names."""
    return "\n".join(_sources(sorted(names)))


def _sources(names: Iterable[str]) -> Iterable[str]:
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            raise RuntimeError(
                f"the source of {name} must ship with Python, got {spec}; use another Python"
            )
        yield Path(spec.origin).read_text(encoding="utf-8")[:CHARACTERS]


def _text(tokens: list[int]) -> Text:
    return Text(torch.tensor(tokens, dtype=torch.int64), len(tokens))
