import dataclasses
import json

import pytest

from benchmarks.study import experiment, vit
from benchmarks.study.__main__ import main
from benchmarks.study.archive import Archive
from benchmarks.study.vit import EXPERIMENT
from dblocks.recipes.records import read_record, write_record
from dblocks.recipes.vit import ViTRun

TINY = {"width": 12, "depth": 3, "heads": 2, "patch_size": 4, "batch_size": 16, "points": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(monkeypatch):
    """The demonstration with a network and numbers of steps that take no time."""
    rows = {
        name: (title, dataclasses.replace(run, steps=run.steps // 500, **TINY))
        for name, (title, run) in vit.DIGITS.items()
    }
    monkeypatch.setattr(vit, "DIGITS", rows)


def fake_record(run: ViTRun, accuracy: float) -> dict:
    per_step = run.depth if run.end_to_end else run.depth // run.blocks
    evaluations = [per_step * run.steps // 2, per_step * run.steps]
    return {
        "format": 1,
        "run": run.to_dict(),
        "blocks": None if run.end_to_end else {"num_blocks": run.blocks},
        "adaln": not run.end_to_end,
        "environment": {"commit": "0123456789ab"},
        "accuracy": accuracy,
        "blocks_alone": None if run.end_to_end else [accuracy - 0.1] * 3,
        "accuracy_by_denoising_steps": None if run.end_to_end else _by_steps(accuracy - 0.05),
        "accuracy_from_noise": None if run.end_to_end else _by_steps(accuracy - 0.2),
        "layer_evaluations": evaluations[-1],
        "layers_per_step": per_step,
        "samples": run.steps * run.batch_size,
        "activations_mib": 3.0,
        "state_mib": 2.0,
        "process_mib": 6.0,
        "seconds": 1.0,
        "curve": [{"layer_evaluations": n, "accuracy": accuracy} for n in evaluations],
    }


def _by_steps(accuracy: float) -> dict[str, float]:
    return {str(n): accuracy for n in (1, 2, 3, 6, 12)}


def write_all(folder):
    """Made-up records: the second learning rate is the best; row i reaches (90 + i + seed) %."""
    for i, row in enumerate(EXPERIMENT.rows):
        for run in EXPERIMENT.selection_runs(row) if row in EXPERIMENT.selection_shorter else ():
            accuracy = 0.9 if run.lr == EXPERIMENT.lrs[1] else 0.8
            path = experiment.record_path(folder, row, run)
            write_record(path, fake_record(run, accuracy))
        for run in EXPERIMENT.final_runs(row, EXPERIMENT.lrs[1]):
            path = experiment.record_path(folder, row, run)
            write_record(path, fake_record(run, (90 + i + run.seed) / 100))


def test_rows_are_equal_in_what_they_claim():
    for compared in (vit.EXPERIMENT, vit.FASHION):
        blocks, ensemble, published, small, whole, longer = (
            run for _, run in compared.rows.values()
        )
        assert whole.steps * whole.depth == blocks.steps * blocks.depth // blocks.blocks
        assert small.steps * small.depth == whole.steps * whole.depth
        assert ensemble.steps == published.steps == blocks.steps == longer.steps
        for field in ("batch_size", "width", "heads", "mlp_ratio", "clip", "weight_decay", "data"):
            assert len({getattr(run, field) for _, run in compared.rows.values()}) == 1
        runs = (blocks, ensemble, published, whole, longer)
        assert {run.depth for run in runs} == {12}
        chosen = set(compared.selection_shorter)
        assert chosen | set(compared.rates_of) == set(compared.rows)


def test_selection_never_uses_the_held_out_part_or_a_final_seed():
    for row in EXPERIMENT.selection_shorter:
        runs = EXPERIMENT.selection_runs(row)
        further = EXPERIMENT.beyond.get(row, ())
        assert [run.lr for run in runs] == sorted([*EXPERIMENT.lrs, *further])
        assert {run.part for run in runs} == {"selection"}
        assert not {run.seed for run in runs} & set(EXPERIMENT.seeds)
        assert {run.part for run in EXPERIMENT.final_runs(row, 1e-3)} == {"final"}


def test_best_rate_wins_and_ties_go_to_the_smaller():
    records = [
        {"accuracy": a, "run": {"lr": lr}} for a, lr in ((0.9, 2e-3), (0.9, 1e-3), (0.8, 5e-4))
    ]
    assert EXPERIMENT.chosen_lr(records) == 1e-3


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch, capsys, page):
    write_all(tmp_path / "records")
    report = page("vit-digits")

    def refuse(*_, **__):
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr(experiment, "ProcessPoolExecutor", refuse)
    EXPERIMENT.results(tmp_path / "records", tmp_path / "figure.png", report)
    there = Archive(tmp_path / "records").load()
    selections = [record for name, record in there.items() if name.startswith("selection-")]
    lr = f"{EXPERIMENT.chosen_lr(selections):g}"
    whole = report.read_text()
    assert whole.startswith("# Title\n")
    assert whole.endswith("end\n")
    lines = {line[:35].strip(): line[35:].split() for line in whole.splitlines()}
    assert lines["learning rate"] == [lr] * 6
    assert lines["AdaLN"] == ["yes", "yes", "yes", "no", "no", "no"]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "30 of 30 runs are there, 0 to do" in out
    chosen = sum(len(EXPERIMENT.selection_runs(row)) for row in EXPERIMENT.selection_shorter)
    records = chosen + len(EXPERIMENT.rows) * len(EXPERIMENT.seeds)
    assert f"commits that made the {records} records: 0123456789ab\n" in out
    assert "warning" not in out


@pytest.mark.parametrize(
    ("commit", "warning"),
    [
        ("ba9876543210", "the records are of several commits"),
        ("0123456789ab-dirty", "not every record is of committed code"),
        (None, "not every record is of committed code"),
    ],
)
@pytest.mark.parametrize("part", ["selection", "final"])
def test_records_of_other_commits_are_used_with_a_warning(
    tmp_path, capsys, page, part, commit, warning
):
    folder = tmp_path / "records"
    write_all(folder)
    path = sorted(folder.glob(f"{part}-*"))[0]
    write_record(path, {**read_record(path), "environment": {"commit": commit}})
    report = page("vit-digits")
    EXPERIMENT.results(folder, tmp_path / "figure.png", report)
    out = capsys.readouterr().out
    assert f"0123456789ab, {commit or 'unknown'}" in out.replace("ba9876543210", str(commit))
    assert f"warning: {warning}" in out


def test_a_record_of_another_recipe_is_an_error(tmp_path):
    run = ViTRun(steps=5)
    path = tmp_path / "a.json"
    write_record(path, fake_record(dataclasses.replace(run, batch_size=64), 0.5))
    with pytest.raises(ValueError, match=r"a\.json was made by another recipe"):
        experiment.run_missing({path: run}, EXPERIMENT.headline, workers=1)


@pytest.mark.parametrize("run", [{}, {"run": {"blocks": "3"}}, {"run": {"epochs": 3}}])
def test_a_record_without_a_run_is_an_error_that_names_it(tmp_path, run):
    path = tmp_path / "a.json"
    write_record(path, {"format": 1, **run})
    with pytest.raises(ValueError, match=r"a\.json cannot be used: ViTRun.* delete it"):
        experiment.run_missing({path: ViTRun()}, EXPERIMENT.headline, workers=1)


def test_the_demo_tries_its_folder_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vit, "train", None)
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert "file must be a folder to write files in" in capsys.readouterr().err


@pytest.mark.slow
def test_missing_runs_are_run_in_processes(tmp_path, capsys):
    runs = [ViTRun(steps=2, seed=seed, **TINY) for seed in range(2)]
    jobs = {tmp_path / f"{run.seed}.json": run for run in runs}
    write_record(tmp_path / "0.json", fake_record(runs[0], 0.5))
    experiment.run_missing(jobs, EXPERIMENT.headline, workers=2)
    assert "1 of 2 runs are there, 1 to do" in capsys.readouterr().out
    assert json.loads((tmp_path / "0.json").read_text())["accuracy"] == 0.5
    assert json.loads((tmp_path / "1.json").read_text())["environment"]["threads"] == 1


def test_without_markers_results_ends_in_one_line(tmp_path, capsys):
    write_all(tmp_path / "records")
    args = [
        "results",
        "vit-digits",
        "--records",
        str(tmp_path / "records"),
        "--report",
        str(tmp_path / "none.md"),
    ]
    assert main([*args, "--figure", str(tmp_path / "f.png")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "none.md must hold the lines <!-- results:vit-digits -->" in error


def test_demo_prints_one_table_and_leaves_its_files(tmp_path, tiny, capsys):
    assert main(["demo", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for line in ("held-out accuracy", "layer evaluations", "samples seen", "seconds", "MiB"):
        assert line in out
    assert "end to end" in out
    assert "3 blocks" in out
    assert str(tmp_path / "vit_digits.png") in out
    assert (tmp_path / "vit_digits.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "run.json").read_text())) == 2
