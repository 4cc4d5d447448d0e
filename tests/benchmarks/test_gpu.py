"""`python -m benchmarks.gpu`, dry: every part in the interpreter, its figures marked as none."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tools import ROOT


def run(tmp_path, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), *arguments],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    file = tmp_path / "gpu.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return done, [json.loads(line, parse_constant=pytest.fail) for line in lines]


@pytest.mark.slow
def test_every_part_but_the_compiler_s_runs_dry(tmp_path):
    parts = ("ceilings", "adaln", "attention", "diffusion", "small", "flex", "tests")
    chosen = [word for part in parts for word in ("--part", part)]
    done, rows = run(tmp_path, "--dry", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(row["dry"] for row in rows)
    assert rows[0]["part"] == "environment"
    assert {"commit", "torch", "triton", "device"} <= rows[0].keys()
    assert [row["part"] for row in rows if row.get("done")] == ["environment", *parts]
    shares = [v for row in rows for k, v in row.items() if k.endswith(("_of_copy", "_tflops"))]
    assert len(shares) > 20
    assert set(shares) == {None}
    assert all(row["repeats"] for row in rows if "repeats" in row)
    errors = [v for row in rows for k, v in row.items() if k.startswith(("err_", "diff_"))]
    assert len(errors) > 10
    assert max(errors) < 1e-5
    assert "collected" in rows[-2]["last"]


def test_what_the_budget_does_not_allow_is_named(tmp_path):
    done, rows = run(tmp_path, "--dry", "--budget", "0")
    assert done.returncode == 0, done.stderr
    assert {"adaln", "attention", "tests"} <= {row["part"] for row in rows}
    assert {row["skipped"] for row in rows} == {"the budget of 0 s is spent"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_does_not_start(tmp_path):
    done, rows = run(tmp_path)
    assert done.returncode == 2
    assert "--dry" in done.stderr
    assert rows == []
