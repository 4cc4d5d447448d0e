import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dblocks.recipes.metrics.images import frechet_distance, in_batches, standard_deviation
from tools import seeded


def features(n, mean, cov, seed=0):
    """n features whose sample mean and covariance are these to rounding."""
    D = len(mean)
    x = torch.randn(n, D, generator=seeded(seed), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    return mean + x @ torch.linalg.cholesky(cov).T


def covariance(D, seed):
    factor = torch.randn(D, D, generator=seeded(seed), dtype=torch.float64)
    return factor @ factor.T / D + 0.1 * torch.eye(D, dtype=torch.float64)


@settings(max_examples=20)
@given(D=st.integers(1, 6), seed=st.integers(0, 1000))
def test_it_is_the_distance_of_two_normal_distributions(D, seed):
    cov_a, cov_b = covariance(D, seed), covariance(D, seed + 1)
    mean_a, mean_b = torch.randn(2, D, generator=seeded(seed + 2), dtype=torch.float64)
    root = torch.linalg.eigh(cov_a)
    root = (root.eigenvectors * root.eigenvalues.sqrt()) @ root.eigenvectors.T
    common = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    expected = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * common
    a, b = features(40, mean_a, cov_a, seed), features(30, mean_b, cov_b, seed + 5)
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9, abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9, abs=1e-9)


def test_known_cases():
    one, zero = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    a = features(50, zero, one)
    assert frechet_distance(a, a) < 1e-12
    shifted = features(50, zero + 2, one, seed=1)
    assert frechet_distance(a, shifted) == pytest.approx(12)
    wider = features(50, zero, 9 * one, seed=2)  # (3 - 1)^2 in each direction
    assert frechet_distance(a, wider) == pytest.approx(12)
    # A direction without variance, as of a feature that never fires.
    flat = a * torch.tensor([1.0, 1.0, 0.0])
    assert frechet_distance(a, flat) == pytest.approx(1)
    assert frechet_distance(a.float(), wider.float()) == pytest.approx(12, rel=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((5, 3), (5, 4), r"with one D, got \[5, 3\] and \[5, 4\]; flatten them"),
        ((5, 3, 1), (5, 3), r"got \[5, 3, 1\] and"),
        ((5, 0), (5, 0), "with one D"),
        ((3, 3), (9, 3), "needs more samples than the 3 features, got 3; use more"),
        ((9, 3), (0, 3), "needs more samples than the 3 features, got 0"),
    ],
)
def test_shapes_are_checked(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(torch.randn(a), torch.randn(b))


def test_features_must_be_finite():
    with pytest.raises(ValueError, match="features must be finite"):
        frechet_distance(torch.full((5, 2), math.nan), torch.randn(5, 2))


def test_the_standard_deviation_is_that_of_all_elements():
    images = torch.randn(3000, 1, 2, 2, generator=seeded()) * 3 + 100
    expected = images.double().std(correction=0).item()
    assert standard_deviation(images) == pytest.approx(expected, rel=1e-9)
    assert standard_deviation(torch.ones(2, 1, 1, 1)) == 0
    with pytest.raises(ValueError, match="needs at least 2 numbers, got 0"):
        standard_deviation(torch.empty(0, 1, 2, 2))


def test_batches_are_put_together_again():
    images = torch.randn(10, 2)
    sizes = []

    def double(chunk):
        sizes.append(len(chunk))
        return 2 * chunk

    assert torch.equal(in_batches(double, images, batch_size=4), 2 * images)
    assert sizes == [4, 4, 2]
