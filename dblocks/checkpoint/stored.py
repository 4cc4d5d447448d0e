"""Tensors in files, which are compared and copied piece by piece without loading them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from dblocks.checkpoint.files import METADATA, opened, safetensors

PIECE = 2**22  # bytes that are in memory at a time


class Stored(NamedTuple):
    """A tensor in a file of safetensors.

    Such a file is the length of its header (8 bytes), the header in JSON, and the bytes of all
    tensors one after the other.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """The number of its bytes."""
        return self.end - self.begin

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, in pieces."""
        with self.path.open("rb") as file:
            file.seek(self.begin)
            for at in range(self.begin, self.end, PIECE):
                size = min(PIECE, self.end - at)
                piece = file.read(size)
                if len(piece) < size:
                    raise OSError(f"{self.path} must not be changed while it is read")
                yield piece

    def equal(self, other: Stored) -> bool:
        """Whether both are the same bits of the same shape and dtype."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(a == b for a, b in zip(self.pieces(), other.pieces(), strict=True))


def stored_in(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name.

    Raises:
        ImportError: safetensors is not installed.
    """
    with opened(path) as file:  # which checks the header
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    found = {}
    for name, dtype in dtypes.items():
        first, last = (8 + length + at for at in header[name]["data_offsets"])
        found[name] = Stored(path, dtype, tuple(header[name]["shape"]), first, last)
    return found


def copy_stored(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write the file that `save_safetensors` would write of these tensors, bit for bit.

    Raises:
        ImportError: safetensors is not installed.
    """
    # The order of the tensors, and the names of their dtypes, are those of the package.
    empty = {name: torch.empty(0, dtype=stored.dtype) for name, stored in tensors.items()}
    header = json.loads(safetensors().save(empty, metadata=METADATA)[8:])
    order = [name for name in header if name in tensors]
    at = 0
    for name in order:
        stored = tensors[name]
        header[name] |= {"shape": stored.shape, "data_offsets": [at, at + stored.nbytes]}
        at += stored.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                file.writelines(tensors[name].pieces())
    except OSError as error:
        raise OSError(f"{path.name}: {error}") from error
