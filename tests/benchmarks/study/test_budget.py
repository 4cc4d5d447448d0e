import dataclasses

import pytest
import torch

from benchmarks.study import budget, running
from benchmarks.study.archive import Archive
from benchmarks.study.budget import BudgetRun, BudgetTrainer, train_from_branch
from benchmarks.study.experiment import record_path
from benchmarks.study.report import finished
from benchmarks.study.report.figures import budget_picture
from benchmarks.study.rows import Found
from dblocks.recipes.causal_lm import CausalLMRun
from dblocks.recipes.records import read_record
from dblocks.scale import Checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {
    "width": 8, "depth": 3, "heads": 2, "context": 20, "batch_size": 2, "points": 1, "windows": 2
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    story = tmp_path / "story.txt"
    story.write_text("".join(f"{i} is followed by {i + 1}. " for i in range(60)))
    return BudgetRun(data=str(story), steps=10, rise=2, lr=4e-3, **TINY)


@pytest.fixture
def steps_taken(monkeypatch):
    taken, step = [], BudgetTrainer.step

    def noted(self, number):
        taken.append(number)
        return step(self, number)

    monkeypatch.setattr(BudgetTrainer, "step", noted)
    return taken


def test_the_rate_rises_stays_and_falls_to_zero():
    run = BudgetRun(steps=100, rise=4, lr=1.0)
    assert run.branch == 80
    assert [run.lr_at(step) for step in (0, 3, 4, 79, 80)] == [0.25, 1, 1, 1, 1]
    assert run.lr_at(90) == pytest.approx(0.5)
    assert run.lr_at(99) == pytest.approx(0.05)
    longer = dataclasses.replace(run, steps=200)
    assert [longer.lr_at(step) for step in range(81)] == [run.lr_at(step) for step in range(81)]


def test_runs_that_have_no_branch_are_refused():
    with pytest.raises(ValueError, match="decay must be constant and rise positive, got 'cosine'"):
        BudgetRun(steps=10, rise=1, decay="cosine")
    with pytest.raises(ValueError, match="and 0"):
        BudgetRun(steps=10, rise=0)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_a_point_goes_on_from_the_branch_and_ends_as_if_it_ran_alone(
    run, tmp_path, steps_taken, end_to_end
):
    run = dataclasses.replace(run, end_to_end=end_to_end)
    points = [dataclasses.replace(run, steps=steps) for steps in (10, 20, 40)]
    found = []
    for point in points:
        path = tmp_path / "together" / f"{point.steps}.json"
        found.append(train_from_branch(point, path, tmp_path / "kept"))
        assert read_record(path) == found[-1]
    assert steps_taken == [*range(10), *range(8, 20), *range(16, 40)]
    for point, record in zip(points, found, strict=True):
        path = tmp_path / "alone" / f"{point.steps}.json"
        alone = train_from_branch(point, path, tmp_path / "other" / str(point.steps))
        for key in ("bits", "product_bits", "layer_evaluations", "run"):
            assert record.get(key) == alone.get(key)
        assert record["curve"][-1]["bits"] == alone["curve"][-1]["bits"]
    assert found[2]["continued"] == [[8, 10], [16, 20]]
    branches = tmp_path / "kept" / "together"
    assert sorted(path.name for path in branches.glob("*/step-*")) == [
        "step-00000008", "step-00000016", "step-00000032"
    ]  # fmt: skip


def test_a_branch_at_a_prime_step_is_kept_without_a_checkpoint_of_every_step(
    run, tmp_path, monkeypatch
):
    saved, save = [], Checkpoints.save

    def noted(self, step, objects):
        saved.append(step)
        save(self, step, objects)

    monkeypatch.setattr(Checkpoints, "save", noted)
    run = dataclasses.replace(run, steps=189)
    assert run.branch == 151
    train_from_branch(run, tmp_path / "a" / "189.json", tmp_path / "kept")
    assert saved == sorted({*range(9, 189, 9), 151, 189})
    branches = (tmp_path / "kept" / "a").glob("branches-*/step-*")
    assert [path.name for path in branches] == ["step-00000151"]


def test_a_killed_point_goes_on_where_it_was(run, tmp_path, monkeypatch, steps_taken):
    kept = tmp_path / "kept"
    train_from_branch(run, tmp_path / "a" / "10.json", kept)
    longer, path = dataclasses.replace(run, steps=20), tmp_path / "a" / "20.json"
    step = BudgetTrainer.step

    def killed(self, number):
        if number == 13:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(BudgetTrainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train_from_branch(longer, path, kept)
    assert not path.exists()
    monkeypatch.setattr(BudgetTrainer, "step", step)
    steps_taken.clear()
    record = train_from_branch(longer, path, kept)
    assert steps_taken == [*range(13, 20)]
    alone = train_from_branch(longer, tmp_path / "b" / "20.json", kept)
    assert record["bits"] == alone["bits"]


def test_other_rates_and_seeds_have_branches_of_their_own(run, tmp_path, steps_taken):
    train_from_branch(run, tmp_path / "a" / "10.json", tmp_path / "kept")
    for change in ({"lr": 2e-3}, {"seed": 1}, {"part": "selection"}, {"end_to_end": True}):
        steps_taken.clear()
        other = dataclasses.replace(run, steps=11, **change)
        train_from_branch(other, tmp_path / "a" / "11.json", tmp_path / "kept")
        assert steps_taken == [*range(11)]


def test_points_run_as_many_layers():
    for row in budget.STUDY.rows:
        share = int(row.name.partition("_x")[2] or 1)
        run = row.run
        assert run.steps * run.depth // run.num_blocks == budget.EVALUATIONS * share
        assert run.width == 96
        assert run.data == "gcide"
        assert run.rise * 20 * run.depth // run.num_blocks == budget.EVALUATIONS
    assert len(budget.STUDY.rows) == 3 * len(budget.SHARES)
    assert budget.EVALUATIONS * budget.SHARES[-1] == pytest.approx(80_000, rel=0.01)


def test_a_study_of_points_runs_in_order_and_shows_its_curve(
    run, tmp_path, monkeypatch, steps_taken
):
    sizes = {f.name: getattr(run, f.name) for f in dataclasses.fields(CausalLMRun)}
    small = CausalLMRun(**{**sizes, "decay": "cosine"})
    rows = [
        dataclasses.replace(row, lrs=row.lrs and (4e-3,), shorter=1)
        for row in budget.rows_of(small, evaluations=10)
        if row.name.startswith("blocks")
    ]
    study = dataclasses.replace(budget.STUDY, rows=rows)
    folder = tmp_path / "causal_lm_budget"
    monkeypatch.setattr(running, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(Found, "rates", lambda self, row: list(row.lrs))

    def run_missing(jobs, headline, workers, train_one):
        for path, point in jobs.items():
            if path.stem not in Archive(folder).load():
                train_one(point, path)

    monkeypatch.setattr(running, "run_missing", run_missing)
    running.run_study(study, rows, folder, workers=1)
    # The run that chooses the rate, then four points of 10, 20, 40 and 80 steps.
    assert len(steps_taken) == 10 + 10 + (20 - 8) + (40 - 16) + (80 - 32)
    found = Found(study, folder)
    lines = finished._curve(rows, {row.name: found.records(row) for row in rows})
    assert list(lines["blocks"]) == [1.0, 2.0, 4.0, 8.0]
    records = found.records(study.row("blocks_x8"))
    assert record_path(folder, "blocks_x8", study.row("blocks_x8").run).stem.startswith("final")
    assert {"bits", "product_bits"} <= records[0].keys()
    page = finished.Finished(
        name="a", titles={row.name: row.title for row in rows}, kinds={}, seeds={}, records={},
        missing=[], quality=study.quality, columns=(), caption=lambda _: "", draw=None,
        curve=lines,
    )  # fmt: skip
    assert "their product" in budget_picture(page)


def test_bits_are_those_of_the_plain_recipe(run):
    torch.manual_seed(0)
    trainer = dataclasses.replace(run, windows=4).trainer()
    found = trainer.results({})
    assert found["bits"] == trainer.bits(windows=4)
    assert found["product_bits"] == trainer.bits(product=True, windows=4)
