import dataclasses

import pytest

from benchmarks.study import experiment, text
from benchmarks.study.__main__ import EXPERIMENTS
from benchmarks.study.archive import Archive
from benchmarks.study.masked_lm import EXPERIMENT
from benchmarks.study.text import SCORER
from dblocks.recipes.columns import layers_per_sample
from dblocks.recipes.masked_lm import SAMPLED
from dblocks.recipes.records import train_to_record

TINY = {"width": 16, "depth": 3, "heads": 2, "context": 40, "batch_size": 2, "points": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The experiment with a network, a text and numbers of steps that take no time."""
    story = tmp_path / "story.txt"
    story.write_text("".join(f"{i} is followed by {i + 1}. " for i in range(60)))
    monkeypatch.setattr(text, "SCORER_FOLDER", tmp_path / "scorer")
    monkeypatch.setattr(
        text, "SCORER", dataclasses.replace(SCORER, data=str(story), steps=2, **TINY)
    )
    rows = {
        name: (title, dataclasses.replace(run, data=str(story), steps=2, **TINY))
        for name, (title, run) in EXPERIMENT.rows.items()
    }
    return dataclasses.replace(
        EXPERIMENT,
        rows=rows,
        lrs=(1e-3,),
        seeds=(0, 1),
        selection_shorter=dict.fromkeys(rows, 1),
        rates_of={},
    )


def test_rows_are_equal_in_what_they_claim():
    blocks, whole, longer = (run for _, run in EXPERIMENT.rows.values())
    assert whole.steps * whole.depth == blocks.steps * blocks.depth // blocks.blocks
    assert longer == dataclasses.replace(blocks, end_to_end=True)
    assert longer == dataclasses.replace(whole, steps=longer.steps)
    assert EXPERIMENTS["masked-lm-pydoc"] is EXPERIMENT


def test_results_writes_tables_and_figure(tmp_path, tiny, pages):
    folder = tmp_path / "records"
    readme, report = pages("masked-lm-pydoc")
    for row in tiny.rows:
        runs = {row: [*tiny.selection_runs(row), *tiny.final_runs(row, 1e-3)]}
        for path, run in experiment.jobs(folder, runs).items():
            train_to_record(run, path)
    tiny.results(folder, tmp_path / "figure.png", readme)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    scores = Archive(folder).load()["scores"]["scores"]
    names = {f"{row}-seed{seed}-{SAMPLED}" for row in tiny.rows for seed in (0, 1)}
    assert scores.keys() == names | {"reference"}
    assert "| end to end |" in readme.read_text()
    assert f"{scores['reference']['bits']:.2f}" in report.read_text()


def test_layers_of_a_sample_are_counted_in_rows():
    run = {"depth": 12, "blocks": 3, "end_to_end": False}
    assert layers_per_sample({"run": run, "rows": [64, 64, 32]}) == 5 * 4
    assert layers_per_sample({"run": {**run, "end_to_end": True}, "rows": [32]}) == 12
