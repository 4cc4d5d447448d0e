import sys

import pytest
import torch

from dblocks.recipes.data.digits import digits, load_digits
from dblocks.recipes.data.splits import batch_indices, stratified_split


def test_digits_are_8x8_and_scaled():
    digits = load_digits()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.float32
    assert digits.images.min() == -1
    assert digits.images.max() == 1
    assert digits.labels.dtype == torch.int64
    assert digits.labels.bincount().shape == (10,)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_split_is_stratified_and_disjoint(fraction):
    labels = load_digits().labels
    kept, taken = stratified_split(labels, fraction, seed=3)
    assert torch.equal(torch.cat([kept, taken]).sort().values, torch.arange(len(labels)))
    share = labels[taken].bincount() - fraction * labels.bincount()
    assert share.abs().max() <= 1


def test_split_follows_its_seed():
    labels = torch.arange(200) % 7
    first, again, other = (stratified_split(labels, 0.3, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_split_refuses_an_empty_part():
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        stratified_split(torch.zeros(4), 1, seed=0)


def test_final_part_holds_out_thirty_percent():
    training, held_out = digits("final")
    assert (len(training), len(held_out)) == (1258, 539)
    assert held_out.labels.bincount().min() == 53


def _rows(images):
    return {tuple(row) for row in images.images.flatten(1).tolist()}


def test_selection_never_sees_the_held_out_part():
    fit, validation = digits("selection")
    training, held_out = digits("final")
    assert (len(fit), len(validation)) == (1007, 251)
    assert len(fit) + len(validation) == len(training)
    assert _rows(fit) | _rows(validation) == _rows(training)
    assert not (_rows(fit) | _rows(validation)) & _rows(held_out)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn.*dblocks\[eval\]"):
        load_digits()


def test_batches_are_full_and_cover_an_epoch_without_repetition():
    seen = torch.cat([batch_indices(103, 25, seed=1, step=s) for s in range(4)])
    assert len(seen) == 100
    assert len(seen.unique()) == 100


def test_batches_are_functions_of_seed_and_step():
    def draw(seed, step):
        return batch_indices(64, 16, seed=seed, step=step)

    assert torch.equal(draw(0, 9), draw(0, 9))
    assert not torch.equal(draw(0, 0), draw(1, 0))
    epochs = [torch.cat([draw(0, 4 * e + i) for i in range(4)]) for e in range(2)]
    assert not torch.equal(*epochs)


@pytest.mark.parametrize("batch_size", [0, 9])
def test_batch_size_must_fit(batch_size):
    with pytest.raises(
        ValueError, match=f"between 1 and the number of samples 8, got {batch_size}"
    ):
        batch_indices(8, batch_size, seed=0, step=0)
