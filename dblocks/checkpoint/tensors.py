"""Files of tensors: safetensors with a digest of each tensor, which is checked when it is read.

The digests are in the file's metadata under "dblocks.sha256", as JSON from names to hexadecimal
digits. A reader returns the values that it checked, even if the file is replaced meanwhile. Files
without digests, of earlier versions or of other libraries, are read without a check.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dblocks.checkpoint.files import LONGEST_REASON, safetensors, write_errors

METADATA = {"format": "pt"}  # in every file, as transformers expects it
DIGESTS = "dblocks.sha256"
SPACE = "__metadata__"  # in the header of a file
NO_DIGEST = "0" * 64


def save_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors on any device to a file, with their digests.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the file cannot be written; the message names it.
    """
    plain = {name: t.detach().resolve_conj().resolve_neg() for name, t in tensors.items()}
    written = {name: t.contiguous() for name, t in plain.items()}
    save_file = safetensors().save_file
    metadata = METADATA | {DIGESTS: digests_text({n: digest_of(t) for n, t in written.items()})}
    try:
        save_file(written, path, metadata=metadata)
        _sort_metadata(path, metadata)
    except write_errors() as error:
        raise OSError(f"{path.name}: {error}") from error  # its message does not name the file


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: a tensor is not what was saved.
    """
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextmanager
def opened(path: Path, *, foreign: bool = False) -> Iterator[Tensors]:
    """A file of tensors, which can be read inside the `with` block.

    Args:
        path: the file.
        foreign: whether another library may have written the file, with other metadata.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the metadata is not what was saved.
    """
    with safe_open(path) as file:
        yield Tensors(file, foreign)


def safe_open(path: Path) -> Any:
    """A file opened by safetensors, which checks only its header.

    Raises:
        ImportError: safetensors is not installed.
    """
    safetensors()
    return importlib.import_module("safetensors").safe_open(path, framework="pt")


class Tensors:
    """The tensors of an open file, which are checked by their digests.

    Args:
        file: the result of `safe_open`.
        foreign: see `opened`.
    """

    def __init__(self, file: Any, foreign: bool = False) -> None:
        self._file = file
        metadata = file.metadata() or {}
        if not foreign and (unknown := sorted(set(metadata) - {*METADATA, DIGESTS})):
            raise ValueError(f"its metadata must be what was saved, got {unknown[0]!r}")
        self._digests = read_digests(metadata[DIGESTS]) if DIGESTS in metadata else None
        if self._digests is not None and sorted(self._digests) != sorted(self.keys()):
            raise ValueError("it must hold the saved tensors, got other names")

    def keys(self) -> Sequence[str]:
        """The names."""
        return self._file.keys()

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor, without reading the tensor."""
        found = self._file.get_slice(name)
        shape = found.get_shape()
        # Two numbers of a torch.float4_e2m1fn_x2 are one element, but not in the file.
        return [*shape[:-1], shape[-1] // 2] if found.get_dtype() == "F4" else shape

    def get_tensor(self, name: str) -> Tensor:
        """Reads a tensor.

        Raises:
            ValueError: the tensor is not what was saved.
        """
        tensor = self._file.get_tensor(name)
        if self._digests is not None and digest_of(tensor) != self._digests[name]:
            raise ValueError(f"{name} is not what was saved, by its sha256")
        return tensor


def digest_of(tensor: Tensor) -> str:
    """The SHA-256 of a contiguous tensor, with its dtype and shape, in hexadecimal digits."""
    digest = begun_digest(tensor.dtype, tensor.shape)
    if tensor.numel():
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def begun_digest(dtype: torch.dtype, shape: Sequence[int]) -> Any:
    """The digest of a tensor's dtype and shape, to be updated with its bytes."""
    return hashlib.sha256(f"{dtype} {list(shape)}\n".encode())


def digests_text(digests: Mapping[str, str]) -> str:
    """Digests by name, as text for the metadata."""
    return json.dumps(dict(sorted(digests.items())), separators=(",", ":"))


def read_digests(text: str) -> dict[str, str]:
    """The inverse of `digests_text`.

    Raises:
        ValueError: the text has another form.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError(
            f"its metadata must have under {DIGESTS!r} a JSON object from names to hexadecimal "
            f"digits, got {textwrap.shorten(text, LONGEST_REASON // 5, placeholder=' ...')!r}"
        )
    return found


def header_text(header: Mapping[str, Any], length: int | None = None) -> bytes:
    """The header at the start of a file: its length, and its text padded with spaces.

    Args:
        header: contents of the header.
        length: length of the text; None for the next multiple of eight.

    Raises:
        OSError: the text is longer than `length`.
    """
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * ((-len(text) % 8) if length is None else length - len(text))
    if length is not None and len(text) != length:
        raise OSError(f"a header must have {length} bytes, got {len(text)}")
    return len(text).to_bytes(8, "little") + text


def _sort_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Rewrites the header of a file, to which safetensors writes metadata in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        file.seek(0)
        file.write(header_text({SPACE: dict(metadata)} | header | {SPACE: dict(metadata)}, length))
