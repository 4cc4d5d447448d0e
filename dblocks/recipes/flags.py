"""Error messages that name flags of the command line instead of fields of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

NO, YES = "False", "True"


@contextmanager
def naming_flags(names: Sequence[str]) -> Iterator[None]:
    """Makes a ValueError inside the `with` block name flags instead of fields.

    Args:
        names: names of the fields.
    """
    try:
        yield
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise ValueError(with_flags(str(error), names)) from error


def with_flags(message: str, names: Sequence[str]) -> str:
    """Replaces reduce_every by `--reduce-every`, and shared='reduce' by `--shared reduce`.

    Fields of one word are also English words: they are replaced only at the beginning of the
    message or with a value.
    """
    known = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    message = re.sub(rf"(?<![\w./-])({known})=(?:'([^']*)'|([\w.+-]*\w))", _valued, message)
    long = "|".join(re.escape(name) for name in names if "_" in name) or "(?!)"
    found = rf"(?<![\w./'\"-])(?:{long})(?![\w.=/'\"])|\A(?:{known})(?= must\b)"
    return re.sub(found, lambda name: _flag(name[0]), message)


def _valued(found: re.Match[str]) -> str:
    name, text, value = found[1], found[2], found[3]
    if text is None and value in (NO, "None"):
        return f"no {_flag(name)}"
    return _flag(name) if value == YES else f"{_flag(name)} {value if text is None else text}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
