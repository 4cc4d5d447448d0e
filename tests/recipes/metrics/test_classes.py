import math

import pytest
import torch

from dblocks.recipes.metrics.classes import accuracy, evaluate, mean_std


def test_accuracy_counts_the_largest_logits():
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    assert accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.75


@pytest.mark.parametrize(("logits", "labels"), [((4,), 4), ((4, 2), 3)])
def test_accuracy_checks_shapes(logits, labels):
    with pytest.raises(ValueError, match=r"logits must have shape \[N, classes\]"):
        accuracy(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


def test_accuracy_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one sample"):
        accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_evaluate_sees_every_sample_once_and_no_gradient():
    sizes = []

    def predict(images):
        sizes.append(len(images))
        assert not torch.is_grad_enabled()
        return torch.nn.functional.one_hot(images[:, 0].long(), 3).float()

    labels = torch.tensor([0, 1, 2, 0, 1])
    assert evaluate(predict, labels[:, None], labels, batch_size=2) == 1
    assert sizes == [2, 2, 1]


def test_mean_std_is_the_samples():
    assert mean_std([1.0, 2.0, 3.0]) == (2.0, 1.0)


def test_mean_std_of_one_value_has_no_spread():
    mean, std = mean_std([4.0])
    assert mean == 4
    assert math.isnan(std)


def test_mean_std_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one value"):
        mean_std([])
