"""The compile check in a process of its own: the tests' interpreter must not be on in it."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import ROOT, compiled

# Where the Makefile lays it; see the file.
OLDEST = Path(sys.prefix) / "oldest-triton"
OLDEST_VERSION = re.search(
    r"^triton==(\S+)", (ROOT / "requirements" / "oldest-triton.txt").read_text(), re.MULTILINE
)[1]


def check(*arguments, **environment):
    return compiled("benchmarks.kernels.check", *arguments, **environment)


def kernels_of(lines):
    return {line.split("|")[2].strip() for line in lines}


def public_kernels():
    """The kernels that the code of kernels/ launches."""
    source = "".join(path.read_text() for path in (ROOT / "kernels").rglob("*.py"))
    return set(re.findall(r"\b(?:Launch|launch)\(\s*(\w+_kernel),", source))


@pytest.mark.slow
def test_slice_compiles_without_spills_and_with_wide_accesses():
    done = check("--slice")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert kernels_of(line for line in lines if "| sm_90 |" in line) == public_kernels()
    attention = {f"doubled_attention_{name}_kernel" for name in ("fwd", "bwd_dq", "bwd_dkv")}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert attention <= kernels_of(line for line in lines if f"| {target} |" in line)
    assert ", 0 failed" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not OLDEST.is_dir(), reason=f"no triton {OLDEST_VERSION} in {OLDEST}")
def test_every_case_compiles_with_the_oldest_triton():
    done = check("--once", PYTHONPATH=str(OLDEST))
    print(done.stdout)
    assert done.stdout.startswith(f"triton {OLDEST_VERSION},")
    assert done.returncode == 0, done.stdout + done.stderr
    assert kernels_of(line for line in done.stdout.splitlines() if "_kernel" in line) == (
        public_kernels()
    )
    assert ", 0 failed" in done.stdout


def test_the_oldest_triton_is_the_oldest_that_may_be_installed():
    least = re.search(r"triton>=([\d.]+)", (ROOT / "pyproject.toml").read_text())[1]
    assert f"{least}.0" == OLDEST_VERSION


def test_every_kernel_is_counted():
    """The check knows kernels by their names, this test by how they are launched."""
    code = "from benchmarks.kernels import check as g; print(*g.launched_kernels())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert len(public_kernels()) > 10
    assert set(done.stdout.split()) == public_kernels()


def test_nothing_compiled_is_a_failure():
    assert check("--slice", "--case", "no such case").returncode == 1


@pytest.mark.parametrize("more", [("--targets", "gfx942"), ("--widths", "1024"), ("--once",)])
def test_choices_that_would_be_ignored_are_refused(more):
    done = check("--slice", *more)
    assert done.returncode == 2
    assert "--once and --slice choose targets and widths" in done.stderr


def test_a_kernel_without_a_case_is_a_failure():
    code = """
import sys
from benchmarks.kernels import check as g
g.once_jobs = lambda: [(1536, "bf16", "adaln", "sm_90")]
sys.argv = ["gate", "--once", "--workers", "1"]
sys.exit(g.main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "0 failed" in done.stdout
    assert "no case launches column_sums_kernel, cross_entropy_kernel" in done.stdout


def test_failures_are_found():
    code = """
from benchmarks.kernels.check import Launch, failures
good = dict(case="c", kernel="adaln_fwd_kernel", target="sm_90", D=4096, dtype="bf16", warps=8,
            registers=64, stack=0, shared=0, matrix=0, instructions=9, widths="L128x2 S128x2",
            serialized="", error="")
assert failures(Launch(**good)) == []
assert failures(Launch(**good | {"stack": 8})) == ["8 bytes of stack"]
assert failures(Launch(**good | {"stack": 8, "D": 8192})) == []
assert failures(Launch(**good | {"widths": "L64x4 S128x2"})) == ["no 16-byte global load"]
assert failures(Launch(**good | {"widths": "L128x4 S32x2"})) == ["no 16-byte global store"]
assert failures(Launch(**good | {"widths": ""})) != []
assert failures(Launch(**good | {"widths": "-"})) == []
assert failures(Launch(**good | {"error": "CompilationError"})) == ["CompilationError"]
assert failures(Launch(**good | {"shared": 2**18})) == ["262144 bytes of shared memory"]
good |= dict(kernel="doubled_attention_fwd_kernel", D=128, matrix=24)
assert failures(Launch(**good)) == []
assert failures(Launch(**good | {"matrix": 0})) == ["no wgmma.mma_async"]
assert failures(Launch(**good | {"matrix": 0, "target": "gfx942"})) == ["no v_mfma"]
assert failures(Launch(**good | {"matrix": 0, "dtype": "f32"})) == []
assert failures(Launch(**good | {"stack": 8})) == ["8 bytes of stack"]
assert failures(Launch(**good | {"stack": 8, "target": "sm_80"})) == []
assert failures(Launch(**good | {"stack": 8, "D": 256})) == []
dkv = good | {"kernel": "doubled_attention_bwd_dkv_kernel"}
assert failures(Launch(**dkv | {"stack": 64})) == []
assert failures(Launch(**dkv | {"stack": 104})) == ["104 bytes of stack"]
for D in (128, 256):
    (wrong,) = failures(Launch(**good | {"serialized": "a call", "D": D}))
    assert wrong == "wgmma.mma_async serialized: a call"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


SAID = """ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are \
serialized due to non wgmma instructions defining accumulator registers of a wgmma between start \
and end of the pipeline stage in the function 'doubled_attention_fwd_kernel'
ptxas info    : 11 bytes gmem, 8 bytes cmem[4]
"""
WHY = "non wgmma instructions defining accumulator registers of a wgmma between start and end of"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("ptxas info    : 11 bytes gmem, 8 bytes cmem[4]\n", ""),
        (SAID, f"{WHY} the pipeline stage"),
        (SAID + SAID, f"{WHY} the pipeline stage"),
        (SAID.partition(" due to")[0] + "\n", "no reason given"),
        (SAID.partition(" due to")[0] + " due to a call\n", "a call"),
    ],
)
def test_what_ptxas_says_of_serialized_products(said, reason, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    assert importlib.import_module("benchmarks.kernels.machine_code").reasons(said) == reason
