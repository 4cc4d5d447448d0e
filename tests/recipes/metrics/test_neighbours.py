import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dblocks.recipes.metrics import neighbours
from dblocks.recipes.metrics.neighbours import precision_recall
from tools import seeded


def by_hand(samples, others, k):
    """The share of samples in a ball around one of the others, one by one."""
    inside = 0
    radii = []
    for i, a in enumerate(others):
        rest = sorted(math.dist(a, b) for j, b in enumerate(others) if j != i)
        radii.append(rest[k - 1])
    for x in samples:
        inside += any(math.dist(x, b) <= r for b, r in zip(others, radii, strict=True))
    return inside / len(samples)


@given(st.integers(4, 12), st.integers(4, 12), st.integers(1, 3), st.integers(0, 99))
def test_it_is_the_definition(n, m, k, seed):
    generator = seeded(seed)
    # On a grid, so that equal distances and equal samples occur, exactly.
    real = torch.randint(0, 5, (n, 2), generator=generator).double()
    generated = torch.randint(1, 7, (m, 2), generator=generator).double()
    found = precision_recall(real, generated, k)
    assert found.precision == by_hand(generated.tolist(), real.tolist(), k)
    assert found.recall == by_hand(real.tolist(), generated.tolist(), k)
    assert precision_recall(generated, real, k) == found[::-1]


def test_known_cases(monkeypatch):
    monkeypatch.setattr(neighbours, "AT_ONCE", 30)
    real = torch.randn(100, 5, generator=seeded())
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real[torch.randperm(100, generator=seeded())]) == (1, 1)
    assert precision_recall(real, real + 1000) == (0, 0)
    # All of one kind are good, and cover little; and the other way round.
    some = real[:1] + 1e-4 * torch.randn(100, 5, generator=seeded(1))
    found = precision_recall(real, some)
    assert found.precision == 1
    assert found.recall <= 0.02
    assert precision_recall(some, real) == found[::-1]
    # Half of the samples are among the real ones.
    half = torch.cat([real[:50], real[:50] + 1000])
    assert precision_recall(real, half).precision == 0.5


@pytest.mark.parametrize(
    ("a", "b", "k", "message"),
    [
        ((9, 3), (9, 4), 3, r"with one D, got \[9, 3\] and \[9, 4\]"),
        ((9,), (9,), 3, "with one D"),
        ((3, 2), (9, 2), 3, "more than 3 samples, got 3"),
        ((9, 2), (1, 2), 1, "more than 1 samples, got 1"),
        ((9, 2), (9, 2), 0, "k must be at least 1, got 0"),
    ],
)
def test_features_are_checked(a, b, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(torch.randn(a), torch.randn(b), k)


def test_features_must_be_finite():
    with pytest.raises(ValueError, match="features must be finite"):
        precision_recall(torch.randn(9, 2), torch.full((9, 2), math.inf))
