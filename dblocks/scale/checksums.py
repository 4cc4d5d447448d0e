"""The list of checksums of a checkpoint's files, in the format of sha256sum."""

from __future__ import annotations

import hashlib
import re
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from dblocks.checkpoint.stored import Source, reading

STATE_FILE, CHECKSUMS_FILE = "state.json", "checksums.txt"
LINE = re.compile(r"[0-9a-f]{64}  ([a-z0-9_.]+)")
CHUNK = 2**22  # bytes hashed at a time


def write_checksums(folder: Path) -> None:
    """Writes the list of the files in a folder."""
    names = sorted(path.name for path in folder.iterdir())
    lines = [f"{sha256_of(folder / name)}  {name}" for name in names]
    text = "\n".join([_head(len(names)), *lines, ""])
    (folder / CHECKSUMS_FILE).write_text(text, encoding="utf-8")


def valid_files(folder: Path, files: ExitStack) -> dict[str, Source]:
    """The files of a checkpoint by name, open until `files` is closed.

    Reads return the bytes that were checked, even if the checkpoint is replaced meanwhile.

    Raises:
        ValueError: a file is missing or was changed; the message names it.
    """
    try:
        written = _names_in((folder / CHECKSUMS_FILE).read_bytes())
        if written is None:
            raise ValueError(f"{CHECKSUMS_FILE} is not what was written")
        if missing := [name for name in written if not (folder / name).is_file()]:
            raise ValueError(f"{', '.join(missing)} is missing")
        found = {name: files.enter_context(reading(folder / name)) for name in written}
        wrong = [name for name, file in found.items() if sha256_from(file.file) != written[name]]
    except FileNotFoundError as error:
        raise ValueError(f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        raise ValueError(f"it cannot be read: {error}") from error
    if wrong:
        raise ValueError(f"{', '.join(wrong)} is not what was written, by its checksum")
    return found


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return sha256_from(file)


def sha256_from(file: BinaryIO) -> str:
    """The SHA-256 of the rest of an open file, in hexadecimal digits."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _names_in(written: bytes) -> dict[str, str] | None:
    """The checksums by file; None if the list itself is damaged."""
    try:
        head, *lines = written.decode("ascii").split("\n")
    except UnicodeDecodeError:
        return None
    if not lines or lines.pop() or head != _head(len(lines)):
        return None
    matches = [LINE.fullmatch(line) for line in lines]
    names = [match[1] for match in matches if match]
    known = STATE_FILE in names and len(names) == len(lines) and names == sorted(set(names))
    return {match[1]: match[0][:64] for match in matches if match} if known else None


def _head(count: int) -> str:
    return f"# sha256 of {count} files"
