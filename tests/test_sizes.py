"""How long files and functions may be."""

import ast

import pytest

from tools import ROOT

MAX_LINES = 400  # of a file
MAX_BODY = 60  # lines of a function, without its signature and docstring
MAX_ABOVE = 3  # classes of the library that a class derives from, one from another
FILES = sorted(
    path
    for folder in ("dblocks", "kernels", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
# A kernel is one function by nature.
SOURCES = [
    path
    for path in FILES
    if path.relative_to(ROOT).parts[0] in ("dblocks", "benchmarks")
    and path.relative_to(ROOT).parts[:2] != ("dblocks", "kernels")
]


def long_functions(source):
    """Names and lengths of the functions whose bodies are too long."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = node.body[-1].end_lineno - body[0].lineno + 1 if body else 0
            if lines > MAX_BODY:
                found[node.name] = lines
    return found


def test_no_file_is_too_long():
    files = [*FILES, *(ROOT / "tests").rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    assert len(lengths) > 250
    assert {file: lines for file, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_function_is_too_long():
    found = {str(p.relative_to(ROOT)): long_functions(p.read_text()) for p in SOURCES}
    assert len(found) > 250
    assert {file: functions for file, functions in found.items() if functions} == {}


@pytest.mark.parametrize("lines", [MAX_BODY, MAX_BODY + 1])
def test_the_docstring_does_not_count(lines):
    source = 'def f(\n    a,\n):\n    """One.\n\n    Two.\n    """\n' + "    a += 1\n" * lines
    assert long_functions(source) == ({} if lines == MAX_BODY else {"f": lines})


def bases_of_classes():
    """Names of the bases of every class of the library, by its name and file."""
    found = {}
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] == "dblocks":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    names = [ast.unparse(base).split("[")[0] for base in node.bases]
                    found.setdefault(node.name, set()).update(n.rpartition(".")[2] for n in names)
    return found


def above(name, bases):
    """How many classes of the library lie above one."""
    own = [base for base in bases[name] if base in bases and base != name]
    return max((1 + above(base, bases) for base in own), default=0)


def test_inheritance_is_shallow():
    bases = bases_of_classes()
    assert len(bases) > 200
    assert above("TokenTarget", bases) == 2  # Target, EmbeddedTarget
    assert {name for name in bases if above(name, bases) > MAX_ABOVE} == set()
