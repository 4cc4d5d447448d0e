"""Residency on a device that counts its bytes and runs side streams late: bits, bounds, faults."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tools import ROOT

HERE = ROOT / "tests" / "scale"
CXX = os.environ.get("CXX", "c++")


@pytest.fixture(scope="module")
def found():
    if not (shutil.which(CXX) and shutil.which("ninja")):
        pytest.skip("needs a C++ compiler and ninja")
    folders = [ROOT, ROOT / "tests", HERE]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    run = subprocess.run(
        [sys.executable, str(HERE / "on_counting_device.py"), "bits", "bounds", "faults", "order"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_bits_are_those_without_residency(found):
    assert len(found["bits"]) == 10
    assert all(found["bits"].values()), found["bits"]


def test_peaks_keep_their_bounds(found):
    peaks = {name: pair for name, pair in found["bounds"].items() if " " in name}
    assert len(peaks) == 6
    for name, (peak, bound) in peaks.items():
        assert bound / 2 < peak <= 1.05 * bound, (name, found["bounds"])


def test_a_missing_wait_is_seen(found):
    assert found["faults"] == {"all waits": True, "no wait for a block": True}


def test_the_recorded_order_has_every_wait(found):
    """Also the waits for the computation, which is never late on this device."""
    order = found["order"]
    for prefetch in ("none", "all"):
        assert order[f"all waits, {prefetch}"] == []
        for fault in ("no wait before a copy back", "a wait after a copy back"):
            assert "side" in order[f"{fault}, {prefetch}"]
        assert "compute" in order[f"no wait for a block, {prefetch}"]
