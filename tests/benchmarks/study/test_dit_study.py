import dataclasses

import pytest

from benchmarks.study import ablation, dit_study
from benchmarks.study.ablation import AblationRun
from dblocks.blocks import BlocksConfig
from dblocks.recipes.costs import LayerCounter
from dblocks.recipes.records import train

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = dit_study.FASHION_STUDY.rows
TINY = {"width": 8, "depth": 6, "heads": 2, "patch_size": 4, "batch_size": 8, "samples": 40}


def test_ablations_change_one_thing_and_run_as_many_layers():
    base = dit_study.FASHION_STUDY.row("base").run
    for row in ROWS:
        run = row.run
        changed = {
            field.name
            for field in dataclasses.fields(run)
            if getattr(run, field.name) != getattr(base, field.name)
        } - {"steps"}
        layers = run.depth / run.num_blocks
        assert run.steps * layers == dit_study.ABLATION_BUDGET
        allowed = {
            "base": set(),
            "partition": {"partition", "layers"},
            "blocks": {"blocks"} if row.name != "blocks_1" else {"end_to_end"},
            "samplers": {"samplers"},
        }.get(row.part, {row.part})
        assert changed <= allowed
        assert changed or row.name == "base"
        assert row.seeds == (0, 1)


def test_every_choice_of_the_ablations_is_there():
    cut = {}
    for row in ROWS:
        run = row.run
        cut.setdefault(row.part, set()).add((run.partition, run.layers or (4, 4, 4)))
    whole = cut["partition"] | {("equal_mass", (4, 4, 4))}
    assert whole == {
        (p, s) for p in ("equal_mass", "uniform_log", "uniform") for s in dit_study.SPLITS
    }
    assert {row.run.num_blocks for row in ROWS} == {1, 2, 3, 4, 6, 12}
    assert {row.run.overlap for row in ROWS} == set(dit_study.OVERLAPS)
    assert {row.run.top_share for row in ROWS} == set(dit_study.TOP_SHARES)
    assert {row.run.weighting for row in ROWS} == {"auto", "clamped", "none", "batch_mean"}


def test_the_choices_reach_the_blocks():
    run = AblationRun(
        steps=1, partition="uniform_log", layers=(2, 4, 6), overlap=0.2, top_share=0.3, samples=40
    )
    config = run.trainer().config
    assert isinstance(config, BlocksConfig)
    assert config.layer_ranges(12) == ((0, 2), (2, 6), (6, 12))
    assert config.noise_schedule.partition == "uniform_log"
    assert (config.overlap, config.top_share) == (0.2, 0.3)
    assert config.noise_schedule.sigma_data == pytest.approx(0.753, abs=1e-3)


def test_samples_of_every_sampler_are_judged(monkeypatch):
    monkeypatch.setattr(ablation, "STEPS", {"euler": (3, 4), "heun": (3,)})
    # The classifier takes longer than the rest.
    judged = lambda self, guided: {"sum": guided.images.double().sum().item()}
    monkeypatch.setattr(ablation.AblationTrainer, "_judged", judged)
    run = AblationRun(steps=2, samplers=True, sampling_steps=3, points=1, **TINY)
    record = train(run).record
    found = record["by_sampler"]
    assert {sampler: list(of) for sampler, of in found.items()} == {
        "euler": ["3", "4"],
        "heun": ["3"],
    }
    assert found["euler"]["3"] == record["judged"]  # the run's own steps, by another way
    assert found["heun"]["3"] != found["euler"]["3"] != found["euler"]["4"]


def test_final_rows_run_as_many_layers():
    study = dit_study.FASHION_FINAL
    for row in study.rows:
        times = 3 if row.name == "end_to_end_3x" else 1
        parts = getattr(row.run, "members", row.run.num_blocks)
        assert row.run.steps * row.run.depth / parts == times * dit_study.BUDGET
    assert study.row("small").run.depth == 4


def test_blocks_of_uneven_layers_count_their_layers():
    run = AblationRun(steps=6, layers=(1, 2, 3), **TINY)
    trainer = run.trainer()
    with LayerCounter(trainer.counted()) as counter:
        blocks = [trainer.step(step)[0] for step in range(6)]
    assert counter.count == sum(block + 1 for block in blocks)
