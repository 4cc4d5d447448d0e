import dataclasses

import pytest

from benchmarks.study import experiment
from benchmarks.study import text as scoring
from benchmarks.study.__main__ import EXPERIMENTS, comparison
from benchmarks.study.archive import Archive
from benchmarks.study.causal_lm import (
    COLUMNS,
    EXPERIMENT,
    caption,
    euler_samples,
    main_samples,
    temperature,
)
from benchmarks.study.pages import text_tables
from benchmarks.study.text import SCORER
from dblocks.recipes import causal_lm
from dblocks.recipes.columns import SAMPLES
from dblocks.recipes.records import read_record, train_to_record
from dblocks.recipes.text_run import PROMPT

TINY = {"width": 16, "depth": 3, "heads": 2, "context": 40, "batch_size": 2, "points": 1}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The experiment with a network, a text and numbers of steps that take no time."""
    story = tmp_path / "story.txt"
    story.write_text("".join(f"{i} is followed by {i + 1}. " for i in range(60)))
    monkeypatch.setattr(scoring, "SCORER_FOLDER", tmp_path / "scorer")
    scorer = dataclasses.replace(SCORER, data=str(story), steps=2, **TINY)
    monkeypatch.setattr(scoring, "SCORER", scorer)
    rows = {
        name: (title, dataclasses.replace(run, data=str(story), steps=run.steps // 500, **TINY))
        for name, (title, run) in EXPERIMENT.rows.items()
    }
    monkeypatch.setattr(causal_lm, "TEMPERATURES", (0.7, 1.0))
    shorter = dict.fromkeys(EXPERIMENT.selection_shorter, 1)
    return dataclasses.replace(
        EXPERIMENT, rows=rows, lrs=(1e-3,), seeds=(0, 1), selection_shorter=shorter
    )


def run_all(study, folder):
    chosen = study.selection_shorter
    runs = {row: study.selection_runs(row) if row in chosen else [] for row in study.rows}
    runs = {row: [*runs[row], *study.final_runs(row, 1e-3)] for row in study.rows}
    for path, run in experiment.jobs(folder, runs).items():
        train_to_record(run, path)


def test_rows_are_equal_in_what_they_claim():
    blocks, ensemble, published, small, whole, longer = (run for _, run in EXPERIMENT.rows.values())
    each = blocks.depth // blocks.blocks
    assert whole.steps * whole.depth == blocks.steps * each == small.steps * small.depth
    assert published.steps * (2 * each - 1) == whole.steps * whole.depth
    assert ensemble == dataclasses.replace(blocks, top_share=1.0)
    assert longer.steps * longer.batch_size == blocks.steps * blocks.batch_size
    for field in ("batch_size", "width", "heads", "context", "clip", "weight_decay", "data"):
        assert len({getattr(run, field) for _, run in EXPERIMENT.rows.values()}) == 1
    assert {run.depth for run in (blocks, ensemble, published, whole, longer)} == {12}
    assert {*EXPERIMENT.selection_shorter, *EXPERIMENT.rates_of} == {*EXPERIMENT.rows}
    assert EXPERIMENTS["causal-lm-pydoc"] is EXPERIMENT


def test_the_scoring_model_is_plain_and_of_a_seed_of_its_own():
    _, whole = EXPERIMENT.rows["end_to_end"]
    assert dataclasses.replace(SCORER, seed=0, lr=whole.lr, steps=whole.steps) == whole
    assert SCORER.seed not in {*EXPERIMENT.seeds, experiment.SELECTION_SEED}


def test_samples_are_those_nearest_to_the_text_and_the_temperature_is_told():
    scores = {"reference": {"bits": 1.5}, "3@1": {"bits": 1.5}, "1@1": {"bits": 1.5}}
    scores |= {f"product@{t:g}": {"bits": 1.2 + t / 2} for t in (0.7, 0.85, 1.0)}
    blocks = {"run": {"end_to_end": False, "blocks": 3}, "scores": scores}
    assert main_samples(blocks) == "product@0.7"
    assert temperature(blocks) == 0.7
    scores["reference"] = {"bits": 1.62}
    assert main_samples(blocks) == "product@0.85"
    published = {"run": blocks["run"], "scores": {"3@1": {"bits": 2.0}, "1@1": {"bits": 1.62}}}
    assert main_samples(published) == euler_samples(published) == "3@1"
    plain = {"run": {"end_to_end": True}, "scores": {**scores, "plain@1": {"bits": 3.0}}}
    assert main_samples(plain) == "plain@1"
    assert euler_samples(plain) is None


def test_rows_without_scores_show_what_was_measured():
    found = comparison("causal-lm-gcide")
    bare = {
        title: [{key: value for key, value in r.items() if key != "scores"} for r in records]
        for title, records in found.rows.items()
    }
    assert {"3 blocks", "end to end"} <= bare.keys()
    (table,) = text_tables(bare, COLUMNS)
    lines = {line[:54].strip(): line[54:].split() for line in table.splitlines()}
    measured = sum(r["bits"] for r in bare["end to end"]) / len(bare["end to end"])
    assert f"{measured:.3f}" in lines["Bits per character, next token"]
    assert {*lines["Samples: bits per character under another model"]} == {"-"}
    said = caption(bare)
    assert said.endswith(f"Samples are not scored yet of: {'; '.join(bare)}.")
    assert "samples have" not in said
    # One row with scores: the held-out text's are told, and the other rows are named.
    pydoc = comparison("causal-lm-pydoc").rows
    known = {"3 blocks": pydoc["3 blocks"], "bare": bare["end to end"]}
    own = pydoc["3 blocks"][0]["scores"]["reference"]["bits"]
    assert f"own ({own:.2f}, " in caption(known)
    assert caption(known).endswith("Samples are not scored yet of: bare.")


def test_curves_say_what_part_of_the_text_they_are_of():
    old, new = {"curve": [{"bits": 2.0}]}, {"curve": [{"bits": 2.0, "windows": 32}]}
    first, spread = "first 2,100 held-out characters", "32 held-out windows"
    for records, part in (
        ([old, old], first),
        ([new], spread),
        ([old, new], f"{spread} or {first}"),
    ):
        label = scoring.next_token_measure({"row": records}).label
        assert label == f"bits per character, {part}"


def test_results_writes_table_and_figure_and_keeps_the_scores(
    tmp_path, tiny, monkeypatch, capsys, page
):
    folder = tmp_path / "records"
    report = page("causal-lm-pydoc")
    run_all(tiny, folder)
    tiny.results(folder, tmp_path / "figure.png", report)
    text = report.read_text()
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    stored = Archive(folder).load()["scores"]
    kinds = {row: ["product@0.7", "product@1", "1@1", "3@1"] for row in ("blocks", "ensemble")}
    kinds |= {row: ["plain@0.7", "plain@1"] for row in tiny.rows if row not in kinds}
    kinds["published"] = ["1@1", "3@1"]
    names = {f"{row}-seed{s}-{n}" for row in tiny.rows for s in (0, 1) for n in kinds[row]}
    assert stored["scores"].keys() == names | {"reference"}
    for score in stored["scores"].values():
        assert score["bits"] >= 0
        assert all(0 <= score[key] <= 1 for key in ("divergence", "known", "repetition"))
    reference = stored["scores"]["reference"]
    assert reference["known"] == 1  # it is a part of the held-out text
    assert f"the held-out text's own ({reference['bits']:.2f}" in text
    for head, count in (("bound of all blocks", 3), ("product of all blocks", 2)):
        line = next(line for line in text.splitlines() if head in line)
        # Plain models have neither, and blocks that never saw sigma_max have no product.
        assert line.count("±") == count
        assert line.split()[-3:] == ["-", "-", "-"]
    # Nothing is trained or scored a second time.
    monkeypatch.setattr(scoring, "train", None)
    monkeypatch.setattr(scoring, "_bits_under", None)
    tiny.results(folder, tmp_path / "figure.png", report)
    assert report.read_text() == text
    assert capsys.readouterr().out.count("training the model that scores samples") == 1


def test_other_samples_are_scored_again_by_the_same_model(tmp_path, tiny, monkeypatch):
    folder = tmp_path / "records"
    run_all(dataclasses.replace(tiny, rows={"end_to_end": tiny.rows["end_to_end"]}), folder)
    path = experiment.record_path(folder, "end_to_end", tiny.final_runs("end_to_end", 1e-3)[0])
    record = read_record(path)
    scoring.add_scores(folder, {"end_to_end": [record]}, main_samples)
    before = record["scores"]["plain@1"]
    monkeypatch.setattr(scoring, "train", None)
    length = record["run"]["context"] - PROMPT
    record["samples_written"]["plain@1"] = ["1" * length] * SAMPLES
    scoring.add_scores(folder, {"end_to_end": [record]}, main_samples)
    after = record["scores"]["plain@1"]
    assert after["repetition"] == pytest.approx(1 - 1 / (length - scoring.REPEATED + 1))
    assert after["bits"] != before["bits"]
