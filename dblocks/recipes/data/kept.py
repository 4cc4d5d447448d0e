"""A cache of large texts and images: arrays in memory-mapped files.

The files are in the folder of the environment variable DBLOCKS_CACHE, by default ~/.cache/dblocks,
and may be deleted at any time.
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
    """A key for data made from files with these settings.

    Files count as the same while path, size and time of change are: large ones are not read again.
    """
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json_text([stats, settings]).encode()).hexdigest()


def kept(key: str, make: Make) -> tuple[Path, dict[str, Any]]:
    """The cached file of a key and its JSON values; created if it does not exist.

    A file is renamed to its place when it is complete, so that a killed run leaves no partial file
    that another would use.

    Args:
        key: of `key_of`.
        make: writes the file's content, and returns JSON values about it.
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
    """A file's numbers [n], memory-mapped; writing to them does not change the file."""
    size = path.stat().st_size // dtype.itemsize
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file that becomes `path` at the end; removed after an error.

    Of processes that write the same one at the same time each writes its own, and the last stays.

    Raises:
        OSError: it cannot be written, such as on a full disk.
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
                f"what is made of the data cannot be kept in {path.parent}: {error.strerror}; make "
                f"room, or name another folder by the environment variable {CACHE}"
            ) from error
        raise
