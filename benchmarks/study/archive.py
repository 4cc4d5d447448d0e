"""The records of a study: one compressed file, and files of their own until they are in it.

A run writes a file of its own into the study's folder, so that several processes may write at once;
`pack` moves the files into the compressed one. Records that come from elsewhere are copied into the
folder in the same way. A file counts before a packed record of its name.
"""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dblocks.checkpoint import replacing
from dblocks.recipes.records import FORMAT, read_record, write_record

Record = dict[str, Any]


class Archive:
    """The records of a study, by name.

    Args:
        folder: of the files that are not packed; the packed ones are in FOLDER.jsonl.gz beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder.with_name(f"{folder.name}.jsonl.gz")

    def load(self) -> dict[str, Record]:
        """All records.

        Raises:
            ValueError: a file is no record, or the archive cannot be read.
        """
        # The files first: one that is packed meanwhile is in the archive before it is gone.
        single = self._read_files()
        return self._read_packed() | single

    def pack(self) -> None:
        """Moves the files into the archive, whose bytes depend on nothing but the records."""
        with self._lock():
            single = self._read_files()
            packed = self._read_packed()
            if single or not self.file.exists():
                self._write(packed | single)
            for name, record in single.items():
                path = self.folder / f"{name}.json"
                # A run may have written it again.
                if path.exists() and read_record(path) == record:
                    path.unlink()

    def unpack(self) -> None:
        """Writes the packed records as files and removes the archive."""
        with self._lock():
            for name, record in self.load().items():
                write_record(self.folder / f"{name}.json", record)
            self.file.unlink(missing_ok=True)

    def _read_files(self) -> dict[str, Record]:
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            try:
                found[path.stem] = read_record(path)
            except FileNotFoundError:  # it was packed
                continue
        return found

    def _read_packed(self) -> dict[str, Record]:
        try:
            packed = self.file.read_bytes()
            if not packed:
                raise ValueError("it is empty")
            lines = [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]
            found = {line["name"]: line["record"] for line in lines}
            if len(found) < len(lines):
                raise ValueError("a name stands in it twice")
            for name, record in found.items():
                if Path(name).name != name or record["format"] != FORMAT:
                    raise ValueError(f"{name!r} is no record of format {FORMAT}")
            return found
        except FileNotFoundError:
            return {}
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.file} is not an archive of records: {error}") from error

    def _write(self, records: Mapping[str, Record]) -> None:
        lines = [
            json.dumps({"name": name, "record": records[name]}, separators=(",", ":"))
            for name in sorted(records)
        ]
        content = io.BytesIO()
        with gzip.GzipFile(filename="", mode="wb", fileobj=content, mtime=0) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
        with replacing(self.file) as part:
            part.write_bytes(content.getvalue())

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One process at a time; what holds the lock is the folder around, so nothing is left."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.file.parent, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
