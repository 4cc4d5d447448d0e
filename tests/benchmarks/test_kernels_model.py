"""The cycle model of the kernels: reading machine code, and a launch for every goal."""

import importlib
import shutil
from types import SimpleNamespace

import pytest

from tools import ROOT, compiled

CODE = """
        .section .text.k,"ax",@progbits
.text.k:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P1 LDG.E R9, desc[UR4][R12.64+0x10] ;
        /*0030*/                   FADD R4, R4, R9 ;
        /*0040*/                   STG.E.128 desc[UR4][R6.64], R4 ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
.L_x_1:
        /*0070*/                   BRA `(.L_x_1);
        /*0080*/                   NOP;
"""
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture
def model(monkeypatch):
    """Modules of the model; importing them turns Triton's interpreter off, which is undone."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # monkeypatch restores what was there
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("sass", "sim")
    return SimpleNamespace(
        **{n: importlib.import_module(f"benchmarks.kernels.model.{n}") for n in names}
    )


def test_machine_code_is_taken_apart(model):
    code, loops = model.sass.parse(CODE)
    assert [i.op for i in code] == [
        "LDC", "LDG.E.128", "LDG.E", "FADD", "STG.E.128", "BRA", "EXIT", "BRA",
    ]  # fmt: skip
    assert (code[2].predicate, code[3].operands) == ("@!P1", "R4, R4, R9")
    assert loops == [(1, 5)]
    assert model.sass.count(code) == {"OTHER": 1, "LDG": 2, "FP": 1, "STG": 1, "CTL": 3, "ALL": 8}
    assert model.sass.moved(code, warps=4) == 4 * 32 * (16 + 16)


def test_registers_that_an_instruction_writes_and_reads(model):
    sim = model.sim
    code, _ = model.sass.parse(CODE)
    assert sim.uses(code[1], sim.LOAD) == ([4, 5, 6, 7], [2, 3, 404])
    assert sim.uses(code[2], sim.LOAD) == ([9], [12, 13, 404, 601])
    assert sim.uses(code[3], sim.PLAIN) == ([4], [4, 9])
    assert sim.uses(code[4], sim.STORE) == ([], [4, 5, 6, 7, 404])


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "ctas"),
    [(32, 4, 0, 16), (255, 8, 0, 1), (64, 4, 100 << 10, 2), (32, 1, 0, 32)],
)
def test_programs_that_fit_on_a_multiprocessor(model, registers, warps, shared, ctas):
    assert model.sass.occupancy(registers, warps, shared) == ctas


@needs_compiler
def test_the_model_on_a_trace_made_by_hand(model, monkeypatch, tmp_path):
    """Loads that wait for each other take a latency each, a copy at most its bandwidth."""
    sass, sim = model.sass, model.sim
    monkeypatch.setattr(sim, "BUILD", tmp_path)
    sim.binary.cache_clear()
    kernel = sass.Kernel("k", "", 32, 0, 4, 0, 16, [], [])
    load = sass.Instruction("", "LDG.E.128", "R4, desc[UR4][R2.64]")
    chain = sass.Instruction("", "LDG.E.128", "R4, desc[UR4][R4.64]")
    store = sass.Instruction("", "STG.E.128", "desc[UR4][R6.64], R8")

    def run(code, repeat=64, ctas=32, one=False):
        of = kernel._replace(ctas=1) if one else kernel
        return sim.run(of, [sim.Segment(code, repeat, False)], ctas)

    waits = run([chain], one=True, ctas=1)
    assert 64 * 0.7 * sim.LATENCY < waits.clocks < 64 * 1.4 * sim.LATENCY + 2000
    streams = run([load, store])
    assert 0.9 < streams.of_copy < 1.01
    assert waits.of_copy < 0.3
    half = sim.run(kernel, [sim.Segment([load, store], 64, False)], 32, scale=0.5)
    assert half.of_copy < streams.of_copy + 0.01
    sim.binary.cache_clear()


def test_every_goal_has_a_launch():
    """In a process of its own: the tests' interpreter must not be on in it."""
    done = compiled("benchmarks.kernels.model", "launches")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "adaln fwd 5120 adaln_fwd_kernel" in lines
    assert "attention bwd_dkv, block 32 d64 doubled_attention_bwd_dkv_kernel" in lines
    assert len(lines) == len(set(lines)) > 60


@pytest.mark.slow
@needs_compiler
def test_a_row_of_each_kind_is_modelled():
    kernels = ("rms fwd", "cross_entropy", "group_grads", "fwd, block 1")
    widths = ("1152", "32000", "1 x 4096 x 3072", "d64")
    done = compiled("benchmarks.kernels.model", "--only", *kernels, "--widths", *widths)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("Modelled for an H200, not measured")
    rows = [line.split("|")[1:4] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 4
    for kernel, _, figure in rows:
        unit = "TFLOP/s" if "attention" in kernel else "%"
        assert unit in figure
        assert float(figure.split()[0].strip("+%")) > 1
