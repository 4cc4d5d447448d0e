"""The report: what records say, and a page of the committed ones."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.study import __main__ as command
from benchmarks.study import vit
from benchmarks.study.__main__ import EXPERIMENTS, STUDIES, comparison, comparisons, main
from benchmarks.study.experiment import Experiment, record_path
from benchmarks.study.quality import ACCURACY, BITS
from benchmarks.study.report.documents import _measures, of_experiment
from benchmarks.study.report.findings import findings, sentences
from benchmarks.study.report.finished import check_versions, finished
from benchmarks.study.report.markdown import study_block
from benchmarks.study.report.page import write_page
from dblocks.recipes.records import write_record

ENVIRONMENT = {"dblocks": "0.2.0", "torch": "2.13.0+cpu", "commit": "abc", "device": "x"}
COSTS = {"seconds": 60.0, "layer_evaluations": 120, "activations_mib": 2.0, "state_mib": 1.0}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """A comparison of three rows, without records yet."""
    monkeypatch.chdir(tmp_path)
    rows = {row: vit.CLOTHES[row] for row in ("blocks", "small", "end_to_end")}
    return dataclasses.replace(
        vit.FASHION, name="little", rows=rows, lrs=(1e-3,), rates_of={},
        selection_shorter=dict.fromkeys(rows, 2), seeds=(0, 1, 2),
    )  # fmt: skip


def write(experiment: Experiment, row: str, accuracies, *, selection=True, **other):
    if selection:
        (run,) = experiment.selection_runs(row)
        value = {"format": 1, "run": run.to_dict(), "accuracy": 0.5, "environment": ENVIRONMENT}
        write_record(record_path(experiment.records, row, run), value)
    runs = experiment.final_runs(row, 1e-3)
    for run, found in zip(runs, accuracies, strict=False):
        value = {"format": 1, "run": run.to_dict(), "accuracy": found, "environment": ENVIRONMENT}
        write_record(record_path(experiment.records, row, run), {**value, **COSTS, **other})


def test_rows_without_records_are_listed_with_their_predicted_hours(experiment):
    write(experiment, "end_to_end", [0.8, 0.81, 0.82])
    write(experiment, "blocks", [], selection=True)
    found = finished(experiment)
    assert list(found.records) == ["end_to_end"]
    # The rate is chosen: three finals of 3,000 steps of 4 layers, half a second a layer.
    blocks, small = found.missing
    assert blocks.runs == 3
    assert blocks.hours == pytest.approx(3 * 3000 * 4 * 0.5 / 3600)
    # The rate is not: one more.
    assert small.runs == 4


def test_differences_are_paired_by_seed(experiment):
    write(experiment, "end_to_end", [0.70, 0.80, 0.90])
    write(experiment, "blocks", [0.72, 0.82, 0.92], activations_mib=1.0)
    write(experiment, "small", [0.5, 0.9, 0.8])
    blocks, small = findings(finished(experiment))
    assert blocks.difference.mean == pytest.approx(2.0)
    assert blocks.activations == 0.5
    assert blocks.verdict(ACCURACY) == "better"
    assert small.verdict(ACCURACY) == "not told apart"
    assert blocks.verdict(BITS) == "worse"  # where lower is better


def test_one_seed_gives_no_verdict(experiment):
    write(experiment, "end_to_end", [0.8])
    write(experiment, "blocks", [0.6])
    found = finished(experiment)
    (blocks,) = findings(found)
    assert blocks.verdict(ACCURACY) == "one seed: no interval"
    assert (
        "held-out accuracy lower by 20.0 points in its only seed (no interval)"
        in sentences(found, [blocks])[0]
    )


@pytest.fixture
def with_ensemble(experiment):
    rows = {**experiment.rows, "ensemble": vit.CLOTHES["ensemble"]}
    return dataclasses.replace(experiment, rows=rows, selection_shorter=dict.fromkeys(rows, 2))


def said_of(experiment, **accuracies):
    """The sentences about records with these accuracies, by row."""
    for row, values in accuracies.items():
        write(experiment, row, values)
    found = finished(experiment)
    return sentences(found, findings(found))


def test_a_method_that_loses_is_said_to_lose_and_so_is_depth(experiment):
    said = " ".join(
        said_of(
            experiment,
            end_to_end=[0.80, 0.81, 0.82],
            blocks=[0.70, 0.71, 0.72],
            small=[0.90, 0.91, 0.92],
        )
    )
    assert "held-out accuracy worse by 10.0 points" in said
    assert "Depth does not pay" in said


def test_blocks_that_lose_to_a_plain_network_and_to_an_ensemble_are_said_to(with_ensemble):
    said = said_of(
        with_ensemble,
        end_to_end=[0.80, 0.81, 0.82],
        small=[0.70, 0.71, 0.72],
        blocks=[0.60, 0.61, 0.62],
        ensemble=[0.65, 0.66, 0.67],
    )
    assert any(s.startswith("Depth pays at this budget") for s in said)
    beside = "3 blocks, beside a plain ViT of 4 layers: held-out accuracy worse by 10.0 points"
    assert any(s.startswith(beside) for s in said)
    assert any("worse by 5.0 points" in s and "the noise costs quality" in s for s in said)
    assert all("Blocks" not in s or "helps" not in s for s in said)


def test_words_follow_the_interval_not_the_mean(with_ensemble):
    said = " ".join(
        said_of(
            with_ensemble,
            end_to_end=[0.80, 0.80, 0.80],
            small=[0.79, 0.82, 0.80],
            blocks=[0.80, 0.83, 0.78],
            ensemble=[0.81, 0.80, 0.81],
        )
    )
    assert "Whether depth pays at this budget is not shown" in said
    assert "whether the noise brings anything is not shown" in said
    write(with_ensemble, "ensemble", [0.70, 0.73, 0.68], selection=False)
    found = finished(with_ensemble)
    assert "the noise helps" in " ".join(sentences(found, findings(found)))


def test_versions_are_not_mixed():
    def record(dblocks, torch):
        return {"environment": {"dblocks": dblocks, "torch": torch}}

    check_versions("a", [record("0.1.0", "2.13.0+cpu"), record("0.2.3", "2.13.1")])
    with pytest.raises(ValueError, match="version of dblocks"):
        check_versions("a", [record("0.2.0", "2.13.0"), record("0.9.0", "2.13.0")])
    with pytest.raises(ValueError, match="version of torch"):
        check_versions("a", [record("0.2.0", "2.13.0"), record("0.2.0", "2.11.0")])


def test_a_record_of_another_recipe_is_refused(experiment):
    write(experiment, "end_to_end", [0.8])
    rows = dict(experiment.rows)
    title, run = rows["end_to_end"]
    rows["end_to_end"] = (title, dataclasses.replace(run, batch_size=7))
    with pytest.raises(ValueError, match="another recipe"):
        finished(dataclasses.replace(experiment, rows=rows))


def test_no_records_is_an_error(experiment, tmp_path):
    with pytest.raises(ValueError, match="make study"):
        write_page([finished(experiment)], tmp_path / "page.html")


def test_the_page_of_the_committed_records_needs_no_other_file(tmp_path):
    page = tmp_path / "page.html"
    chosen = [f for f in comparisons() if f.records][:2]
    write_page(chosen, page)
    text = page.read_text(encoding="utf-8")
    assert all(f"id='{e.name}'" in text for e in chosen)
    assert not re.search(r"(src|href)=['\"]https?:", text)
    assert "95 % interval" in text


def test_the_command_writes_where_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--out", "page.html"]) == 2
    assert "needs records" in capsys.readouterr().err
    assert not Path("page.html").exists()


@pytest.mark.parametrize(("out", "beside"), [("else/page.html", "else"), (None, "docs/images")])
def test_pictures_are_beside_the_page(out, beside, tmp_path, monkeypatch, capsys):
    """With --out; else in docs/images."""
    monkeypatch.chdir(tmp_path)
    drawn = []
    own = SimpleNamespace(figure=Path("docs/images/vit.png"))
    own.draw = lambda rows, path: drawn.append(path)
    found = [SimpleNamespace(name="vit", curve={})]
    monkeypatch.setattr(command, "EXPERIMENTS", {"vit": own})
    monkeypatch.setattr(command, "comparisons", lambda: found)
    monkeypatch.setattr(command, "of_experiment", lambda *_: SimpleNamespace(rows=[1]))
    monkeypatch.setattr(command.speed_of_writing, "stored", lambda: None)
    for name in ("write_page", "write_documents"):
        monkeypatch.setattr(command, name, lambda *_: None)
    assert main(["report", *(["--out", out] if out else [])]) == 0
    assert drawn == [Path(beside) / "vit.png"]
    assert f"the pictures in {beside}" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_comparison_of_which_one_row_ran_renders(name):
    whole = comparison(name)
    for row, records in whole.records.items():
        found = dataclasses.replace(whole, records={row: records[:1]})
        if row in EXPERIMENTS[name].rows:
            assert whole.titles[row][:9] in _measures(
                of_experiment(found, EXPERIMENTS[name]), EXPERIMENTS[name]
            )
        if name in STUDIES:
            assert whole.titles[row] in study_block(found)


def test_a_figure_without_blocks_has_one_panel(tmp_path):
    found = comparison("vit-fashion")
    for row in ("end_to_end", "greedy_3"):
        EXPERIMENTS["vit-fashion"].draw({"a": found.records[row]}, tmp_path / f"{row}.png")
        assert (tmp_path / f"{row}.png").exists()
