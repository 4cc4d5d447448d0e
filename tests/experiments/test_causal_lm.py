import dataclasses

import pytest

from dblocks.experiments import _base, _text
from dblocks.experiments.__main__ import EXPERIMENTS
from dblocks.experiments._text import SCORER
from dblocks.experiments.causal_lm import EXPERIMENT
from dblocks.recipes._text import PROMPT
from dblocks.records import read_record, train_to_record

TINY = {"width": 16, "depth": 3, "heads": 2, "context": 40, "batch_size": 2, "points": 1}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The experiment with a network, a text and numbers of steps that take no time."""
    story = tmp_path / "story.txt"
    story.write_text("".join(f"{i} is followed by {i + 1}. " for i in range(60)))
    monkeypatch.setattr(_text, "SCORER_FOLDER", tmp_path / "scorer")
    scorer = dataclasses.replace(SCORER, data=str(story), steps=2, **TINY)
    monkeypatch.setattr(_text, "SCORER", scorer)
    rows = {
        name: (title, dataclasses.replace(run, data=str(story), steps=run.steps // 500, **TINY))
        for name, (title, run) in EXPERIMENT.rows.items()
    }
    return dataclasses.replace(
        EXPERIMENT, rows=rows, lrs=(1e-3,), seeds=(0, 1), selection_shorter=dict.fromkeys(rows, 1)
    )


def run_all(experiment, folder):
    runs = {r: [*experiment.selection_runs(r), *experiment.final_runs(r, 1e-3)]
            for r in experiment.rows}  # fmt: skip
    for path, run in _base.jobs(folder, runs).items():
        train_to_record(run, path)


def test_rows_are_equal_in_what_they_claim():
    blocks, whole, longer = (run for _, run in EXPERIMENT.rows.values())
    each = blocks.depth // blocks.blocks
    assert whole.steps * whole.depth == blocks.steps * (2 * each - 1)
    assert longer.steps * longer.batch_size == blocks.steps * blocks.batch_size
    for field in ("batch_size", "width", "depth", "heads", "context", "clip", "weight_decay"):
        assert getattr(whole, field) == getattr(blocks, field) == getattr(longer, field)
    assert EXPERIMENTS["causal-lm-pydoc"] is EXPERIMENT


def test_the_scoring_model_is_the_longest_row_from_a_seed_of_its_own():
    _, longest = EXPERIMENT.rows["end_to_end_long"]
    assert dataclasses.replace(SCORER, seed=0, lr=longest.lr) == longest
    assert SCORER.seed not in {*EXPERIMENT.seeds, _base.SELECTION_SEED}


def test_curves_say_what_part_of_the_text_they_are_of():
    old, new = {"curve": [{"bits": 2.0}]}, {"curve": [{"bits": 2.0, "windows": 32}]}
    first, spread = "first 2,100 held-out characters", "32 held-out windows"
    for records, part in (
        ([old, old], first),
        ([new], spread),
        ([old, new], f"{spread} or {first}"),
    ):
        label = _text.next_token_measure({"row": records}).label
        assert label == f"bits a character, {part}"


def test_results_writes_table_and_figure_and_keeps_the_scores(
    tmp_path, tiny, monkeypatch, capsys, pages
):
    folder = tmp_path / "records"
    readme, report = pages("causal-lm-pydoc")
    run_all(tiny, folder)
    tiny.results(folder, tmp_path / "figure.png", readme)
    short, text = readme.read_text(), report.read_text()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    stored = read_record(folder / "scores.json")
    names = {f"blocks-seed{s}-{n}" for s in (0, 1) for n in (1, 3)}
    names |= {f"{row}-seed{s}-plain" for row in ("end_to_end", "end_to_end_long") for s in (0, 1)}
    assert stored["scores"].keys() == names | {"reference"}
    for score in stored["scores"].values():
        assert score["bits"] >= 0
        assert all(0 <= score[key] <= 1 for key in ("divergence", "known", "repetition"))
    reference = stored["scores"]["reference"]
    assert reference["known"] == 1  # it is a part of the held-out text
    assert f"the held-out text in its place {reference['bits']:.2f}" in text
    bound = next(line for line in text.splitlines() if "all blocks (bound)" in line)
    assert bound.split()[-2:] == ["-", "-"]  # end to end there are no denoising steps
    assert short.count("\n| end to end") == 2
    # Nothing is trained or scored a second time.
    monkeypatch.setattr(_text, "train", None)
    monkeypatch.setattr(_text, "_bits_under", None)
    tiny.results(folder, tmp_path / "figure.png", readme)
    assert (readme.read_text(), report.read_text()) == (short, text)
    assert capsys.readouterr().out.count("training the model that scores samples") == 1


def test_other_samples_are_scored_again_by_the_same_model(tmp_path, tiny, monkeypatch):
    folder = tmp_path / "records"
    run_all(dataclasses.replace(tiny, rows={"end_to_end": tiny.rows["end_to_end"]}), folder)
    path = _base.record_path(folder, "end_to_end", tiny.final_runs("end_to_end", 1e-3)[0])
    record = read_record(path)
    _text.add_scores(folder, {"end_to_end": [record]})
    before = record["scores"]["plain"]
    monkeypatch.setattr(_text, "train", None)
    length = record["run"]["context"] - PROMPT
    record["samples_written"]["plain"] = ["1" * length] * len(record["samples_written"]["plain"])
    _text.add_scores(folder, {"end_to_end": [record]})
    after = record["scores"]["plain"]
    assert after["repetition"] == pytest.approx(1 - 1 / (length - _text.REPEATED + 1))
    assert after["bits"] != before["bits"]
