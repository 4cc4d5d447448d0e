"""The compile gate in a process of its own: the tests' interpreter must not be on in it."""

import subprocess
import sys

import pytest

from tools import ROOT, compiled


def gate(*arguments):
    return compiled("benchmarks.compile_gate", *arguments)


@pytest.mark.slow
def test_slice_compiles_without_spills_and_with_wide_accesses():
    done = gate("--slice")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = {line.split("|")[2].strip() for line in done.stdout.splitlines() if "sm_90" in line}
    assert kernels >= {"adaln_fwd_kernel", "adaln_bwd_kernel", "group_grads_kernel"}
    attention = {f"doubled_attention_{name}_kernel" for name in ("fwd", "bwd_dq", "bwd_dkv")}
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        lines = [line for line in done.stdout.splitlines() if f"| {target} |" in line]
        assert attention <= {line.split("|")[2].strip() for line in lines}
    assert ", 0 failed" in done.stdout


def test_nothing_compiled_is_a_failure():
    assert gate("--slice", "--case", "no such case").returncode == 1


def test_failures_are_found():
    code = """
from benchmarks.compile_gate import Launch, failures
good = dict(case="c", kernel="adaln_fwd_kernel", target="sm_90", D=4096, dtype="bf16", warps=8,
            registers=64, stack=0, shared=0, matrix=0, instructions=9, widths="L128x2 S128x2",
            error="")
assert failures(Launch(**good)) == []
assert failures(Launch(**good | {"stack": 8})) == ["8 bytes of stack"]
assert failures(Launch(**good | {"stack": 8, "D": 8192})) == []
assert failures(Launch(**good | {"widths": "L64x4 S128x2"})) == ["no 16-byte global load"]
assert failures(Launch(**good | {"widths": "L128x4 S32x2"})) == ["no 16-byte global store"]
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
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
