import pytest
import torch

from dblocks.recipes.data.splits import Images
from dblocks.recipes.metrics import judge as module
from dblocks.recipes.metrics.judge import judge_of, steps_of, train_judge
from tools import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DBLOCKS_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "LEAST_STEPS", 3)
    return tmp_path


def some_images(seed=0, channels=3):
    pixels = torch.rand(40, channels, 9, 7, generator=seeded(seed)) * 2 - 1
    return Images(pixels, torch.arange(40) % 4)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_a_judge_is_trained_once_for_each_data_set(kept, monkeypatch):
    images = some_images()
    first = judge_of(images, 4)
    assert same(first, train_judge(images, 4, steps=3))
    (file,) = kept.iterdir()
    other = judge_of(some_images(1), 4)
    assert not same(first, other)
    relabelled = Images(images.images, images.labels.flip(0))
    assert not same(first, judge_of(relabelled, 4))
    judge_of(images, 5)
    assert len(list(kept.iterdir())) == 4
    state = torch.get_rng_state()
    monkeypatch.setattr(module, "train_judge", None)
    again = judge_of(images, 4)
    assert same(first, again)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    file.unlink()
    with pytest.raises(TypeError):
        judge_of(images, 4)


def test_larger_sets_take_an_epoch(monkeypatch):
    monkeypatch.undo()

    def steps(n):
        return steps_of(Images(torch.empty(n, 1, 1, 1), torch.zeros(n).long()))

    assert [steps(n) for n in (1258, 60_000, 1_281_167)] == [400, 937, 4000]
