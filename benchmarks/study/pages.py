"""Writes a table between its markers in a page."""

from __future__ import annotations

from pathlib import Path


def write_between_markers(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a file by `text`.

    Raises:
        ValueError: the file does not hold both markers, once each and in this order.
    """
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    start, end = old.find(opening), old.find(closing)
    if start < 0 or end < start or old.count(opening) != 1 or old.count(closing) != 1:
        raise ValueError(
            f"{path} must hold the lines {opening} and {closing}, once each, and does not; "
            "add them where the table belongs"
        )
    new = f"{old[: start + len(opening)]}\n{text.strip()}\n{old[end:]}"
    path.write_text(new, encoding="utf-8")
