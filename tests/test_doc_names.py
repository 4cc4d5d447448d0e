"""The paths, flags and dotted names that the pages name in backticks exist."""

import pkgutil
import re
from functools import cache

import pytest

from tools import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "DESIGN.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FOLDERS = "benchmarks|csrc|dblocks|docs|kernels|tests"
SOURCES = ("dblocks/**/*.py", "benchmarks/**/*.py", "setup.py", "pyproject.toml", "Makefile")
OTHERS_FLAGS = {
    "--num_processes",
    "--nproc-per-node",
    "--no-build-isolation",
    "--no-deps",
}  # of other programs


def quoted(page):
    """What a page has in backticks, outside of blocks of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    return re.findall(r"`([^`\n]+)`", text)


@cache
def words_of_the_source():
    files = (path for pattern in SOURCES for path in ROOT.glob(pattern))
    return set(re.findall(r"\w+", "\n".join(path.read_text(errors="ignore") for path in files)))


def resolves(name):
    try:
        pkgutil.resolve_name(name)
    except ImportError as error:  # of a package that is not installed here
        return not str(getattr(error, "name", "")).startswith("dblocks") and "needs" in str(error)
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_exist(page):
    wrong = []
    for text in quoted(page):
        if "<" in text:  # stands for several names
            continue
        paths = re.findall(rf"(?<![\w./])(?:{FOLDERS})/[\w./-]*\w", text)
        wrong += [path for path in paths if not (ROOT / path).exists()]
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - OTHERS_FLAGS
        known = words_of_the_source()
        wrong += [flag for flag in flags if flag[2:].replace("-", "_") not in known]
        names = re.findall(r"(?<![\w./])dblocks(?:\.(?!json\b)[A-Za-z_]\w*)+(?![\w/])", text)
        wrong += [name for name in names if not resolves(name)]
    assert wrong == []


def test_a_wrong_name_is_found():
    assert not resolves("dblocks.blocks.NoSuchName")
    assert resolves("dblocks.blocks.BlocksConfig")
    assert "no_such_flag" not in words_of_the_source()
