"""A short digest of a function's source: how classes of other libraries are known.

What replaces a class's forward must compute the same, and libraries change their code between
versions. A version number would refuse versions in which nothing changed and accept a patched
class; the digest of the forward's own source does neither. It is read in two places:
`dblocks.integrations.norms` and `dblocks.integrations.fuse.fusion`.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable
from functools import cache
from typing import Any

# What does not change the meaning: comments, blank lines, the width of the indentation.
SKIPPED = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT)
DIGITS = 12


@cache
def digest(function: Callable[..., Any]) -> str | None:
    """A digest of the names of the parameters and of the body, less annotations and comments.

    None where there is no source, or where the function wraps another one.
    """
    if hasattr(function, "__wrapped__"):
        return None
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return None
    node = ast.parse(source).body[0]
    if not isinstance(node, ast.FunctionDef):
        return None
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    lines = source.splitlines(keepends=True)[body[0].lineno - 1 :] if body else []
    text = textwrap.dedent("".join(lines))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    words = [t.string.strip() or "|" for t in tokens if t.type not in SKIPPED]
    return hashlib.sha256(" ".join([*names, ":", *words]).encode()).hexdigest()[:DIGITS]
