"""The fine-tuning benchmark at a size of seconds: what it claims is counted, not assumed."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_tools import library

library("transformers")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[3]
MODULES = ("arms", "pretrained", "report", "runs", "saved", "text")
BLOCKS = 3


@pytest.fixture(scope="module")
def bench():
    """The modules of benchmarks/, which is not part of the installed package."""
    sys.path.insert(0, str(ROOT))
    yield SimpleNamespace(
        **{m: importlib.import_module(f"benchmarks.models.finetune.{m}") for m in MODULES}
    )
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def settings(bench):
    pretraining = bench.pretrained.Pretraining(
        width=16, layers=BLOCKS, heads=2, context=32, steps=3, batch_size=2
    )
    return bench.arms.Settings(
        pretraining, steps=2, selection_steps=1, batch_size=2, rates=(1e-3,), seeds=(0, 1),
        windows=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def arms(bench):
    """End to end, and two in blocks."""
    return (*bench.arms.ARMS[:1], *bench.arms.ARMS[2:4])


@pytest.fixture(scope="module")
def record(bench, settings, arms, tmp_path_factory):
    kept = tmp_path_factory.mktemp("kept")
    found = bench.runs.measure(settings, arms, kept, rounds=2)
    again = bench.runs.measure(settings, arms[:1], kept, rounds=2)
    assert again["runs"] == [run for run in found["runs"] if run["arm"] == again["runs"][0]["arm"]]
    return found


def test_every_arm_has_its_runs_and_a_line(bench, settings, arms, record):
    names = [arm.name for arm in arms]
    for name in names:
        runs = [run for run in record["runs"] if run["arm"]["name"] == name]
        assert [run["seed"] for run in runs] == list(settings.seeds)
        assert {run["steps"] for run in runs} == {settings.steps}
        assert all(run["old"]["plain"] > 0 and run["new"]["plain"] > 0 for run in runs)
    page = bench.report.page(record)
    assert all(f"\n| {name} |" in page for name in names)
    assert "\n| not yet |" in page


def test_a_step_holds_gradients_of_one_block_only(record, arms):
    whole, block, _ = record["costs"]
    assert arms[1].trains == "layers"
    layers = whole["parameters"] - 16 * record["data"]["vocabulary"] - 16  # embedding, last norm
    # A layer's own parameters, and its modulation of six rows by a vector of the width.
    assert block["parameters"] == layers // BLOCKS + 6 * 16 * (16 + 1)
    assert block["gradient_bytes"] == 4 * block["parameters"]
    assert block["optimizer_bytes"] >= 8 * block["parameters"]
    assert block["process_optimizer_bytes"] == BLOCKS * block["optimizer_bytes"]


def test_what_is_not_trained_stays(bench, settings):
    arms, model = bench.arms, bench.pretrained.llama(settings.pretraining, 50)
    text = bench.text.Text(torch.arange(400) % 50, 400)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for arm in arms.ARMS:
        trained = arms.finetune(model, arm, settings, text, lambda: None, lr=1e-3, seed=0, steps=2)
        network = trained if arm.trains == "all" else trained.base_model.model
        moved = {name for name, p in network.named_parameters() if not p.equal(before[name])}
        outside = {name for name in moved if ".layers." not in name}
        assert moved
        assert bool(outside) == (arm.trains in ("all", "shared"))
        assert all(p.equal(before[name]) for name, p in model.named_parameters())
        if arm.trains in ("layers", "added"):
            added = dict(trained.base_model.noise_embedding.named_parameters())
            assert all(p.requires_grad == (arm.trains == "added") for p in added.values())


def test_the_rate_is_chosen_by_what_is_trained(bench):
    trials = [
        {"lr": 1.0, "new": {"plain": 2.0, "block": 5.0}},
        {"lr": 2.0, "new": {"plain": 3.0, "block": 4.0}},
    ]
    arm = bench.arms.ARMS[1]
    assert arm.clean_loss_weight == 0
    assert bench.runs.best_rate(arm, trials) == 2.0
    assert bench.runs.best_rate(replace(arm, clean_loss_weight=1.0), trials) == 1.0


def test_no_module_is_read_twice(bench):
    text = bench.text
    names = [*text.TRAINING, *text.VALIDATION, *text.HELD_OUT]
    assert len(set(names)) == len(names)
    found = text.domains()
    parts = found.new.training, found.new.validation, found.new.held_out
    assert all(len(part.tokens) == part.characters > 10_000 for part in parts)
    assert found.new.unknown < found.new.training.characters / 1000


def test_plain_bits_of_a_model_without_preferences(bench, settings):
    model = bench.pretrained.llama(settings.pretraining, 64)
    torch.nn.init.zeros_(model.get_input_embeddings().weight)
    text = bench.text.Text(torch.arange(200) % 64, 200)
    assert bench.pretrained.plain_bits(model, text, 32, None) == pytest.approx(6.0, abs=1e-5)


def test_the_peak_of_what_is_saved(bench):
    """Two graphs at once count together; one that is gone before the next counts alone."""
    x = torch.ones(64, requires_grad=True)

    def half(value):
        return (value.exp() * 1.0).sum()  # exp saves its result, 256 bytes

    with bench.saved.PeakSaved([x]) as together:
        both = half(x) + half(x)
    assert together.peak == 512
    both.backward()
    with bench.saved.PeakSaved([x]) as one_by_one:
        torch.autograd.grad(half(x), x)
        last = half(x)
    assert one_by_one.peak == 256
    assert last.requires_grad
    with bench.saved.PeakSaved([x]) as own:
        half_of_square = (x * x).sum()  # saves its parameter only
    assert own.peak == 0
    assert half_of_square.requires_grad
