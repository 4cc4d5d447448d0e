import dataclasses
import functools

import numpy as np
import pytest
import torch

from dblocks.blocks import DiffusionBlocks
from dblocks.recipes import dit as recipe
from dblocks.recipes import image_grid
from dblocks.recipes.data.digits import digits
from dblocks.recipes.data.splits import Images
from dblocks.recipes.dit import GPU, DiTRun, DiTTrainer, held_out_loss
from dblocks.recipes.metrics import denoising
from dblocks.recipes.metrics.images import standard_deviation
from dblocks.recipes.metrics.judge import ImageClassifier, train_judge
from dblocks.recipes.records import train
from tools import randomized

TINY = {"width": 12, "depth": 3, "heads": 2, "patch_size": 4, "batch_size": 16, "points": 1}
TINY |= {"samples": 40, "sampling_steps": 6, "steps": 3}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _short_judge(monkeypatch):
    monkeypatch.setattr(recipe, "judge_of", functools.partial(train_judge, steps=3))


def make_data(n=60, classes=10, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, channels, 8, 8, generator=generator) * 2 - 1
    return Images(images, torch.arange(n) % classes)


def begin(run, **data):
    return DiTTrainer(run, make_data(**data), make_data(seed=1, **data))


def test_run_round_trips():
    for run in (DiTRun(lr=3e-4), GPU):
        assert DiTRun.from_json(run.to_json()) == run


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "samples must be positive, got 0"),
        ({"sampling_steps": 0}, "sampling_steps must be positive, got 0"),
        ({"blocks": 13}, "got 13"),
    ],
)
def test_run_checks_its_numbers(fields, message):
    with pytest.raises(ValueError, match=message):
        DiTRun(**fields)


def test_the_larger_recipe_is_the_papers_network():
    cifar = Images(torch.zeros(20, 3, 32, 32), torch.arange(20) % 10)
    config = GPU.dit_config(cifar)
    assert (config.width, config.depth, config.heads, config.patch_size) == (384, 12, 6, 2)
    assert config.height_width == (32, 32)
    assert GPU.bf16
    assert GPU.device == "cuda"


def test_sigma_data_is_the_standard_deviation_of_the_training_images():
    data = digits()[0]
    schedule = DiTRun().blocks_config(data).schedule
    assert schedule.sigma_data == standard_deviation(data.images)
    assert schedule.sigma_data == pytest.approx(0.75, abs=0.01)
    assert DiTRun(sigma_data=0.5).blocks_config(data).schedule.sigma_data == 0.5


@pytest.mark.parametrize("end_to_end", [False, True])
def test_a_run_leaves_what_it_is_judged_by(end_to_end):
    record = train(
        DiTRun(end_to_end=end_to_end, data="digits", **{**TINY, "batch_size": 64})
    ).record
    judged = record["judged"]
    assert judged.keys() == {
        "distance", "distance_unguided", "distance_of_training_images",
        "precision", "recall", "precision_of_training_images", "recall_of_training_images",
        "accuracy", "accuracy_unguided", "accuracy_on_held_out",
    }  # fmt: skip
    assert judged["distance_of_training_images"] < judged["distance"]
    assert 0 <= judged["precision"] <= 1
    assert judged["recall_of_training_images"] > 0.3 > judged["recall"]
    assert 0 <= judged["accuracy"] <= 1
    assert record["loss"] == record["curve"][-1]["loss"] > 0
    blocks, calls = (1, [12]) if end_to_end else (3, [4, 4, 4])
    assert record["blocks"]["num_blocks"] == blocks
    assert record["calls_of_blocks"] == calls
    assert record["layer_evaluations_per_image"] == sum(calls) * 3 // blocks
    assert record["layer_evaluations"] == 3 * 3 // blocks
    assert record["seconds_per_image"] > 0
    assert image_grid.decode(record["pictures"]).shape == (40, 8, 8, 1)


def test_end_to_end_is_one_block_of_all_layers():
    trainer = begin(DiTRun(end_to_end=True, **TINY))
    assert isinstance(trainer.trained, DiffusionBlocks)
    assert trainer.trained.layer_ranges == ((0, 3),)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_runs_of_one_seed_are_bitwise_equal(end_to_end):
    def losses(seed):
        trainer = begin(DiTRun(**{**TINY, "steps": 4}, seed=seed, end_to_end=end_to_end))
        return [trainer.step(step) for step in range(4)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_samples_repeat_and_stay_in_range():
    trainer = begin(DiTRun(**TINY))
    randomized(trainer.network)
    first, again = trainer.sample(2.0), trainer.sample(2.0)
    assert torch.equal(first.images, again.images)
    assert first.labels.bincount().tolist() == [4] * 10
    assert not torch.equal(first.images, trainer.sample(1.0).images)
    assert first.images.aminmax() == trainer.data.images.aminmax()


def test_the_loss_compares_across_blocks():
    """A network that puts out zero has the same loss however it is cut."""
    data = make_data()
    losses = {
        run.blocks: held_out_loss(begin(run).trained, data, batch_size=64)
        for run in (DiTRun(**{**TINY, "blocks": b}) for b in (1, 2, 3))
    }
    assert losses[1] == pytest.approx(losses[3], rel=1e-6)
    assert losses[1] == pytest.approx(losses[2], rel=1e-6)
    assert losses[1] == pytest.approx(1, abs=0.1)  # the target has unit variance


def test_data_without_classes_is_not_judged():
    trainer = begin(DiTRun(**TINY), classes=1)
    assert trainer.network.config.num_classes == 0
    trainer.step(0)
    results = trainer.results(trainer.measure())
    assert results["judged"] is None
    assert results["calls_of_blocks"] == [2, 2, 2]
    assert image_grid.decode(results["pictures"]).shape == (5, 8, 8, 1)


def test_latents_are_no_pictures(tmp_path):
    latents = make_data(channels=4)
    np.savez(tmp_path / "a.npz", latents=latents.images.half().numpy(), labels=latents.labels)
    run = DiTRun(data=str(tmp_path / "a.npz"), scale=0.5, **TINY)
    trainer = run.trainer()
    assert trainer.network.config.channels == 4
    assert trainer.trained.config.schedule.sigma_data == pytest.approx(0.29, abs=0.02)
    trainer.step(0)
    # 18 images are held out, too few for the features: a finished run is not lost for that.
    found = trainer.results(trainer.measure())
    assert found["pictures"] is None
    assert found["judged"]["distance"] is None
    assert 0 <= found["judged"]["accuracy"] <= 1
    trainer.evaluated = trainer.data
    assert trainer.results(trainer.measure())["judged"]["distance"] > 0


def test_samples_are_of_classes_that_there_are():
    data = make_data()
    data = Images(data.images, torch.where(data.labels < 5, 3, 8))
    trainer = DiTTrainer(DiTRun(**{**TINY, "samples": 6}), data, data)
    assert trainer.sample(1.0).labels.tolist() == [3, 8, 3, 8, 3, 8]


def test_a_batch_must_fit():
    with pytest.raises(ValueError, match="number of training images 60, got 64"):
        begin(dataclasses.replace(DiTRun(**TINY), batch_size=64))


def test_the_judge_repeats_itself_and_learns():
    data = digits()[0]
    judge, again = (train_judge(data, 10, steps=40) for _ in range(2))
    images = data.images
    assert torch.equal(judge(images), again(images))
    assert (judge(images).argmax(-1) == data.labels).float().mean() > 0.6  # chance is 0.1
    norms = judge.features(images).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 32**0.5), rtol=1e-2, atol=0)
    assert ImageClassifier(3, 4)(torch.zeros(2, 3, 5, 9)).shape == (2, 4)


def test_the_loss_of_many_images_is_that_of_some_of_them(monkeypatch):
    monkeypatch.setattr(denoising, "MOST", 5)
    data = Images(torch.randn(13, 1, 8, 8), torch.arange(13))
    assert denoising.measured(data).labels.tolist() == [0, 2, 5, 7, 10]
    few = data[torch.arange(5)]
    assert denoising.measured(few) is few
