"""Names of the public API: exported for a reader, one word for one thing."""

import ast
import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections import defaultdict
from contextlib import suppress

import pytest

from tools import ROOT

PACKAGES = {
    ".".join(path.parent.relative_to(ROOT).parts): path
    for path in sorted((ROOT / "dblocks").rglob("__init__.py"))
    if "kernels" not in path.relative_to(ROOT).parts
}
COMMANDS = ("vit", "dit", "causal_lm", "masked_lm", "recurrent", "run", "drawing", "autoregressive")
PAGES = "\n".join(
    path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
)


def exported(package):
    """Names that a package takes from its modules for others."""
    body = ast.parse(PACKAGES[package].read_text()).body
    taken = [node for node in body if isinstance(node, ast.ImportFrom) and node.module]
    return [a.asname or a.name for n in taken for a in n.names if n.module.startswith("dblocks.")]


def sources():
    """Files of the library and the benchmarks, with the text of each."""
    files = [path for folder in ("dblocks", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    return {path: path.read_text() for path in files}


def is_used(name, package, texts):
    """Whether another folder takes the name from the package, or the package uses it itself."""
    last, folder = package.rpartition(".")[2], PACKAGES[package].parent
    taken = rf"from {re.escape(package)} import (?:\([^)]*\b{name}\b|[^\n]*\b{name}\b)"
    pattern = re.compile(rf"{taken}|\b{last}\.{name}\b")
    own = ast.walk(ast.parse(texts[PACKAGES[package]]))
    return any(isinstance(node, ast.Name) and node.id == name for node in own) or any(
        pattern.search(text) for path, text in texts.items() if not path.is_relative_to(folder)
    )


def test_what_a_package_exports_is_documented_or_used_by_another():
    texts = sources()
    inner = {
        f"{package}.{name}"
        for package in PACKAGES
        for name in exported(package)
        if not name.startswith("__")
        and not re.search(rf"\b{name}\b", PAGES)
        and not is_used(name, package, texts)
    }
    assert inner == set()


def classes():
    """How many public classes there are of each name."""
    found = defaultdict(list)
    for path, text in sources().items():
        if path.is_relative_to(ROOT / "dblocks"):
            for name in re.findall(r"^class ([A-Z]\w*)", text, re.MULTILINE):
                found[name].append(str(path.relative_to(ROOT)))
    return found


def test_no_other_class_has_the_name_of_an_exported_one():
    """Not so for what each network has, such as the `Hidden` of its layers: none is exported."""
    found = classes()
    names = {name for package in PACKAGES for name in exported(package)}
    assert {name: files for name, files in found.items() if len(files) > 1 and name in names} == {}
    assert found["Bound"] == ["dblocks/sampling/likelihood.py"]
    assert len(found["Hidden"]) > 1


def choices(hint):
    """The values of a Literal, which may be one of several types."""
    if typing.get_origin(hint) is typing.Literal:
        return set(typing.get_args(hint))
    unions = (typing.Union, types.UnionType)
    parts = typing.get_args(hint) if typing.get_origin(hint) in unions else ()
    return set().union(*map(choices, parts))


def hints(function, names=None):
    """Types of arguments or fields by their names, but for those that only type checkers know."""
    found, names = {}, function.__globals__ if names is None else names
    for name, hint in function.__annotations__.items():
        with suppress(NameError):
            found[name] = eval(hint, names) if isinstance(hint, str) else hint
    return found


def functions(value):
    if not isinstance(value, type):
        return [value] if inspect.isfunction(value) else []
    own = vars(value).items()
    return [f for name, f in own if inspect.isfunction(f) and name.strip("_") in (name, "init")]


@pytest.fixture(scope="module")
def options():
    """Of each option with named values: their sets, and the functions with each."""
    found = defaultdict(lambda: defaultdict(set))
    for package in PACKAGES:
        if package.startswith(("dblocks.integrations", "dblocks.recipes")):
            continue  # need other libraries
        module = importlib.import_module(package)
        for value in (getattr(module, name) for name in exported(package)):
            for function in functions(value):
                for name, hint in hints(function).items():
                    if name != "return" and (values := choices(hint)):
                        found[name][frozenset(values)].add(function.__qualname__)
    for module in (importlib.import_module(f"dblocks.recipes.{name}") for name in COMMANDS):
        for value in vars(module).values():  # flags are the fields of dataclasses
            if isinstance(value, type) and dataclasses.is_dataclass(value):
                for name, hint in hints(value, vars(module)).items():
                    if values := choices(hint):
                        found[name][frozenset(values)].add(f"{module.__name__}.{value.__name__}")
    return found


def test_one_word_is_one_option(options):
    assert {"spacing", "conditioning", "head", "noise", "kind"} <= set(options)
    clashes = {
        name: dict(sets)
        for name, sets in options.items()
        if any(a.isdisjoint(b) for a in sets for b in sets)
    }
    assert clashes == {}
    assert all("MaskSchedule" in owner for owners in options["kind"].values() for owner in owners)


def test_one_option_is_one_word(options):
    words = defaultdict(set)
    for name, sets in options.items():
        for values in sets:
            for value in values - {"none", "auto"}:
                words[value].add(name)
    several = {value: names for value, names in words.items() if len(names) > 1}
    # Blocks are divided by the rules that levels are spaced by.
    shared = {rule: {"partition", "spacing"} for rule in ("equal_mass", "uniform")}
    # The command names a schedule by what its class calls the kind.
    shared |= {kind: {"kind", "schedule"} for kind in ("linear", "cosine", "poly2")}
    shared["cosine"] |= {"decay"}  # of a learning rate
    assert several == shared
