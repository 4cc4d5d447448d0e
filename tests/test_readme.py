"""The README's examples run as they stand, and the pages' links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_example_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_examples():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_links_to_files_lead_somewhere(page):
    path = ROOT / page
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text())
    assert targets
    assert [target for target in targets if not (path.parent / target).exists()] == []


def test_make_targets_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([a-z-]+)`", README))
    assert {"demo", "results", "kernels-check"} <= named
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.M)] == []
