"""Reads pickles of byte arrays, such as CIFAR's Python version, without executing their content.

A pickle names functions and classes to call. Only the names needed for arrays of bytes are
accepted, and these are replaced by inert classes of this file.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**30  # bytes of a file; CIFAR-100 has 155 million
BYTES = ("u1", "|u1", "uint8")


class _Inert:
    """Stores the arguments of a call or an attribute in a pickle, and does nothing else."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Inert):
    """Replaces an array; `bytes_of` converts it."""


class _Dtype(_Inert):
    """Replaces a numpy dtype."""


class _Class(_Inert):
    """Replaces the class ndarray, which pickles only pass as an argument."""


# The names with which numpy 1 and 2 write arrays.
ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Class,
    ("numpy", "dtype"): _Dtype,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return lambda *args: _latin(*args)
        if (found := ADMITTED.get((module, name))) is None:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, and may only name what arrays of bytes need"
            )
        # A new class for each pickle, which a pickle cannot change for others.
        return type(found.__name__, (found,), {})

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to external objects")


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle: bytes, texts, numbers, lists, and arrays for `bytes_of`.

    Raises:
        ValueError: the file holds other values, names other functions or classes, or is damaged.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise pickle.UnpicklingError(f"it has more than {LARGEST:,} bytes")
        # Texts of Python 2 are read as bytes: they may be the contents of an array.
        found = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises almost any error
        raise ValueError(
            f"{path} must be a pickle of a dictionary of arrays: {error or type(error).__name__}"
        ) from error
    if type(found) is not dict:
        raise ValueError(f"{path} must hold a dictionary, got {type(found).__name__}")
    return {_text(key): value for key, value in found.items()}


def bytes_of(value: Any, of: str) -> Tensor:
    """Converts an array [n, m] of bytes from a pickle.

    Raises:
        ValueError: it is not such an array, or its number of bytes does not match its shape.
    """
    state = value.state if isinstance(value, _Array) else None
    if type(state) is not tuple or len(state) != 5:
        raise ValueError(f"{of} must be an array, got {_kind(value)}")
    _, shape, dtype, fortran, content = state
    elements = _text(dtype.args[0]) if isinstance(dtype, _Dtype) and dtype.args else None
    two = type(shape) is tuple and len(shape) == 2 and all(type(n) is int for n in shape)
    if elements not in BYTES or not two or fortran or not isinstance(content, bytes):
        raise ValueError(
            f"{of} must be an array of bytes in 2 dimensions, row by row, got {shape!r} of "
            f"{elements!r}"
        )
    if min(shape) < 1 or shape[0] * shape[1] != len(content):
        raise ValueError(
            f"{of} must hold as many bytes as its shape {list(shape)} says, got {len(content)}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(shape)


def integers_of(value: Any, of: str) -> list[int]:
    """Checks a list of integers from a pickle; ValueError for anything else."""
    if type(value) is not list or not all(type(number) is int for number in value):
        raise ValueError(f"{of} must be a list of integers, got {_kind(value)}")
    return value


def _latin(text: Any, encoding: Any) -> bytes:
    """Replaces codecs.encode, with which Python 3 writes bytes for Python 2."""
    if type(text) is not str or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("it may encode texts as latin1 only")
    return text.encode("latin1")


def _kind(value: Any) -> str:
    name = type(value).__name__.strip("_")
    return f"{name} of other values" if name == "list" else name


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value
