import dataclasses

import pytest

from dblocks.experiments import _base, _text, recurrent
from dblocks.experiments.__main__ import EXPERIMENTS
from dblocks.experiments._text import SCORER
from dblocks.experiments.recurrent import EXPERIMENT, SECONDS_RATIO
from dblocks.recipes import recurrent as recipe
from dblocks.records import read_record, train_to_record

TINY = {"width": 16, "depth": 2, "heads": 2, "context": 40, "batch_size": 2, "points": 1}
RECURRENT = {"prelude": 1, "coda": 1, "mean_recurrence": 3, "backprop_depth": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The experiment with a network, a text and numbers of steps that take no time."""
    story = tmp_path / "story.txt"
    story.write_text("".join(f"{i} is followed by {i + 1}. " for i in range(60)))
    monkeypatch.setattr(_text, "SCORER_FOLDER", tmp_path / "scorer")
    scorer = dataclasses.replace(SCORER, data=str(story), steps=2, **TINY | {"blocks": 1})
    monkeypatch.setattr(_text, "SCORER", scorer)
    for module in (recipe, recurrent):
        monkeypatch.setattr(module, "STEPS", (1, 3))
        monkeypatch.setattr(module, "SAMPLE_STEPS", 3)
    rows = {
        name: (title, dataclasses.replace(run, data=str(story), steps=2, **TINY, **RECURRENT))
        for name, (title, run) in EXPERIMENT.rows.items()
    }
    return dataclasses.replace(
        EXPERIMENT, rows=rows, lrs=(1e-3,), seeds=(0, 1), selection_shorter=dict.fromkeys(rows, 1)
    )


def test_rows_are_equal_in_what_they_claim():
    longer, blocks, whole = (run for _, run in EXPERIMENT.rows.values())
    assert blocks == dataclasses.replace(whole, end_to_end=False)
    assert longer == dataclasses.replace(blocks, steps=longer.steps)
    assert longer.steps == pytest.approx(SECONDS_RATIO * whole.steps, abs=1)
    assert EXPERIMENTS["recurrent-pydoc"] is EXPERIMENT


def test_results_writes_tables_and_figure(tmp_path, tiny, pages):
    folder = tmp_path / "records"
    readme, report = pages("recurrent-pydoc")
    for row in tiny.rows:
        runs = {row: [*tiny.selection_runs(row), *tiny.final_runs(row, 1e-3)]}
        for path, run in _base.jobs(folder, runs).items():
            train_to_record(run, path)
    tiny.results(folder, tmp_path / "figure.png", readme)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    scores = read_record(folder / "scores.json")["scores"]
    names = {f"{row}-seed{seed}-{n}" for row in tiny.rows for seed in (0, 1) for n in (1, 3)}
    assert scores.keys() == names | {"reference"}
    text = report.read_text()
    bound = next(line for line in text.splitlines() if "(bound)" in line)
    assert bound.split()[-1] == "-"  # end to end there are no Euler steps
    assert readme.read_text().count("\n| end to end") == 1
    assert "With 1, 3 Euler steps or recurrences" in text
