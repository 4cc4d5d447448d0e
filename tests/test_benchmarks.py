"""The benchmark tells the truth: a wrong output gets no figure, and every op takes part."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHAPE, CPU = (2, 4, 16), torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    """benchmarks.run and benchmarks.registry, which are not part of the installed package."""
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.run"), importlib.import_module("benchmarks.registry")
    sys.path.remove(str(ROOT))


def test_every_public_op_is_registered(bench):
    import dblocks.functional as F

    public = {name for name in F.__all__ if name[0].islower()}
    assert public == {op.name for op in bench[1].OPS} - {"adaln_rms"}


def test_every_peer_is_right(bench):
    run, registry = bench
    for op in registry.OPS:
        shape = (64, 8, 64) if op.random else SHAPE
        inputs = op.make(shape, torch.float32, CPU)
        assert run.wrong(op, op.ours, inputs) == ""
        assert run.wrong(op, op.eager, inputs) == ""


def test_a_wrong_output_gets_no_figure(bench, monkeypatch):
    run, registry = bench
    op = registry.OPS[0]._replace(ours=lambda **k: (registry.OPS[0].ours(**k)[0] + 1e-3,))
    monkeypatch.setattr(run, "peers_of", lambda op: {"dblocks": op.ours, "eager": op.eager})
    rows = run.measure(op, SHAPE, torch.float32, CPU, rounds=2)
    ours = [row for row in rows if row["peer"] == "dblocks"]
    assert len(ours) == 2
    assert all("over the budget" in row["wrong"] and "ms" not in row for row in ours)
    assert all(row["ms"] > 0 for row in rows if row["peer"] == "eager")
    assert "wrong: error" in run.table(rows)


def test_a_result_that_is_not_finite_is_wrong(bench):
    run, registry = bench
    op = registry.OPS[0]
    inputs = op.make(SHAPE, torch.float32, CPU)
    assert run.wrong(op, lambda **k: [torch.full(SHAPE, float("nan"))], inputs) == "not finite"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Inductor's own deprecations
def test_the_command_prints_a_table_and_writes_a_record(bench, monkeypatch, capsys, tmp_path):
    run, _ = bench
    arguments = ["run", "--op", "euler_step", "--shape", "2", "4", "16", "--rounds", "2", "--out"]
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path)])
    assert run.main() == 0
    assert "| euler_step | 2x4x16 | float32 | forward | torch.compile |" in capsys.readouterr().out
    record = json.loads((tmp_path / "ops-cpu.json").read_text())
    assert {"device", "torch", "triton", "commit"} <= record["environment"].keys()
    assert {row["peer"] for row in record["rows"]} == {"dblocks", "eager", "torch.compile"}
