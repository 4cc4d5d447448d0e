import dataclasses

import pytest

from benchmarks.study import quality, running
from benchmarks.study.__main__ import EXPERIMENTS, STUDIES, main
from benchmarks.study.archive import Archive
from benchmarks.study.experiment import SELECTION_SEED, record_path
from benchmarks.study.methods.run import TRAINERS, MethodRun
from benchmarks.study.recurrent import BLOCK_LAYERS
from benchmarks.study.rows import MORE_RATES, Found, Row, Study, selection_run
from dblocks.recipes.costs import LayerCounter
from dblocks.recipes.records import write_record
from dblocks.recipes.run import Run
from dblocks.recipes.tables import COSTS

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"width": 8, "depth": 2, "heads": 2, "patch_size": 4, "batch_size": 16, "points": 2}
RUN = MethodRun(method="greedy", blocks=2, steps=12, **TINY)


def study_of(*rows):
    return Study(
        name="a-study",
        title="of nothing",
        rows=rows,
        quality=quality.ACCURACY,
        headline=lambda record: f"{record['accuracy']:.2f}",
        columns=COSTS,
    )


ROW = Row(name="one", title="One", method="greedy", run=RUN, lrs=(1e-3, 2e-3, 4e-3), seeds=(0, 1))
OTHER = dataclasses.replace(ROW, name="two", lrs=(), rate_of="one", part="budget", planned=False)
STUDY = study_of(ROW, OTHER)


def pretend(best):
    """What stands for a run: the nearer the rate to `best`, the better."""

    def train_one(run, path, **_):
        record = {
            "format": 1,
            "run": run.to_dict(),
            "accuracy": 1 - abs(run.lr - best),
            "seconds": 0,
        }
        write_record(path, record)
        return record

    return train_one


@pytest.fixture
def at_once(monkeypatch):
    """Runs what is missing here, by `pretend`, and remembers what it ran."""
    done = []

    def start(best):
        train_one = pretend(best)

        def run_missing(jobs, headline, workers, _=None):
            for path, run in jobs.items():
                if path.stem not in Archive(path.parent).load():
                    train_one(run, path)
                    done.append(path.stem)

        monkeypatch.setattr(running, "run_missing", run_missing)
        return done

    return start


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (2e-3, (1e-3, 2e-3, 4e-3)),
        (8e-3, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
        (1e-3, (5e-4, 1e-3, 2e-3, 4e-3)),
    ],
)
def test_grids_grow_until_the_best_is_inside(tmp_path, at_once, capsys, best, tried):
    at_once(best)
    running.run_study(STUDY, [ROW, OTHER], tmp_path / "a")
    found = Found(STUDY, tmp_path / "a")
    assert found.rates(ROW) == pytest.approx(sorted(tried))
    assert found.lr(ROW) == found.lr(OTHER) == pytest.approx(best)
    assert not found.at_edge(ROW)
    assert [r["run"]["seed"] for r in found.records(ROW)] == [0, 1]
    assert "at the edge" not in capsys.readouterr().out


def test_a_best_rate_that_stays_at_the_edge_is_said(tmp_path, at_once, capsys):
    at_once(1.0)
    running.run_study(STUDY, [ROW], tmp_path / "a")
    found = Found(STUDY, tmp_path / "a")
    assert len(found.rates(ROW)) == 3 + MORE_RATES
    assert found.at_edge(ROW)
    assert "one: learning rate 0.032, at the edge of what was tried" in capsys.readouterr().out


def test_finished_runs_are_not_repeated_and_what_is_missing_is_named(tmp_path, at_once):
    done = at_once(2e-3)
    folder = tmp_path / "a"
    text = running.status(STUDY, STUDY.rows, folder)
    assert "one                          0 of 2 seeds; python -m benchmarks.study study" in text
    assert "two                          0 of 2 seeds, defined, not run; python -m" in text
    running.run_study(STUDY, [ROW], folder)
    first = len(done)
    assert first == len(set(done)) == 3 + 2
    running.run_study(STUDY, [ROW, OTHER], folder)
    assert len(done) == first + 2
    assert running.status(STUDY, [ROW], folder).endswith("one                          done")
    assert len(Archive(folder).load()) == first + 2


def test_selection_sees_neither_held_out_data_nor_a_final_seed():
    for study in STUDIES.values():
        for row in study.rows:
            run = selection_run(row, 1e-3)
            assert run.part == "selection"
            assert SELECTION_SEED not in row.seeds
            assert row.run.part == "final"
            assert bool(row.lrs) == (row.rate_of is None)
            if row.rate_of is not None:
                assert study.row(row.rate_of).lrs
            assert run.steps == row.run.steps // row.shorter


def test_rows_of_methods_run_as_many_layers():
    for study in STUDIES.values():
        if not study.name.startswith("vit"):
            continue
        whole = study.row("end_to_end").run
        budget = whole.steps * whole.depth
        for row in study.rows:
            run = row.run
            per_step = run.depth / run.num_blocks
            if isinstance(run, MethodRun):
                per_step = TRAINERS[run.method].layers_per_step(run)
            if row.part == "methods":
                assert run.steps * per_step == pytest.approx(budget, rel=2e-3)
        assert len(set(study.names())) == len(study.rows)


@pytest.mark.parametrize("method", ["greedy", "forward_forward", "noprop", "ensemble"])
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path, monkeypatch, method):
    run = dataclasses.replace(RUN, method=method)
    monkeypatch.setattr(running, "EVERY", 4)
    path = record_path(tmp_path / "records", "row", run)
    expected = running.train_kept(run, tmp_path / "whole.json", tmp_path / "kept")
    trainer, steps = TRAINERS[method], []
    step = trainer.step

    def killed(self, number):
        if number == 10 and number not in steps:
            steps.append(number)
            raise KeyboardInterrupt
        steps.append(number)
        return step(self, number)

    monkeypatch.setattr(trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        running.train_kept(run, path, tmp_path / "kept")
    assert not path.exists()
    record = running.train_kept(run, path, tmp_path / "kept")
    assert steps == [*range(11), 8, 9, 10, 11]
    same = ("accuracy", "heads", "curve", "layer_evaluations", "state_mib", "samples", "run")
    assert {key: record[key] for key in same} == {key: expected[key] for key in same}
    assert not list((tmp_path / "kept").rglob("*.safetensors"))


def test_the_command_lists_and_names_unknown_rows(tmp_path, capsys):
    args = ["study", "vit-digits", "--records", str(tmp_path / "none")]
    assert main([*args, "--list", "--part", "methods"]) == 0
    out = capsys.readouterr().out
    for name in ("greedy_12", "forward_forward", "noprop_3", "small_ensemble"):
        assert f"--rows {name}, " in out
    assert main([*args, "--list", "--rows", "none"]) == 2
    assert "vit-digits has no row 'none'; its rows are ['end_to_end'" in capsys.readouterr().err


def test_every_run_is_read_back_from_its_record():
    for study in STUDIES.values():
        for row in study.rows:
            run: Run = row.run
            assert type(run).from_dict(run.to_dict()) == run


@pytest.mark.parametrize("name", sorted(STUDIES.keys() & EXPERIMENTS.keys()))
def test_a_study_beside_an_experiment_has_its_runs(name):
    study, experiment = STUDIES[name], EXPERIMENTS[name]
    for row, (title, run) in experiment.rows.items():
        ours = study.row(row)
        assert (ours.title, ours.run) == (title, run)
        assert set(ours.seeds) >= set(experiment.seeds)
        if row in experiment.selection_shorter:
            tried = [selection_run(ours, lr) for lr in ours.lrs]
            assert tried
            assert all(run in experiment.selection_runs(row) for run in tried)
        else:
            assert ours.rate_of == experiment.rates_of[row]


@pytest.mark.parametrize("name", ["dit-digits", "dit-fashion", "masked-lm-pydoc"])
def test_small_networks_and_their_ensembles_run_as_many_layers_as_end_to_end(name):
    study = STUDIES[name]
    whole, small, members = (
        study.row(row).run for row in ("end_to_end", "small", "small_ensemble")
    )
    budget = whole.steps * whole.depth
    assert small.steps * small.depth == budget
    assert members.steps * members.depth // members.members == budget
    assert small.depth == members.depth // members.members == whole.depth // 3


def test_plain_networks_run_as_many_layers_as_the_block():
    study = STUDIES["recurrent-pydoc"]
    for name, like in (
        ("plain", "blocks"), ("plain_long", "blocks_long"), ("single_learned", "blocks")
    ):  # fmt: skip
        assert study.row(name).run.steps == study.row(like).run.steps
    for name in ("plain", "blocks", "single_learned"):
        trainer = dataclasses.replace(study.row(name).run, steps=1).trainer()
        with LayerCounter(trainer.counted()) as counter:
            trainer.step(0)
        assert counter.count == BLOCK_LAYERS


@pytest.mark.parametrize("command", ["results", "study", "score", "pack"])
def test_help_and_mistakes_name_what_there_is(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    known = STUDIES if command == "study" else EXPERIMENTS
    assert all(name in told.replace("- ", "-") for name in known)
    assert "[]" not in told
    with pytest.raises(SystemExit):
        main([command, "nothing"])
    assert "must be one of " in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_the_best_of_the_rates_tried_is_not_at_their_edge(name):
    compared = EXPERIMENTS[name]
    there = Archive(compared.records).load()
    for row in compared.selection_shorter:
        runs = compared.selection_runs(row)
        paths = [record_path(compared.records, row, run) for run in runs]
        if all(path.stem in there for path in paths):
            best = compared.chosen_lr([there[path.stem] for path in paths])
            assert runs[0].lr < best < runs[-1].lr, row


def test_a_quick_run_shows_that_every_row_runs(tmp_path, monkeypatch, capsys):
    made = {}

    def run_missing(jobs, headline, workers, train_one):
        made.update({path: train_one(run, path) for path, run in jobs.items()})

    monkeypatch.setattr(running, "run_missing", run_missing)
    monkeypatch.setattr(running, "QUICK_IMAGES", 20)
    long = dataclasses.replace(ROW, run=dataclasses.replace(RUN, steps=300))
    running.run_quick(STUDY, [long, OTHER], tmp_path / "quick")
    assert [record["run"]["steps"] for record in made.values()] == [3, 2]
    for path, record in made.items():
        assert record["run"]["lr"] == 2e-3
        assert record["accuracy"] * 20 == pytest.approx(round(record["accuracy"] * 20))
        assert path.exists()
    assert "seconds" in capsys.readouterr().out
