"""A cache of prepared texts and images, in memory-mapped files.

The files are in the folder given by the environment variable DBLOCKS_CACHE, by default
~/.cache/dblocks, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dblocks.config import json_text, read_json

CACHE = "DBLOCKS_CACHE"
Make = Callable[[IO[bytes]], dict[str, Any]]


def cache_folder() -> Path:
    """The folder of the cache."""
    named = os.environ.get(CACHE)
    return Path(named) if named else Path.home() / ".cache" / "dblocks"


def key_of(files: Sequence[Path], **settings: Any) -> str:
    """A key for data prepared from files with these settings.

    It depends on path, size and modification time of the files, so large files are not read again.
    """
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json_text([stats, settings]).encode()).hexdigest()


def cached(key: str, make: Make) -> tuple[Path, dict[str, Any]]:
    """The cached file of a key and its JSON values; created if it does not exist.

    A file is renamed to its place when it is complete, so a killed run leaves no partial file.

    Args:
        key: the result of `key_of`.
        make: writes the contents of the file and returns JSON values about it.
    """
    folder = cache_folder()
    path, note = folder / f"{key}.bin", folder / f"{key}.json"
    if note.is_file() and path.is_file():
        about = read_json(note)
        if about["bytes"] == path.stat().st_size:
            return path, about
    with replacing(path) as file:
        about = make(file)
        file.flush()
        about["bytes"] = os.fstat(file.fileno()).st_size
    with replacing(note) as file:
        file.write(json_text(about).encode())
    return path, about


def mapped(path: Path, dtype: torch.dtype) -> Tensor:
    """A file as a memory-mapped tensor [n]; writing to it does not change the file."""
    size = path.stat().st_size // dtype.itemsize
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file that is renamed to `path` at the end; removed after an error.

    Several processes may write the same path at once: each has its own temporary file, and the last
    rename counts.

    Raises:
        OSError: the file cannot be written, for example on a full disk.
    """
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem[:16], suffix=".part")
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(name, path)
    except BaseException as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, name):
            raise OSError(
                f"prepared data cannot be written to {path.parent}: {error.strerror}; free some "
                f"space, or set the environment variable {CACHE} to another folder"
            ) from error
        raise
