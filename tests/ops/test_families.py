"""The table of ops and families against the files that it speaks of."""

import re

import pytest

import dblocks.functional
from benchmarks.ops.registry import OPS
from dblocks.ops import FAMILIES
from tools import ROOT

WITHOUT_CPP = {"attention", "cross_entropy"}
LAUNCHED_IN = {
    "linear_cross_entropy": "_chunked_cross_entropy.py",
}


def names(folder, pattern="*"):
    """Of the files and folders that are not private."""
    found = {path.stem for path in (ROOT / folder).glob(pattern)}
    return {name for name in found if not name.startswith("_") and "." not in name}


def test_every_op_is_public_and_nothing_else_is():
    public = {
        name
        for name in dblocks.functional.__all__
        if not isinstance(getattr(dblocks.functional, name), type)  # what some ops return
    }
    assert set(FAMILIES) == public


def test_every_op_has_its_file_and_its_tests():
    assert set(FAMILIES) == names("dblocks/ops", "*.py")
    tests = {name.removeprefix("test_") for name in names("tests/ops", "test_*.py")}
    assert set(FAMILIES) == tests - {"families"}


def test_every_family_has_its_kernels_and_its_reference():
    families = set(FAMILIES.values())
    assert families == names("kernels") - {"reference"}
    reference = {path.stem for path in (ROOT / "kernels" / "reference").glob("_*.py")}
    # The ops of edm draw the normals of noise_inject again: they stand in one file.
    assert {f"_{family}" for family in families - {"edm"}} == reference - {"__init__"}
    folders = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    assert families - WITHOUT_CPP == folders - {"common"}


@pytest.mark.parametrize("op", FAMILIES)
def test_an_op_launches_kernels_of_its_family_only(op):
    source = (ROOT / "dblocks" / "ops" / LAUNCHED_IN.get(op, f"{op}.py")).read_text()
    used = set(re.findall(r'triton="(\w+)|^    from dblocks\.kernels\.(\w+)', source, re.MULTILINE))
    used = {family for pair in used for family in pair if family}
    # Ops without kernels of their own share those of adaln.py.
    assert used == {FAMILIES[op]} or "from dblocks.ops.adaln import BACKWARD, FORWARD" in source


def test_every_op_is_measured():
    measured = {op.name.removesuffix("_rms") for op in OPS}
    assert set(FAMILIES) == measured
