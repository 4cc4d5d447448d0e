"""The examples of the pages and of the README run as they stand and print what they say.

Blocks of ```python on a page share one namespace; each of the README stands alone. A block of
```text right behind one is what it printed. `<!-- needs: a b -->` on the line before a block says
which packages it needs, and at the top of a page which all of its blocks need; without them they
are skipped.
"""

import pkgutil
import re
import sys
import types
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import pytest
from hub_tools import k_diffusion_sampling, reset_accelerate, stub_torchvision

from tools import ROOT

DOCS = ROOT / "docs"
README = "../README.md"
MAX_COLUMNS = 8
NEEDS = r"<!-- needs: ([\w ]+) -->\n"
BLOCK = re.compile(rf"(?:{NEEDS})?```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.S)


class Page(NamedTuple):
    """A page and what is run of it."""

    text: str
    needs: list[str]
    blocks: list[tuple[list[str], str, str]]  # what each needs, its code, and what it prints


@cache
def page(name):
    text = (DOCS / name).read_text()
    needs = re.match(NEEDS, text)
    blocks = [(needed.split(), code, output) for needed, code, output in BLOCK.findall(text)]
    return Page(text, needs[1].split() if needs else [], blocks)


PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
WITH_CODE = [name for name in (*PAGES, README) if page(name).blocks]


# What an example's variables must be, beyond that it runs.
CHECKS = {"custom.md": lambda names: names["off"] < 0.2}


@pytest.fixture
def _libraries(monkeypatch, one_thread):
    stub_torchvision()
    reset_accelerate()
    if find_spec("k_diffusion") is not None:
        package = types.ModuleType("k_diffusion")
        package.sampling = k_diffusion_sampling()
        monkeypatch.setitem(sys.modules, "k_diffusion", package)
    yield
    reset_accelerate()


def absent(packages):
    return [name for name in packages if name not in sys.modules and find_spec(name) is None]


@pytest.mark.usefixtures("_libraries")
@pytest.mark.parametrize("name", WITH_CODE)
def test_examples_run_and_print_what_they_say(name, capsys):
    if missing := absent(page(name).needs):
        pytest.skip(f"needs {', '.join(missing)}")
    names = {}
    for i, (needs, code, output) in enumerate(page(name).blocks):
        if absent(needs):
            continue
        if name == README:
            names = {}
        capsys.readouterr()
        exec(compile(code, f"{name}, block {i}", "exec"), names)
        printed = capsys.readouterr().out
        assert not output or printed == output
    assert CHECKS.get(name, bool)(names)


def test_every_fence_is_seen():
    for name in (*PAGES, README):
        assert page(name).text.count("```python") == len(page(name).blocks), name
    assert len(page(README).blocks) == 3
    assert {"index.md", "op.md", "custom.md", "interop.md"} <= set(WITH_CODE)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    targets = re.findall(r"\]\((?!http)([^)#]+)", page(name).text)
    folder = (DOCS / name).parent
    assert [target for target in targets if not (folder / target).exists()] == []


def test_tables_are_narrow():
    lines = [line for name in PAGES for line in page(name).text.splitlines()]
    wide = [line for line in lines if line.startswith("|") and line.count("|") > MAX_COLUMNS + 1]
    assert wide == []


def test_the_reference_is_of_what_exists():
    entries = re.findall(r"^::: (\S+)\n(?:.*\n *members: \[(.*)\])?", page("api.md").text, re.M)
    assert len(entries) > 50
    for path, members in entries:
        if path == "dblocks.integrations.scheduler.DiffusionBlocksScheduler" and absent(
            ["diffusers"]
        ):
            continue
        owner = pkgutil.resolve_name(path)
        assert all(hasattr(owner, name.strip()) for name in members.split(",") if name), path


def test_the_site_has_every_page():
    nav = re.findall(r" ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(nav) == PAGES
