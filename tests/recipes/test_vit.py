import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dblocks.models.vit import classify
from dblocks.recipes.data.digits import digits
from dblocks.recipes.data.splits import Images
from dblocks.recipes.metrics import classifier as classifiers
from dblocks.recipes.vit import ViTRun, ViTTrainer, patch_size_of

pytestmark = pytest.mark.usefixtures("one_thread")


TINY = {"width": 12, "depth": 3, "heads": 2, "patch_size": 4, "batch_size": 8}


def make_data(n=16):
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 10)


def begin(run):
    return ViTTrainer(run, make_data(), make_data())


def test_run_round_trips_and_refuses_unknown_keys():
    run = ViTRun(steps=7, lr=3e-4)
    assert ViTRun.from_json(run.to_json()) == run
    with pytest.raises(ValueError, match="ViTRun has no field epochs"):
        ViTRun.from_dict({"epochs": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": 0}, "blocks must be between 1 and the number of layers, 12, got 0"),
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
        trainer = begin(ViTRun(steps=4, seed=seed, end_to_end=end_to_end, **TINY))
        return [trainer.step(step) for step in range(4)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_a_step_leaves_other_blocks_alone():
    trainer = begin(ViTRun(steps=4, **TINY))
    before = [[p.clone() for p in layer.parameters()] for layer in trainer.network.layers]
    block, _ = trainer.step(0)
    for b, layer in enumerate(trainer.network.layers):
        equal = [torch.equal(p, q) for p, q in zip(before[b], layer.parameters(), strict=True)]
        assert all(equal) == (b != block)


def test_only_the_blocked_network_carries_adaln():
    assert begin(ViTRun(**TINY)).network.layers[0].modulation is not None
    assert begin(ViTRun(end_to_end=True, **TINY)).network.layers[0].modulation is None


def test_classifier_repeats_itself():
    data = make_data()
    trainer = begin(ViTRun(**TINY))
    torch.nn.init.normal_(trainer.network.classifier.weight)
    noisy = {"num_steps": 3, "noise": "paper"}
    first, again = (trainer.classifier.logits(data.images, **noisy, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, trainer.classifier.logits(data.images, **noisy, seed=2))
    first, other = (trainer.classifier.logits(data.images, 3, seed=seed) for seed in (1, 2))
    assert torch.equal(first, other)


def test_images_are_classified_some_at_a_time(monkeypatch):
    data, trainer = make_data(7), begin(ViTRun(**TINY))
    torch.nn.init.normal_(trainer.network.classifier.weight)
    classifier, images = trainer.classifier, data.images
    noisy = {"num_steps": 3, "noise": "paper"}
    at_once = classifier.logits(images, **noisy, seed=1)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(at_once, classify(trainer.model, images, **noisy, generator=generator))
    monkeypatch.setattr(classifiers, "AT_ONCE", 3)
    generator = torch.Generator().manual_seed(1)
    chunks = [
        classify(trainer.model, images[i : i + 3], **noisy, generator=generator) for i in (0, 3, 6)
    ]
    assert torch.equal(classifier.logits(images, **noisy, seed=1), torch.cat(chunks))
    assert classifier.logits(images[:0]).shape == (0, 10)
    right = torch.cat(chunks).argmax(-1)
    assert classifier.accuracy(Images(images, right), **noisy, seed=1) == 1
    alone = [trainer.model.logits(torch.zeros(7, 12), torch.tensor(80.0), block=1, images=images)]
    torch.testing.assert_close(classifier.alone(images, 1), alone[0])


def test_all_digits_are_one_batch():
    assert max(map(len, digits())) <= classifiers.AT_ONCE


# Other images than digits


def test_the_default_patches():
    sizes = {8: 2, 16: 4, 28: 7, 32: 4, 64: 4, 96: 6, 224: 7, 31: 1, 3: 1}
    assert {size: patch_size_of(size, size) for size in sizes} == sizes
    assert patch_size_of(28, 32) == 4


@given(st.integers(1, 300), st.integers(1, 300))
def test_default_patches_cut_every_image(height, width):
    size = patch_size_of(height, width)
    assert math.gcd(height, width) % size == 0
    assert size == 1 or min(height, width) >= 4 * size
    assert 1 <= size <= 7


def test_the_digits_network_is_what_it_was():
    config = ViTRun().vit_config(*digits())
    assert (config.image_size, config.channels, config.patch_size) == (8, 1, 2)
    assert config.num_classes == 10


@pytest.mark.parametrize("end_to_end", [False, True])
def test_the_network_follows_the_images(tmp_path, end_to_end):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.arange(40) % 4)
    sizes = {**TINY, "patch_size": None, "end_to_end": end_to_end}
    trainer = ViTRun(steps=1, data=str(tmp_path / "a.npz"), **sizes).trainer()
    config = trainer.network.config
    assert (config.height_width, config.channels, config.num_classes) == ((8, 12), 3, 4)
    assert config.patch_size == 2
    trainer.step(0)
    assert 0 <= trainer.measure()["accuracy"] <= 1


def test_arrays_of_half_precision_are_trained_on():
    data = make_data()
    half = Images(data.images.half(), data.labels)
    trainer = ViTTrainer(ViTRun(steps=1, **TINY), half, half)
    trainer.step(0)
    assert len(trainer.measure()["blocks_alone"]) == 3


def test_a_class_of_the_held_out_images_alone_is_known():
    data = make_data()
    fewer = data[data.labels < 9]
    assert ViTRun(**TINY).vit_config(fewer, data).num_classes == 10


@pytest.mark.parametrize(
    ("data", "evaluated", "message"),
    [
        (make_data(4), make_data(4), "batch_size must be at most .* images 4, got 8"),
        (make_data(), make_data(0), "enough images to hold some out, got 16"),
        (
            Images(make_data().images, torch.zeros(16, dtype=torch.int64)),
            Images(make_data().images, torch.zeros(16, dtype=torch.int64)),
            "at least 2 classes, got 1; give each class a sub-folder",
        ),
    ],
)
def test_images_that_cannot_be_learned_are_refused(data, evaluated, message):
    with pytest.raises(ValueError, match=message):
        ViTTrainer(ViTRun(**TINY), data, evaluated)


def test_a_patch_that_does_not_fit_is_refused():
    for size in (0, 3):
        with pytest.raises(ValueError, match="patch_size"):
            ViTTrainer(ViTRun(**{**TINY, "patch_size": size}), make_data(), make_data())
