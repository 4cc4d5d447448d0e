"""Texts by name, from files and from Hugging Face data sets on disk, read in pieces.

Nothing is downloaded. Only small texts are held in memory as a whole.
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

PYDOC_CHARACTERS = 400_000  # a prefix: later, longer editions are cut to the same size
GCIDE = Path("/usr/share/dictd/gcide.dict.dz")  # installed by Debian's package dict-gcide
GCIDE_CHARACTERS = 20_000_000  # a prefix, from A to "prosiliency"
WORDNET = Path("/usr/share/wordnet")  # installed by Debian's package wordnet-base
WORDNET_FILES = tuple(f"data.{kind}" for kind in ("adj", "adv", "noun", "verb"))
SOURCE_LINE = re.compile(rb"^\s*\[[^\[\]\n]*\]$", re.MULTILINE)  # such as [1913 Webster]
SYNSET = re.compile(r"\d{8} \d\d [nvasr] [^|]*\| (.*)")  # a line of WordNet, with its gloss
PIECE = 1 << 20  # characters read at a time
TEXT = "text"  # the column of a data set
FILES = ("*.txt", "news.en*", "text8")  # text files of a folder: any, and those of LM1B's archive
TEXT8_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyz ")
NAMED_FILES = ("text8", "lm1b", "openwebtext")
NAMES = ("pydoc", "gcide", "wordnet", *NAMED_FILES)


@dataclass(frozen=True)
class TextSource:
    """A text that can be read several times, in pieces."""

    training: Pieces
    """The whole text, or its training part."""
    held_out: Pieces | None = None
    """The data set's own test part."""
    files: tuple[Path, ...] = ()
    """The files it is read from; empty for texts in memory."""
    thirds: bool = False
    """Whether it has its own validation part before the held-out end, as text8."""

    @property
    def size(self) -> int:
        """Size of its files in bytes."""
        return sum(path.stat().st_size for path in self.files)

    def pieces(self) -> Iterator[str]:
        """The whole text, with the test part at the end."""
        return chain(self.training(), self.held_out() if self.held_out else ())


def open_text(
    data: str | Path = "pydoc", path: str | Path | None = None, fold: Fold | None = None
) -> TextSource:
    """Opens the text named `data`.

    Args:
        data: "pydoc", the first 400,000 characters of the documentation that Python ships
            (`pydoc_data.topics`, joined in the order of their names; it depends on the version of
            Python); "gcide", the first 20,000,000 characters of the Collaborative International
            Dictionary of English, installed by Debian's package dict-gcide and reduced by
            `letters_and_spaces`; "wordnet", the glosses of WordNet, one per line, from Debian's
            package wordnet-base; "text8", "lm1b" or "openwebtext", whose files are in `path`; or a
            path.
        path: a UTF-8 text file; a parquet or arrow file with a column `text`; or a folder of such
            files (*.parquet, *.arrow, *.txt, or LM1B's news.en*). Documents are joined by newlines.
            Files with test or heldout (or else validation) as a word of their path are the test
            part.
        fold: "text8" reduces the text to letters and single spaces, see `letters_and_spaces`.

    Raises:
        ValueError: there is no such text, or a file has another format.
        ImportError: pyarrow is not installed.
    """
    if data in NAMED_FILES and path is None:
        raise ValueError(f"{data} needs its files: give the file or folder by --data-path")
    if data not in NAMED_FILES and path is not None:
        raise ValueError(
            f"a path can be given for {', '.join(NAMED_FILES)}, got {path} with {data!r}; leave it "
            "out, or give the path as data"
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
                f"data must be {', '.join(NAMES)}, or a UTF-8 text file or a folder of them, and "
                f"{path} does not exist"
            )
        return TextSource(lambda: _pieces_of([path]), files=(path,))
    files = columnar.column_files(path) or sorted(
        {found for pattern in FILES for found in path.rglob(pattern) if found.is_file()}
    )
    if not files:
        raise ValueError(f"{path} must hold text files: *.parquet, *.arrow or *.txt, got none")
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
    """The pieces of a text file: whole lines, or whole words if lines are long."""
    rest = end = ""
    try:
        with path.open(encoding="utf-8-sig") as file:  # remove the BOM
            while read := file.read(PIECE):
                end = read[-1]
                text = rest + read
                # Lines longer than a piece must not accumulate.
                cut = 1 + text.rfind("\n", len(rest)) or 1 + text.rfind(" ") or len(text)
                rest = text[cut:]
                yield text[:cut]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be a UTF-8 text file: {error}") from error
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
                f"text8 must consist of a to z and spaces, got {min(other)!r} in "
                f"{source.files[0]}; use --data PATH for other text, with --fold text8 to reduce "
                "it"
            )
        yield text


def _pydoc() -> Iterator[str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    yield "\n".join(topics[name] for name in sorted(topics))[:PYDOC_CHARACTERS]


def _gcide() -> bytes:
    """The installed dictionary, without lines that only name an entry's source."""
    try:
        with gzip.open(GCIDE) as file:
            return SOURCE_LINE.sub(b"", file.read())
    except FileNotFoundError as error:
        raise ValueError(
            f"gcide must be in {GCIDE}, and is not there; install Debian's package dict-gcide, or "
            "give a text file"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{GCIDE} cannot be read: {error}") from error


def _wordnet() -> Iterator[str]:
    """The glosses of each file, one per line; lines of the licence begin with a space."""
    for path in (WORDNET / name for name in WORDNET_FILES):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError as error:
            raise ValueError(
                f"wordnet must be in {WORDNET}, and {path.name} is missing; install Debian's "
                "package wordnet-base, or give a text file"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        found = [SYNSET.fullmatch(line) for line in lines if not line.startswith(" ")]
        glosses = [match[1].strip() for match in found if match]
        if len(glosses) < len(found) or not glosses:
            raise ValueError(
                f"{path} must hold a synset and its gloss in each line after the licence, got "
                f"{len(glosses)} in {len(found)} lines; it may be cut off or damaged"
            )
        yield "\n".join(glosses) + "\n"
