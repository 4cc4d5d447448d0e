import dataclasses

import pytest
import torch

from benchmarks.study import experiment, text
from benchmarks.study.__main__ import EXPERIMENTS
from benchmarks.study.archive import Archive
from benchmarks.study.recurrent import (
    BLOCK_LAYERS,
    END_TO_END_LAYERS,
    EXPERIMENT,
    PUBLISHED_LAYERS,
    PUBLISHED_RATIO,
    SECONDS_RATIO,
    layers_per_character,
)
from benchmarks.study.text import SCORER
from dblocks.recipes import recurrent as recipe
from dblocks.recipes.autoregressive import PUBLISHED
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
    runs = {name: run for name, (_, run) in EXPERIMENT.rows.items()}
    whole, shorter = runs["end_to_end"], runs["end_to_end_short"]
    recipe_run = dataclasses.replace(whole, end_to_end=False)
    assert runs["published"] == dataclasses.replace(recipe_run, **PUBLISHED)
    assert shorter == dataclasses.replace(whole, steps=shorter.steps)
    for name, like, ratio in (
        ("blocks", recipe_run, SECONDS_RATIO),
        ("published", runs["published"], PUBLISHED_RATIO),
    ):
        longer = runs[f"{name}_long"]
        assert longer == dataclasses.replace(like, steps=longer.steps)
        assert runs[name] == dataclasses.replace(like, steps=runs[name].steps)
        assert longer.steps == pytest.approx(ratio * whole.steps, abs=1)
    evaluations = {
        "blocks": runs["blocks"].steps * BLOCK_LAYERS,
        "blocks_long": runs["blocks_long"].steps * BLOCK_LAYERS,
        "published": runs["published"].steps * PUBLISHED_LAYERS,
        "published_long": runs["published_long"].steps * PUBLISHED_LAYERS,
        "end_to_end": whole.steps * END_TO_END_LAYERS,
        "end_to_end_short": shorter.steps * END_TO_END_LAYERS,
    }
    assert evaluations["blocks"] == evaluations["published"]
    assert evaluations["blocks"] == pytest.approx(evaluations["end_to_end"] / 10, rel=0.05)
    for name in ("blocks_long", "published_long"):
        assert evaluations["end_to_end_short"] == pytest.approx(evaluations[name], rel=0.05)
    mean_draw = whole.mean_recurrence + 1
    assert whole.prelude + mean_draw * whole.depth + whole.coda == END_TO_END_LAYERS
    layers = whole.depth + whole.coda
    assert whole.prelude + layers == BLOCK_LAYERS
    assert whole.prelude + 2 * layers - 1 == PUBLISHED_LAYERS
    assert EXPERIMENTS["recurrent-pydoc"] is EXPERIMENT


def test_every_row_has_a_learning_rate():
    assert {*EXPERIMENT.selection_shorter, *EXPERIMENT.rates_of} == {*EXPERIMENT.rows}
    assert {*EXPERIMENT.rates_of.values()} <= {*EXPERIMENT.selection_shorter}


@pytest.mark.parametrize("row", ["blocks", "published", "end_to_end"])
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
    for n, spreads in ((1, [6, 6]), (4, [2, 6]), (32, [0, 0])):
        under = [line for line in lines if line.startswith(f"  {n} ")]
        assert [line.count("±") for line in under] == spreads
    assert "a step end to end takes 6 times as long as one of the block" in lines[-3]
