import dataclasses
import json

import pytest
import torch

from dblocks import experiments
from dblocks.recipe import Run
from dblocks.records import write_record

TINY = {"width": 12, "depth": 3, "heads": 2, "patch_size": 4, "batch_size": 16, "points": 2}
MARKERS = "# Title\n<!-- results:vit-digits -->\n<!-- /results:vit-digits -->\nend\n"


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other make small steps slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch):
    """The experiment with a network and numbers of steps that take no time."""
    rows = {
        name: (title, dataclasses.replace(run, steps=run.steps // 500, **TINY))
        for name, (title, run) in experiments.ROWS.items()
    }
    monkeypatch.setattr(experiments, "ROWS", rows)
    for name, row in (("BLOCKS", "blocks"), ("END_TO_END", "end_to_end")):
        monkeypatch.setattr(experiments, name, rows[row][1])


def fake_record(run: Run, accuracy: float) -> dict:
    per_step = run.depth if run.end_to_end else run.depth // run.blocks
    evaluations = [per_step * run.steps // 2, per_step * run.steps]
    return {
        "format": 1,
        "run": run.to_dict(),
        "blocks": None if run.end_to_end else {"num_blocks": run.blocks},
        "adaln": not run.end_to_end,
        "accuracy": accuracy,
        "layer_evaluations": evaluations[-1],
        "layers_per_step": per_step,
        "samples": run.steps * run.batch_size,
        "activations_mib": 3.0,
        "state_mib": 2.0,
        "process_mib": 6.0,
        "seconds": 1.0,
        "curve": [{"layer_evaluations": n, "accuracy": accuracy} for n in evaluations],
    }


def write_all(folder):
    """Made-up records: the middle learning rate is the best; row i reaches (90 + i + seed) %."""
    for i, row in enumerate(experiments.ROWS):
        for run in experiments.selection_runs(row):
            accuracy = 0.9 if run.lr == experiments.LRS[1] else 0.8
            path = experiments.record_path(folder, row, run)
            write_record(path, fake_record(run, accuracy))
        for run in experiments.final_runs(row, experiments.LRS[1]):
            path = experiments.record_path(folder, row, run)
            write_record(path, fake_record(run, (90 + i + run.seed) / 100))


def test_rows_are_equal_in_what_they_claim():
    (blocks, whole, longer) = (experiments.ROWS[r][1] for r in experiments.ROWS)
    assert whole.steps * whole.depth == blocks.steps * blocks.depth // blocks.blocks
    assert longer.steps * longer.batch_size == blocks.steps * blocks.batch_size
    for field in ("batch_size", "width", "depth", "heads", "mlp_ratio", "clip", "weight_decay"):
        assert getattr(whole, field) == getattr(blocks, field) == getattr(longer, field)


def test_selection_never_uses_the_held_out_part_or_a_final_seed():
    for row in experiments.ROWS:
        runs = experiments.selection_runs(row)
        assert [run.lr for run in runs] == list(experiments.LRS)
        assert {run.part for run in runs} == {"selection"}
        assert not {run.seed for run in runs} & set(experiments.SEEDS)
        assert {run.part for run in experiments.final_runs(row, 1e-3)} == {"final"}


def test_best_rate_wins_and_ties_go_to_the_smaller():
    records = [
        {"accuracy": a, "run": {"lr": lr}} for a, lr in ((0.9, 2e-3), (0.9, 1e-3), (0.8, 5e-4))
    ]
    assert experiments.chosen_lr(records) == 1e-3


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch, capsys):
    write_all(tmp_path / "records")
    readme = tmp_path / "README.md"
    readme.write_text(MARKERS)

    def refuse(*_, **__):
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr(experiments, "ProcessPoolExecutor", refuse)
    experiments.results(tmp_path / "records", tmp_path / "figure.png", readme)
    text = readme.read_text()
    lr = f"{experiments.LRS[1]:g}"
    assert f"| 3 blocks, equal layer evaluations | yes | {lr} | 91.0 ± 1.0 % |" in text
    assert "| end to end | no | 0.001 | 92.0 ± 1.0 % | 18,000 (12 a step) | 192,000 |" in text
    assert text.startswith("# Title\n")
    assert text.endswith("end\n")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "9 of 9 runs are there, 0 to do" in capsys.readouterr().out


def test_a_record_of_another_recipe_is_an_error(tmp_path):
    run = Run(steps=5)
    path = tmp_path / "a.json"
    write_record(path, fake_record(dataclasses.replace(run, batch_size=64), 0.5))
    with pytest.raises(ValueError, match=r"a\.json was made by another recipe"):
        experiments.run_missing(tmp_path, {path: run}, workers=1)


@pytest.mark.slow
def test_missing_runs_are_run_in_processes(tmp_path, capsys):
    runs = [Run(steps=2, seed=seed, **TINY) for seed in range(2)]
    jobs = {tmp_path / f"{run.seed}.json": run for run in runs}
    write_record(tmp_path / "0.json", fake_record(runs[0], 0.5))
    experiments.run_missing(tmp_path, jobs, workers=2)
    assert "1 of 2 runs are there, 1 to do" in capsys.readouterr().out
    assert json.loads((tmp_path / "0.json").read_text())["accuracy"] == 0.5
    assert json.loads((tmp_path / "1.json").read_text())["environment"]["threads"] == 1


def test_without_markers_results_ends_in_one_line(tmp_path, capsys):
    write_all(tmp_path)
    args = ["results", "--records", str(tmp_path), "--readme", str(tmp_path / "none.md")]
    assert experiments.main([*args, "--figure", str(tmp_path / "f.png")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "none.md must hold the lines <!-- results:vit-digits -->" in error


def test_demo_prints_one_table_and_leaves_its_files(tmp_path, tiny, capsys):
    assert experiments.main(["demo", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for line in ("held-out accuracy", "layer evaluations", "samples seen", "seconds", "MiB"):
        assert line in out
    assert "end to end" in out
    assert "3 blocks" in out
    assert str(tmp_path / "vit_digits.png") in out
    assert (tmp_path / "vit_digits.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "run.json").read_text())) == 2
