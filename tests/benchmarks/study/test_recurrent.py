import dataclasses

import pytest
import torch

from benchmarks.study import experiment, recurrent, text
from benchmarks.study.__main__ import EXPERIMENTS
from benchmarks.study.archive import Archive
from benchmarks.study.recurrent import (
    BLOCK_LAYERS,
    END_TO_END_LAYERS,
    EXPERIMENT,
    SECONDS_RATIO,
    layers_per_character,
)
from benchmarks.study.text import SCORER
from dblocks.recipes import recurrent as recipe
from dblocks.recipes.costs import LayerCounter
from dblocks.recipes.records import train_to_record
from dblocks.sampling import generate

TINY = {"width": 16, "depth": 2, "heads": 2, "context": 40, "batch_size": 2, "points": 1}
RECURRENT = {"prelude": 1, "coda": 1, "mean_recurrence": 3, "backprop_depth": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The experiment with a network, a text and numbers of steps that take no time."""
    story = tmp_path / "story.txt"
    story.write_text("".join(f"{i} is followed by {i + 1}. " for i in range(60)))
    monkeypatch.setattr(text, "SCORER_FOLDER", tmp_path / "scorer")
    scorer = dataclasses.replace(SCORER, data=str(story), steps=2, **TINY | {"blocks": 1})
    monkeypatch.setattr(text, "SCORER", scorer)
    monkeypatch.setattr(recipe, "STEPS", (1, 4))
    monkeypatch.setattr(recipe, "SAMPLE_STEPS", 4)
    rows = {
        name: (title, dataclasses.replace(run, data=str(story), steps=2, **TINY, **RECURRENT))
        for name, (title, run) in EXPERIMENT.rows.items()
    }
    return dataclasses.replace(
        EXPERIMENT,
        rows=rows,
        lrs=(1e-3,),
        seeds=(0, 1),
        selection_shorter=dict.fromkeys(EXPERIMENT.selection_shorter, 1),
    )


def test_rows_are_equal_in_what_they_claim():
    longer, blocks, whole, shorter = (run for _, run in EXPERIMENT.rows.values())
    assert blocks == dataclasses.replace(whole, end_to_end=False)
    assert longer == dataclasses.replace(blocks, steps=longer.steps)
    assert shorter == dataclasses.replace(whole, steps=shorter.steps)
    assert longer.steps == pytest.approx(SECONDS_RATIO * whole.steps, abs=1)
    evaluations = longer.steps * BLOCK_LAYERS
    assert shorter.steps * END_TO_END_LAYERS == pytest.approx(evaluations, abs=END_TO_END_LAYERS)
    mean_draw = whole.mean_recurrence + 1
    assert whole.prelude + mean_draw * whole.depth + whole.coda == END_TO_END_LAYERS
    assert blocks.prelude + 2 * (blocks.depth + blocks.coda) - 1 == BLOCK_LAYERS
    assert EXPERIMENTS["recurrent-pydoc"] is EXPERIMENT


def test_every_row_has_a_learning_rate():
    assert {*EXPERIMENT.selection_shorter, *EXPERIMENT.rates_of} == {*EXPERIMENT.rows}
    assert {*EXPERIMENT.rates_of.values()} <= {*EXPERIMENT.selection_shorter}


@pytest.mark.parametrize("row", ["blocks", "end_to_end"])
@pytest.mark.parametrize("steps", [1, 4])
def test_layers_of_a_character_are_those_that_run(tiny, row, steps):
    run = tiny.rows[row][1]
    trainer = run.trainer()
    with LayerCounter(trainer.counted()) as counter:
        generate(trainer.trained, torch.ones(3, 5).long(), max_new_tokens=7, num_steps=steps)
    assert counter.count == 7 * layers_per_character({"run": run.to_dict()}, steps)


def test_results_writes_tables_and_figure(tmp_path, tiny, page):
    folder = tmp_path / "records"
    report = page("recurrent-pydoc")
    runs = {row: tiny.selection_runs(row) for row in tiny.selection_shorter}
    runs = {row: [*runs.get(row, []), *tiny.final_runs(row, 1e-3)] for row in tiny.rows}
    for path, run in experiment.jobs(folder, runs).items():
        train_to_record(run, path)
    tiny.results(folder, tmp_path / "figure.png", report)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    scores = Archive(folder).load()["scores"]["scores"]
    counts = {row: (1, 3, 4) if "end" in row else (1, 4) for row in tiny.rows}
    names = {f"{row}-seed{seed}-{n}" for row in tiny.rows for seed in (0, 1) for n in counts[row]}
    assert scores.keys() == names | {"reference"}
    lines = report.read_text().splitlines()
    bound = next(line for line in lines if "bound of denoising" in line)
    assert bound.split()[-2:] == ["-", "-"]  # end to end there are no Euler steps
    record = Archive(folder).load()[
        experiment.record_path(folder, "blocks", tiny.final_runs("blocks", 1e-3)[0]).stem
    ]
    assert f"Parameters {record['parameters']:,}" in " ".join(" ".join(lines).split())
    # The same windows with every number of steps: the bits, then the samples under the other model.
    # A block's Euler steps have samples, and no bits but with one.
    for n, spreads in ((1, [4, 4]), (4, [2, 4]), (32, [0, 0])):
        under = [line for line in lines if line.startswith(f"  {n} ")]
        assert [line.count("±") for line in under] == spreads
    assert "times the seconds of one of the longer block" in lines[-3]


@pytest.mark.parametrize(("seconds", "warned"), [(3.8, 0), (4.1, 0), (4.3, 1), (3.3, 1)])
def test_seconds_that_are_not_equal_are_told(monkeypatch, capsys, tmp_path, seconds, warned):
    monkeypatch.setattr(recurrent, "add_scores", lambda *_: None)

    def of(total, steps):
        return [{"seconds": total, "run": {"steps": steps}}]

    records = {"blocks_long": of(38, 38), "end_to_end": of(10 * seconds, 10)}
    recurrent.finish(tmp_path, records)
    assert capsys.readouterr().out.count("warning") == warned
