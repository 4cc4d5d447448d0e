"""A run that ended, or was interrupted, goes on to another number of steps."""

import dataclasses
import json
import shutil

import pytest

from dblocks.__main__ import main
from dblocks.recipes.vit import ViTRun

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = ("--batch-size", "8", "--width", "12", "--depth", "2", "--heads", "2", "--points", "1")
VIT = ("train", "vit", "--blocks", "2", *SIZES, "--checkpoint-every", "2")


def train(out, steps, *flags):
    return main([*VIT, "--steps", str(steps), "--out", str(out), *flags])


def record(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_finished_run_goes_on_with_the_rates_of_the_longer_one(tmp_path, capsys, monkeypatch):
    assert train(tmp_path, 6) == 0
    seen = []
    rate_at = ViTRun.lr_at
    monkeypatch.setattr(
        ViTRun, "lr_at", lambda run, step: seen.append((run.steps, step)) or rate_at(run, step)
    )
    capsys.readouterr()
    assert train(tmp_path, 10, "--resume") == 0
    run = ViTRun(steps=10)
    error = capsys.readouterr().err
    assert "warning: this run of 6 steps continues after step 6 to 10 steps" in error
    rates = rate_at(run, 6), rate_at(dataclasses.replace(run, steps=6), 6)
    assert f"begins with {rates[0]:.3g} instead of {rates[1]:.3g}" in error
    assert {step for steps, step in seen if steps == 10} == {6, 7, 8, 9}
    found = record(tmp_path)
    assert (found["run"]["steps"], found["continued"]) == (10, [[6, 6]])
    assert found["layer_evaluations"] == 10
    assert train(tmp_path, 10, "--resume") == 0  # again, which changes nothing
    assert record(tmp_path)["continued"] == [[6, 6]]
    capsys.readouterr()
    assert train(tmp_path, 8, "--resume") == 2
    assert "--steps must be at least 10, the steps of the checkpoint" in capsys.readouterr().err
    assert train(tmp_path, 12, "--resume", "--lr", "0.5") == 2
    error = capsys.readouterr().err
    assert "run.lr was 0.001 and is 0.5" in error
    assert "run.steps" not in error


@pytest.mark.filterwarnings("error")
def test_a_constant_rate_goes_on_as_it_is_in_every_job(tmp_path, capsys):
    constant = ("--decay", "constant", "--warmup", "0")
    assert train(tmp_path / "once", 8, *constant, "--shared", "private") == 0
    for block in ("0", "1"):
        for steps in (4, 8):
            assert train(tmp_path / "jobs", steps, *constant, "--block", block, "--resume") == 0
    assert "warning" not in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "merged"), str(tmp_path / "jobs")]) == 0
    said = f"Measure it: dblocks eval vit --checkpoint {tmp_path / 'merged'} --data digits\n"
    assert capsys.readouterr().out.endswith(said)
    files = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("merged", "once")]
    assert files[0] == files[1]
    runs = [part["run"] for part in record(tmp_path / "merged")["merged"]]
    assert [run["continued"] for run in runs] == [[[4, 4]], [[4, 4]]]


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize(("warmup", "steps", "warns"), [("0.2", 8, True), ("0.1", 8, False)])
def test_a_warm_up_that_would_have_been_longer_is_told(tmp_path, capsys, warmup, steps, warns):
    """Of 4 steps both warm up in 1; of 8 steps a fifth is 2."""
    constant = ("--decay", "constant", "--warmup", warmup)
    assert train(tmp_path, 4, *constant) == 0
    assert train(tmp_path, steps, *constant, "--resume") == 0
    assert ("has another warm-up" in capsys.readouterr().err) == warns


@pytest.mark.filterwarnings("ignore:this run of .* steps continues")
@pytest.mark.parametrize("shared", ["train", "reduce"])
def test_a_run_may_end_with_the_step_of_its_checkpoint(tmp_path, shared):
    flags = ("--shared", shared, "--decay", "constant", "--warmup", "0")
    assert train(tmp_path / "six", 6, *flags, "--keep", "9") == 0
    assert train(tmp_path / "four", 4, *flags) == 0
    shutil.rmtree(tmp_path / "six/checkpoints/step-00000006")
    assert train(tmp_path / "six", 4, *flags, "--resume") == 0
    records = [record(tmp_path / name) for name in ("six", "four")]
    for key in ("curve", "accuracy", "layers_per_step"):
        assert records[0][key] == records[1][key]
    files = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("six", "four")]
    assert files[0] == files[1]
