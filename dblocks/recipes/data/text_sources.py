"""Texts by name, from files and from Hugging Face data sets on disk, as pieces of some size.

Nothing is downloaded. A text is never held as a whole unless it is small.
"""

from __future__ import annotations

import gzip
import importlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from dblocks.recipes.data import columnar
from dblocks.recipes.data.folding import folded, letters_and_spaces

Fold = Literal["text8"]
Pieces = Callable[[], Iterator[str]]

PYDOC_CHARACTERS = 400_000  # a prefix, so that a longer later edition is cut to the same size
GCIDE = Path("/usr/share/dictd/gcide.dict.dz")  # where Debian's package dict-gcide puts it
GCIDE_CHARACTERS = 20_000_000  # a prefix too, from A to "prosiliency"
WORDNET = Path("/usr/share/wordnet")  # where Debian's package wordnet-base puts it
WORDNET_FILES = tuple(f"data.{kind}" for kind in ("adj", "adv", "noun", "verb"))
SOURCE_LINE = re.compile(rb"^\s*\[[^\[\]\n]*\]$", re.MULTILINE)  # such as [1913 Webster]
SYNSET = re.compile(r"\d{8} \d\d [nvasr] [^|]*\| (.*)")  # a line of WordNet, with its gloss
PIECE = 1 << 20  # characters that are read at a time
TEXT = "text"  # the column of a data set
FILES = ("*.txt", "news.en*", "text8")  # of a folder: any, and those of LM1B's archive
TEXT8_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz ")
NAMED_FILES = ("text8", "lm1b", "openwebtext")
NAMES = ("pydoc", "gcide", "wordnet", *NAMED_FILES)


@dataclass(frozen=True)
class TextSource:
    """A text that can be read again and again, piece by piece."""

    training: Pieces
    """All of it, or the part to train on."""
    held_out: Pieces | None = None
    """The data's own test part."""
    files: tuple[Path, ...] = ()
    """What it is read from; none of what is held in memory anyway."""
    thirds: bool = False
    """Whether it has a validation part of its own before the held-out tail, as text8."""

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.files)

    def pieces(self) -> Iterator[str]:
        """The whole text, with the test part at the end."""
        return chain(self.training(), self.held_out() if self.held_out else ())


def open_text(
    data: str | Path = "pydoc", path: str | Path | None = None, fold: Fold | None = None
) -> TextSource:
    """The text called `data`.

    Args:
        data: "pydoc", the first 400,000 characters of the documentation that Python ships
            (`pydoc_data.topics`, joined in the order of their names; another edition with another
            version of Python); "gcide", the first 20,000,000 characters of the Collaborative
            International Dictionary of English, which Debian's package dict-gcide installs, made
            letters and spaces by `letters_and_spaces`; "wordnet", the glosses of WordNet, one a
            line, of Debian's package wordnet-base; "text8", "lm1b" or "openwebtext", which are at
            `path`; or a path itself.
        path: a text file in UTF-8; a parquet or arrow file with a column `text`; or a folder of
            such files (*.parquet, *.arrow, *.txt, or LM1B's news.en*). Documents are joined by a
            newline. Files of which a word of the path is test or heldout (or else validation) are
            the test part.
        fold: "text8" makes letters and single spaces of it, see `letters_and_spaces`.

    Raises:
        ValueError: there is no such text, or a file has another format.
        ImportError: pyarrow is not installed.
    """
    if data in NAMED_FILES and path is None:
        raise ValueError(f"{data} needs its files: give the file or folder by --data-path")
    if data not in NAMED_FILES and path is not None:
        raise ValueError(
            f"a path is for {', '.join(NAMED_FILES)}, got {path} with {data!r}; leave it out, or "
            "give the path as data"
        )
    if fold not in (None, "text8"):
        raise ValueError(f"fold must be 'text8' or left out, got {fold!r}")
    source = _named(str(data), path)
    if fold is None:
        return source
    held_out = source.held_out
    return replace(
        source,
        training=lambda: folded(source.training()),
        held_out=(lambda: folded(held_out())) if held_out else None,
    )


def _named(data: str, path: str | Path | None) -> TextSource:
    if data == "pydoc":
        return TextSource(_pydoc)
    if data == "gcide":
        return TextSource(lambda: iter((letters_and_spaces(_gcide())[:GCIDE_CHARACTERS],)))
    if data == "wordnet":
        return TextSource(_wordnet)
    source = _of_path(Path(data if path is None else path))
    if data != "text8":
        return source
    return replace(source, training=lambda: _checked_text8(source), thirds=source.held_out is None)


def _of_path(path: Path) -> TextSource:
    if not path.is_dir():
        if not path.is_file():
            raise ValueError(
                f"data must be {', '.join(NAMES)}, or a text file in UTF-8 or a folder of them, "
                f"and there is no {path}"
            )
        return TextSource(lambda: _pieces_of([path]), files=(path,))
    files = columnar.column_files(path) or sorted(
        {found for pattern in FILES for found in path.rglob(pattern) if found.is_file()}
    )
    if not files:
        raise ValueError(
            f"{path} must hold text: files called *.parquet, *.arrow or *.txt, got none"
        )
    training, others = columnar.in_parts(files, path)
    held_out = others[0] if others else []
    return TextSource(
        lambda: _pieces_of(training),
        (lambda: _pieces_of(held_out)) if held_out else None,
        (*training, *held_out),
    )


def _pieces_of(files: Sequence[Path]) -> Iterator[str]:
    columns = [path for path in files if path.suffix in columnar.SUFFIXES]
    return _of_column(columns) if columns else _of_files(files)


def _of_files(files: Sequence[Path]) -> Iterator[str]:
    text = "\n"
    for path in files:
        if not text.endswith("\n"):
            yield "\n"
        for text in _of_file(path):
            yield text


def _of_file(path: Path) -> Iterator[str]:
    """The pieces of a text file, each of whole lines, or of whole words where lines are long."""
    rest = end = ""
    try:
        with path.open(encoding="utf-8-sig") as file:  # a BOM is no text
            while read := file.read(PIECE):
                end = read[-1]
                text = rest + read
                # Lines that are longer than a piece must not pile up.
                cut = 1 + text.rfind("\n", len(rest)) or 1 + text.rfind(" ") or len(text)
                rest = text[cut:]
                yield text[:cut]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a text file in UTF-8: {error}") from error
    if not end:
        raise ValueError(f"data must hold some text, got the empty file {path}")
    if rest:
        yield rest


def _of_column(files: Sequence[Path]) -> Iterator[str]:
    """Documents of a column, joined by newlines."""
    documents: list[str] = []
    length = rows = 0
    for document in columnar.read_column(files, TEXT):
        if not isinstance(document, str):
            raise ValueError(
                f"the column {TEXT!r} of {files[0].parent} must be texts, got "
                f"{type(document).__name__} in row {rows}"
            )
        rows += 1
        documents.append(document)
        length += len(document) + 1
        if length >= PIECE:
            yield "\n".join(documents) + "\n"
            documents, length = [], 0
    columnar.check_rows(files, rows)
    if not rows:
        raise ValueError(f"{files[0]} must hold rows, got none")
    if documents:
        yield "\n".join(documents) + "\n"


def _checked_text8(source: TextSource) -> Iterator[str]:
    for text in source.training():
        if other := set(text) - TEXT8_LETTERS:
            raise ValueError(
                f"text8 must be of a to z and spaces, got {min(other)!r} in {source.files[0]}; "
                "give any other text by --data PATH, with --fold text8 to make it so"
            )
        yield text


def _pydoc() -> Iterator[str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    yield "\n".join(topics[name] for name in sorted(topics))[:PYDOC_CHARACTERS]


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


def _wordnet() -> Iterator[str]:
    """The glosses of each file, one a line; the lines of the licence begin with a space."""
    for path in (WORDNET / name for name in WORDNET_FILES):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError as error:
            raise ValueError(
                f"wordnet must be in {WORDNET}, and {path.name} is not; install Debian's package "
                "wordnet-base, or give a text file instead of the name"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        found = [SYNSET.fullmatch(line) for line in lines if not line.startswith(" ")]
        glosses = [match[1].strip() for match in found if match]
        if len(glosses) < len(found) or not glosses:
            raise ValueError(
                f"{path} must hold a synset with its gloss in each line after the licence, got "
                f"{len(glosses)} in {len(found)} lines; it may be cut off or damaged"
            )
        yield "\n".join(glosses) + "\n"
