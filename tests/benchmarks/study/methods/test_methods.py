import dataclasses
import math

import pytest
import torch
import torch.nn.functional as nnf

from benchmarks.study.methods import forward_forward, noprop
from benchmarks.study.methods.run import MethodRun, steps_of
from dblocks.models.vit import ViT
from dblocks.recipes.costs import LayerCounter, memory
from dblocks.recipes.records import begun
from dblocks.recipes.vit import ViTRun

from .conftest import CLASSES, METHODS, OTHERS, TINY, quadrants, trainer_of

pytestmark = pytest.mark.usefixtures("one_thread")


def parameters_of(trainer, unit):
    return {id(p) for p in trainer.network.units[unit].parameters()}


def test_gradients_stay_inside_their_unit(run):
    trainer = trainer_of(run)
    reached = set()
    for p in trainer.network.parameters():
        p.register_post_accumulate_grad_hook(lambda p: reached.add(id(p)))
    for unit in range(run.blocks):
        reached.clear()
        trainer.loss(trainer.batch(0), unit).backward()
        assert reached
        assert reached <= parameters_of(trainer, unit)
        layers = {id(p) for m in trainer.counted() for p in m.parameters()}
        assert parameters_of(trainer, unit) & layers <= reached
        trainer.network.zero_grad()


def test_in_a_step_no_gradient_reaches_a_unit_but_its_own(run):
    trainer = trainer_of(run)
    groups = [parameters_of(trainer, u) for u in range(len(trainer.network.units))]
    reached, seen = set(), []
    for p in trainer.network.parameters():
        p.register_post_accumulate_grad_hook(lambda p: reached.add(id(p)))
    update = trainer.update

    def watched(unit, loss):
        reached.clear()
        value = update(unit, loss)
        assert reached <= groups[unit]
        seen.append(unit)
        return value

    trainer.update = watched
    trainer.step(0)
    expected = {
        "greedy": list(range(run.blocks)),
        "forward_forward": list(range(run.blocks + 1)),
        "ensemble": [0],
    }
    if run.method == "noprop":
        assert len(seen) == 2
        assert seen[1] == run.blocks
    else:
        assert seen == expected[run.method]


def test_a_step_changes_only_what_it_trains(run):
    trainer = trainer_of(run)
    for step in range(3):  # so that there is momentum to change others by
        trainer.step(step)
    units = trainer.network.units
    before = [[p.clone() for p in unit.parameters()] for unit in units]
    moments = [[s["exp_avg"].clone() for s in o.state.values()] for o in trainer.optimizers]
    trained, update = set(), trainer.update
    trainer.update = lambda unit, loss: (trained.add(unit), update(unit, loss))[1]
    trainer.step(3)
    for unit, module in enumerate(units):
        same = all(map(torch.equal, before[unit], module.parameters()))
        assert same == (unit not in trained)
        now = [s["exp_avg"] for s in trainer.optimizers[unit].state.values()]
        if unit not in trained:
            assert all(map(torch.equal, moments[unit], now))
    assert all(p.grad is None for p in trainer.network.parameters())


@pytest.mark.parametrize("name", ["greedy_4", "forward_forward"])
def test_a_unit_learns_without_those_behind_it(name):
    one, other = trainer_of(METHODS[name]), trainer_of(METHODS[name])
    with torch.no_grad():
        for p in other.network.units[2].parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    for trainer in (one, other):
        trainer.step(0)
        trainer.step(1)
    for unit in (0, 1):
        pairs = (t.network.units[unit].parameters() for t in (one, other))
        assert all(map(torch.equal, *pairs))


def test_learns_above_chance_and_costs_what_it_says(run):
    trainer = trainer_of(run)
    with LayerCounter(trainer.counted()) as counter:
        for step in range(run.steps):
            trainer.step(step)
        with counter.paused():
            point = trainer.measure()
    assert point["accuracy"] > 0.6
    expected = type(trainer).layers_per_step(run) * run.steps
    assert counter.count == pytest.approx(expected)
    found = memory(trainer)
    assert 0 < found["state_mib"] <= found["process_mib"]
    assert begun(trainer)["run"] == run.to_dict()


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_scrambled_labels_stay_at_chance(name):
    run = {**METHODS, **OTHERS}[name]
    trainer = trainer_of(run, scrambled=True, held_out=1000)
    for step in range(run.steps // 2):
        trainer.step(step)
    point = trainer.measure()
    for reached in (point["accuracy"], *point.get("heads", [])):
        assert abs(reached - 1 / CLASSES) < 0.07  # 5 standard errors


def test_runs_come_back_from_their_records(run):
    assert MethodRun.from_dict(run.to_dict()) == run


def test_as_many_layer_evaluations_as_asked(run):
    made = steps_of(run, 1200)
    per_step = type(trainer_of(run)).layers_per_step(run)
    assert made.steps * per_step == pytest.approx(1200, abs=per_step)


def test_greedy_layers_start_as_those_trained_end_to_end():
    plain = trainer_of(ViTRun(end_to_end=True, steps=2, **TINY))
    for name in ("greedy_4", "forward_forward"):
        layers = trainer_of(METHODS[name]).counted()
        for one, other in zip(plain.counted(), layers, strict=True):
            assert all(map(torch.equal, one.parameters(), other.parameters()))


def test_embedding_is_that_of_the_vit():
    trainer = trainer_of(METHODS["greedy_4"])
    stages = [unit.stage for unit in trainer.network.units]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(METHODS["greedy_4"].seed)
        vit = ViT(trainer.network.config)
    images = quadrants(5).images
    x = images
    for stage in stages:
        x = stage(x)
    vit.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    expected = vit(images)
    logits = vit.classifier(vit.norm.modulate(x[:, :1], None, None)[:, 0])
    torch.testing.assert_close(logits, expected)


def test_the_contrastive_loss_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    f = nnf.normalize(torch.randn(8, 5, generator=generator, dtype=torch.float64), dim=-1)
    labels = torch.tensor([0, 1, 2, 0] * 2)
    t, total = forward_forward.TEMPERATURE, 0.0
    for i in range(8):
        others = [s for s in range(8) if s != i]
        below = sum(math.exp(f[i] @ f[s] / t) for s in others)
        same = [p for p in others if labels[p] == labels[i]]
        total -= sum(math.log(math.exp(f[i] @ f[p] / t) / below) for p in same) / len(same)
    assert forward_forward.contrastive_loss(f, labels).item() == pytest.approx(total / 8)


def test_views_are_shifted_and_repeatable():
    images = quadrants(50).images
    first, again = (
        forward_forward.augment(images, torch.Generator().manual_seed(3), flip=True)
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert first.shape == images.shape
    assert first.abs().max() <= 1
    assert not torch.equal(first, images)


@pytest.mark.parametrize("num_blocks", [1, 3, 12])
def test_perfect_predictions_end_at_the_label_with_the_noise_of_the_last_level(num_blocks):
    steps, last = noprop.schedule(num_blocks)
    assert steps[0].before == noprop.LOWEST
    assert last == noprop.HIGHEST
    mean, variance = math.sqrt(steps[0].before), 1 - steps[0].before
    ends = [*(step.before for step in steps[1:]), last]
    for step, alpha in zip(steps, ends, strict=True):
        mean = step.of_prediction + step.of_state * mean
        variance = step.of_state**2 * variance + step.std**2
        assert mean == pytest.approx(math.sqrt(alpha))
        assert variance == pytest.approx(1 - alpha)
    assert sum(step.gain for step in steps) == pytest.approx(99 - 1e-4 / (1 - 1e-4))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="method must be one of"):
        MethodRun(method="greed", steps=1)
    with pytest.raises(ValueError, match="blocks must divide the 12 layers"):
        dataclasses.replace(MethodRun(method="greedy", steps=1), blocks=5)
