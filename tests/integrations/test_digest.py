import functools
import inspect

import pytest

from dblocks.integrations.digest import digest


def first(x, y):
    """What it does."""
    return x + y  # the sum


def test_digest_is_of_parameters_and_code():
    def of(text, name="first"):
        space = {}
        lines = text.splitlines(keepends=True)
        filename = f"<{hash(text)}>"
        exec(compile(text, filename, "exec"), space)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inspect, "findsource", lambda f: (lines, 0))
            return digest(space[name])

    same = digest(first)
    assert same is not None
    assert of("def first(x: int, y=0) -> int:\n  # note\n\n  return x + y\n") == same
    assert of("def first(x, y):\n    return x - y\n") != same
    assert of("def first(x, z, y=0):\n    return x + y\n") != same
    assert of("def first(x, y):\n    if x:\n        x = 1\n    return x + y\n") != of(
        "def first(x, y):\n    if x:\n        x = 1\n        return x + y\n"
    )
    assert digest(len) is None
    assert digest(lambda x: x) is None


def test_digest_of_a_wrapper_is_none():
    @functools.wraps(first)
    def wrapper(x, y):
        return -first(x, y)

    assert digest(wrapper) is None
