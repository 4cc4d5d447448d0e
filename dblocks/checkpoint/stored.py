"""Tensors in files, which can be compared and copied in pieces without loading them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from dblocks.checkpoint.files import safetensors
from dblocks.checkpoint.tensors import (
    DIGESTS,
    METADATA,
    NO_DIGEST,
    SPACE,
    begun_digest,
    digests_text,
    header_text,
    load_safetensors,
    safe_open,
)

PIECE = 2**22  # bytes in memory at a time


class Source(NamedTuple):
    """A file that stays open from its check to its copy.

    If another file takes its name meanwhile, the checked file is still the one that is copied.
    """

    path: Path
    file: BinaryIO
    state: tuple[int, int]  # state at opening

    def check_unchanged(self) -> None:
        """Checks that the file was not written to since it was opened.

        Raises:
            OSError: it was written to.
        """
        if _state(self.file) != self.state:
            raise OSError(_changed(self.path))

    def check_named(self) -> None:
        """Checks that the path still refers to this file.

        safetensors opens files by name only. A name never returns to a file that is still open, so
        if this succeeds after safetensors opened the path, it opened this file.

        Raises:
            OSError: the path refers to another file.
        """
        if not os.path.samestat(self.path.stat(), os.fstat(self.file.fileno())):
            raise OSError(_changed(self.path))

    def read(self) -> bytes:
        """All its bytes."""
        self.file.seek(0)
        return self.file.read()

    def load(self) -> dict[str, Tensor]:
        """All tensors of the file.

        Raises:
            OSError: the file was replaced or written to since it was opened.
        """
        found = load_safetensors(self.path)
        self.check_named()
        self.check_unchanged()
        return found


@contextmanager
def reading(path: Path) -> Iterator[Source]:
    """A file of tensors, which can be read inside the `with` block."""
    with path.open("rb") as file:
        yield Source(path, file, _state(file))


def _state(file: BinaryIO) -> tuple[int, int]:
    """What a write changes; ctime is not used, as it also changes when the file is unlinked."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _changed(path: Path) -> str:
    return f"{path} was changed while it was read"


class Stored(NamedTuple):
    """A tensor in a file of safetensors.

    Such a file consists of the length of its header (8 bytes), the header in JSON, and the bytes of
    all tensors.
    """

    source: Source
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin

    def pieces(self) -> Iterator[bytes]:
        """The bytes of the tensor, in pieces."""
        path, file, _ = self.source
        for at in range(self.begin, self.end, PIECE):
            size = min(PIECE, self.end - at)
            file.seek(at)  # for each piece, as another tensor of the file may be read in between
            piece = file.read(size)
            if len(piece) < size:
                raise OSError(_changed(path))
            yield piece

    def equal(self, other: Stored) -> bool:
        """Whether shape, dtype and all bits are equal."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(a == b for a, b in zip(self.pieces(), other.pieces(), strict=True))


def stored_in(source: Source) -> dict[str, Stored]:
    """The tensors of a file by name.

    Raises:
        OSError: the file was replaced before its header was checked.
        ImportError: safetensors is not installed.
    """
    path, file, _ = source
    with safe_open(path) as checked:  # checks the header
        kinds = {name: _kind(checked.get_tensor(name)) for name in checked.keys()}  # noqa: SIM118
    source.check_named()
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    found = {}
    for name, kind in kinds.items():
        first, last = (8 + length + at for at in header[name]["data_offsets"])
        found[name] = Stored(source, *kind, first, last)
    return found


def copy_stored(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Writes the same file, bit for bit, as `save_safetensors` with these tensors.

    Raises:
        OSError: the file cannot be written, or a file that holds the tensors was changed.
        ImportError: safetensors is not installed.
    """
    # The order of the tensors and the names of dtypes are those of safetensors.
    empty = {name: torch.empty(0, dtype=stored.dtype) for name, stored in tensors.items()}
    header = json.loads(safetensors().save(empty, metadata=METADATA)[8:])
    order = [name for name in header if name in tensors]
    digests, at = dict.fromkeys(order, NO_DIGEST), 0
    for name in order:
        stored = tensors[name]
        shape = _header_shape(stored.dtype, stored.shape)
        header[name] |= {"shape": shape, "data_offsets": [at, at + stored.nbytes]}
        at += stored.nbytes
    try:
        with path.open("wb") as file:
            header[SPACE] = METADATA | {DIGESTS: digests_text(digests)}
            begin = header_text(header)
            file.write(begin)
            for name in order:
                digest = begun_digest(tensors[name].dtype, tensors[name].shape)
                for piece in tensors[name].pieces():
                    digest.update(piece)
                    file.write(piece)
                digests[name] = digest.hexdigest()
            header[SPACE] = METADATA | {DIGESTS: digests_text(digests)}
            file.seek(0)
            file.write(header_text(header, len(begin) - 8))
        for source in {stored.source for stored in tensors.values()}:
            source.check_unchanged()
    except OSError as error:
        raise OSError(f"{path.name}: {error}") from error


def _kind(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...]]:
    return tensor.dtype, tuple(tensor.shape)


def _header_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor in a file; dtypes with two values per element count both."""
    return (*shape[:-1], 2 * shape[-1]) if dtype is torch.float4_e2m1fn_x2 else shape
