"""JSON files that hold the SHA-256 of other files in the folder and, last, of their own text.

The digest of a file's own text is computed with zeros in place of that digest. Files without
digests, from earlier versions or after a manual edit, are read without a check.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dblocks.checkpoint.files import current
from dblocks.checkpoint.tensors import NO_DIGEST
from dblocks.config import json_text, parse_json, read_text

SHA256 = "sha256"
LONGEST_TEXT = 256 * 2**20  # bytes


def sealed(name: str, values: Mapping[str, Any], beside: Mapping[str, str] | None = None) -> str:
    """The text of a JSON file with digests.

    Args:
        name: name of the file.
        values: the other contents.
        beside: digests of other files in the folder by name.
    """
    text = json_text({**values, SHA256: {**(beside or {}), name: NO_DIGEST}}, indent=2) + "\n"
    return _with(text, NO_DIGEST, text_digest(text))


def read_sealed(path: Path, remedy: str = f'delete "{SHA256}"') -> Any:
    """The JSON value in a file, whose digest must match if it has one.

    Args:
        path: the file.
        remedy: how to make a changed file readable, for the error message.

    Raises:
        ValueError: the file is not JSON, or was changed; the message names it.
    """
    text = read_text(path)
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    digests = found.get(SHA256) if isinstance(found, dict) else None
    if not isinstance(digests, dict) or path.name not in digests:
        return found
    own = digests[path.name]
    whole = isinstance(own, str) and re.fullmatch("[0-9a-f]{64}", own)
    if not whole or text_digest(_with(text, own, NO_DIGEST)) != own:
        raise ValueError(
            f"{path} cannot be used: it is not what was saved, by the sha256 in it; restore it, or "
            f"if it was changed on purpose, {remedy} in it"
        )
    return found


def check_beside(path: Path, digests: Any) -> None:
    """Compares existing files in the folder of a JSON file with the digests in it.

    Raises:
        ValueError: a file was changed, or `digests` has another form or lacks the JSON file's own.
    """
    name = path.name
    if not isinstance(digests, dict) or name not in digests:
        raise ValueError(f"{path} must hold the sha256 of files by name, including its own")
    for other in digests.keys() - {name}:
        file = current(path.parent, other)
        if file.exists() and text_digest(read_text(file, longest=LONGEST_TEXT)) != digests[other]:
            raise ValueError(
                f"{file} cannot be used: it is not what was saved, by the sha256 in {name}; "
                f'restore it, or if it was changed on purpose, delete "{SHA256}" in {name}'
            )


def text_digest(text: str) -> str:
    """The SHA-256 of a text as `read_text` returns it."""
    return hashlib.sha256(text.removeprefix("\ufeff").encode()).hexdigest()


def _with(text: str, old: str, new: str) -> str:
    """The text with the last occurrence of a digest replaced."""
    head, _, tail = text.rpartition(old)
    return head + new + tail
