"""Hugging Face data sets on disk: folders of parquet or arrow files, as downloaded or saved.

pyarrow, of the extra `dblocks[parquet]`, is imported when one is read.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dblocks.config import read_json

SUFFIXES = (".parquet", ".arrow")
CACHED = "cache-"
ROWS = 1024  # rows of a parquet file read at a time
FILE_FORMAT = b"ARROW1"  # an arrow file that begins differently is a stream
END = bytes(4)  # end of a stream
# Words in file paths that mark held-out parts; the first part that exists is used.
HELD_OUT = (
    ("test", "heldout"),
    ("validation", "valid", "val", "dev"),
)
Parts = tuple[list[Path], list[list[Path]]]


def in_parts(files: Sequence[Path], folder: Path) -> Parts:
    """The training files, and the files of each held-out part, in order of preference.

    A file belongs to a part if a word of its path in the folder is the name of the part, such as
    `data/test-00000-of-00001.parquet` or `lm1b-test.arrow`.
    """
    training: list[Path] = []
    others: list[list[Path]] = [[] for _ in HELD_OUT]
    for path in files:
        words = set(re.split(r"[^a-z]+", str(path.relative_to(folder)).lower()))
        place = next((i for i, names in enumerate(HELD_OUT) if words.intersection(names)), None)
        (training if place is None else others[place]).append(path)
    if not training:
        raise ValueError(f"{folder} must hold training files, got {_names(files)} only")
    return training, [part for part in others if part]


def column_files(folder: Path) -> list[Path]:
    """The parquet files of a folder and its sub-folders, or else the arrow files, sorted.

    Hidden files and the `cache-*.arrow` files of the package datasets are ignored.
    """

    def is_data(path: Path) -> bool:
        inside = path.relative_to(folder).parts
        hidden = any(name.startswith(".") for name in inside)
        return not hidden and not path.name.startswith(CACHED) and path.is_file()

    found = (sorted(filter(is_data, folder.rglob(f"*{suffix}"))) for suffix in SUFFIXES)
    return next((files for files in found if files), [])


def columns_of(path: Path) -> dict[str, Any]:
    """The types of the columns of a file, by name.

    Raises:
        ValueError: the file is not a parquet or arrow file, or is damaged.
        ImportError: pyarrow is not installed.
    """
    with _Errors(path), _Table(path) as table:
        return {field.name: field.type for field in table.schema}


def read_column(files: Sequence[Path], name: str) -> Iterator[Any]:
    """The values of a column, one after another, as Python objects.

    Raises:
        ValueError: a file lacks the column, is damaged, or has another number of rows than the data
            set's dataset_info.json says.
        ImportError: pyarrow is not installed.
    """
    for path in files:
        if name not in (found := columns_of(path)):
            raise ValueError(f"{path} must have the column {name!r}, got {sorted(found)}")
        with _Errors(path), _Table(path) as table:
            for batch in table.batches(name):
                yield from batch.column(0).to_pylist()


def check_rows(files: Sequence[Path], rows: int) -> None:
    """Raises ValueError unless the number of rows is that of dataset_info.json, if it exists.

    `save_to_disk` writes this file, and one folder of arrow files for each split.
    """
    note = files[0].parent / "dataset_info.json"
    state = files[0].parent / "state.json"
    if not (note.is_file() and state.is_file()):
        return
    split, about = read_json(state).get("_split"), read_json(note)
    known = (about.get("splits") or {}).get(split or "train") or {}
    if (expected := known.get("num_examples", rows)) != rows:
        raise ValueError(
            f"{files[0].parent} must hold {expected} rows, as {note.name} says, got {rows}; "
            "a file may be cut off or missing"
        )


class _Table:
    """A parquet or arrow file, which is read in batches."""

    def __init__(self, path: Path) -> None:
        self.arrow = import_arrow()
        self.parquet = path.suffix == ".parquet"
        if self.parquet:
            self.file: Any = importlib.import_module("pyarrow.parquet").ParquetFile(path)
            self.schema = self.file.schema_arrow
            return
        ipc = importlib.import_module("pyarrow.ipc")
        self.source = self.arrow.memory_map(str(path))
        with path.open("rb") as file:
            whole = file.read(len(FILE_FORMAT)) == FILE_FORMAT
            file.seek(max(0, path.stat().st_size - len(END)))
            # A stream that is cut off between two batches would be read as a shorter one.
            if not whole and file.read() != END:
                raise ValueError("it must end with the end-of-stream marker; it may be cut off")
        self.file = ipc.open_file(self.source) if whole else ipc.open_stream(self.source)
        self.schema, self.whole = self.file.schema, whole

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *_: object) -> None:
        (self.file if self.parquet else self.source).close()

    def batches(self, name: str) -> Iterator[Any]:
        """The rows of one column, in batches."""
        if self.parquet:
            yield from self.file.iter_batches(batch_size=ROWS, columns=[name])
            return
        numbers = range(self.file.num_record_batches) if self.whole else None
        found = self.file if numbers is None else map(self.file.get_batch, numbers)
        for batch in found:
            yield batch.select([name])


class _Errors:
    """Adds the file's name to errors of pyarrow."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        # For damaged files pyarrow raises ValueError or OSError.
        if isinstance(error, (ValueError, OSError, EOFError)):
            raise ValueError(
                f"{self.path} cannot be read as a {self.path.suffix[1:]} file: {error}"
            ) from error


def import_arrow() -> Any:
    """Imports pyarrow; an ImportError names the extra."""
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ImportError(
            "parquet and arrow files need the package pyarrow, which is not installed; "
            "`pip install 'dblocks[parquet]'`"
        ) from error


def _names(files: Sequence[Path]) -> str:
    return ", ".join(path.name for path in files[:3])
