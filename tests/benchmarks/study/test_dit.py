import dataclasses
import functools

import pytest

from benchmarks.study import experiment
from benchmarks.study.__main__ import EXPERIMENTS
from benchmarks.study.dit import EXPERIMENT, LRS
from dblocks.recipes import dit as recipe
from dblocks.recipes.metrics.judge import train_judge
from dblocks.recipes.records import train_to_record

TINY = {"width": 8, "depth": 6, "heads": 2, "patch_size": 4, "batch_size": 16, "points": 1}
TINY |= {"samples": 50, "sampling_steps": 6, "steps": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(monkeypatch):
    """The experiment with a network and numbers of steps that take no time."""
    monkeypatch.setattr(recipe, "judge_of", functools.partial(train_judge, steps=2))
    rows = {
        name: (title, dataclasses.replace(run, **TINY))
        for name, (title, run) in EXPERIMENT.rows.items()
    }
    return dataclasses.replace(
        EXPERIMENT,
        rows=rows,
        lrs=(1e-3,),
        seeds=(0,),
        selection_shorter={"end_to_end": 1},
        rates_of=dict.fromkeys(rows, "end_to_end"),
    )


def test_rows_are_equal_in_what_they_claim():
    runs = {name: run for name, (_, run) in EXPERIMENT.rows.items()}
    whole, longer = runs["end_to_end"], runs["end_to_end_long"]
    for number in (2, 3, 4, 6):
        blocks = runs[f"blocks_{number}"]
        assert blocks.blocks == number
        assert blocks.steps * blocks.depth == number * whole.steps * whole.depth
        assert blocks == dataclasses.replace(
            whole, blocks=number, steps=blocks.steps, end_to_end=False
        )
    assert longer == dataclasses.replace(whole, steps=runs["blocks_3"].steps)
    assert EXPERIMENTS["dit-digits"] is EXPERIMENT


def test_selection_never_uses_the_held_out_part_or_a_final_seed():
    chosen = EXPERIMENT.selection_shorter
    assert chosen.keys() | EXPERIMENT.rates_of.keys() == EXPERIMENT.rows.keys()
    assert not chosen.keys() & EXPERIMENT.rates_of.keys()
    for row in chosen:
        runs = EXPERIMENT.selection_runs(row)
        assert [run.lr for run in runs] == list(LRS)
        assert {run.part for run in runs} == {"selection"}
        assert not {run.seed for run in runs} & set(EXPERIMENT.seeds)


def test_results_writes_tables_and_a_grid_from_the_records(tmp_path, tiny, page, monkeypatch):
    folder = tmp_path / "records"
    report = page("dit-digits")
    runs = {row: tiny.final_runs(row, 1e-3) for row in tiny.rows}
    runs["end_to_end"] += tiny.selection_runs("end_to_end")
    for path, run in experiment.jobs(folder, runs).items():
        train_to_record(run, path)

    def refuse(*_, **__):
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr(experiment, "ProcessPoolExecutor", refuse)
    tiny.results(folder, tmp_path / "figure.png", report)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    text = report.read_text()
    evaluations = next(line for line in text.splitlines() if "Layer evaluations per image" in line)
    assert evaluations.split()[4] == "72"  # 6 steps of 6 layers, twice for guidance
    calls = next(line for line in text.splitlines() if "Calls of each block" in line)
    assert calls.split()[-6:] == ["12", "6/6", "4/4/4", "4/2/2/4", "2/2/2/2/2/2", "12"]
    assert "Fréchet distance, unguided" in text
    assert "is the best of {0.002, 0.004, 0.008, 0.016}" in text


def test_a_record_is_small(tmp_path, tiny):
    run = tiny.final_runs("blocks_3", 1e-3)[0]
    train_to_record(run, tmp_path / "a.json")
    assert (tmp_path / "a.json").stat().st_size < 16_000


def test_headline():
    assert EXPERIMENT.headline({"loss": 0.43214}) == "loss 0.4321"
