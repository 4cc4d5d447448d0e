import pytest
import torch

from dblocks.data import Images
from dblocks.recipes.vit import ViTLearner, ViTRun

pytestmark = pytest.mark.usefixtures("one_thread")


TINY = {"width": 12, "depth": 3, "heads": 2, "patch_size": 4, "batch_size": 8}


def make_data(n=16):
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 10)


def begin(run):
    return ViTLearner(run, make_data(), make_data())


def test_run_round_trips_and_refuses_unknown_keys():
    run = ViTRun(steps=7, lr=3e-4)
    assert ViTRun.from_json(run.to_json()) == run
    with pytest.raises(ValueError, match="ViTRun has no field epochs"):
        ViTRun.from_dict({"epochs": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": 0}, "blocks must lie between 1 and the number of layers 12, got 0"),
        ({"blocks": 13}, "got 13"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("inf")}, "lr must be positive and finite, got inf"),
        ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
        ({"seed": -1}, r"seed must be at least 0 and less than 2\*\*63, got -1"),
        ({"seed": 2**63}, "seed must be at least 0"),
    ],
)
def test_run_checks_its_numbers(fields, message):
    with pytest.raises(ValueError, match=message):
        ViTRun(**fields)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], r"ViTRun must be a JSON object, got \[\]"),
        ({"blocks": 3.0}, r"ViTRun\.blocks must be int, got 3\.0"),
        ({"end_to_end": 1}, r"ViTRun\.end_to_end must be bool, got 1"),
        ({"lr": "1e-3"}, r"ViTRun\.lr must be float, got '1e-3'"),
        ({"part": "test"}, r"ViTRun\.part must be one of \('final', 'selection'\), got 'test'"),
        ({"steps": {}}, r"ViTRun\.steps must be int, got {}"),
    ],
)
def test_a_run_of_other_types_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ViTRun.from_dict(values)


def test_an_integer_is_a_rate_and_the_largest_seed_works():
    assert ViTRun.from_dict({"lr": 1}).lr == 1
    begin(ViTRun(steps=1, seed=2**63 - 1, **TINY)).step(0)


def test_learning_rate_rises_then_falls_to_zero():
    run = ViTRun(steps=100, lr=1.0, warmup=0.1)
    rates = [run.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3
    assert rates[55] == pytest.approx(0.5)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_runs_of_one_seed_are_bitwise_equal(end_to_end):
    def losses(seed):
        learner = begin(ViTRun(steps=4, seed=seed, end_to_end=end_to_end, **TINY))
        return [learner.step(step) for step in range(4)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_a_step_leaves_other_blocks_alone():
    learner = begin(ViTRun(steps=4, **TINY))
    before = [[p.clone() for p in layer.parameters()] for layer in learner.network.layers]
    block, _ = learner.step(0)
    for b, layer in enumerate(learner.network.layers):
        equal = [torch.equal(p, q) for p, q in zip(before[b], layer.parameters(), strict=True)]
        assert all(equal) == (b != block)


def test_only_the_blocked_network_carries_adaln():
    assert begin(ViTRun(**TINY)).network.layers[0].modulation is not None
    assert begin(ViTRun(end_to_end=True, **TINY)).network.layers[0].modulation is None


def test_classifier_repeats_itself():
    data = make_data()
    learner = begin(ViTRun(**TINY))
    torch.nn.init.normal_(learner.network.classifier.weight)
    first, again = (learner.classifier.logits(data.images, 3, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, learner.classifier.logits(data.images, 3, seed=2))
