"""Different n-grams and MAUVE, added to scores that lack them."""

import pytest
import torch

from benchmarks.study import text_features
from benchmarks.study.text_features import held_out_texts, more_scores
from dblocks.recipes.data.text import load_corpus

CONTEXT = 40


@pytest.fixture
def corpus(tmp_path):
    story = tmp_path / "story.txt"
    story.write_text("".join(f"{i} is followed by {i + 1}. " for i in range(400)))
    return load_corpus(str(story))


@pytest.fixture
def samples(corpus):
    _, truth = held_out_texts(corpus, CONTEXT)
    return {"good": truth, "bad": ["x" * len(text) for text in truth]}


def empty(samples):
    return {name: {} for name in (*samples, "reference")}


def test_without_the_packages_n_grams_alone_are_added(corpus, samples, monkeypatch):
    monkeypatch.setattr(text_features, "has_mauve", lambda: False)
    found = more_scores(samples, {"good"}, corpus, CONTEXT, empty(samples))
    assert {name: [*scores] for name, scores in found.items()} == {
        name: ["distinct"] for name in ("good", "bad", "reference")
    }
    assert found["bad"]["distinct"] < 0.01 < found["good"]["distinct"]
    assert found["good"] == found["reference"]
    assert more_scores(samples, {"good"}, corpus, CONTEXT, found) == {}


def test_samples_that_are_shown_get_mauve_and_the_text_itself_of_other_places(
    corpus, samples, monkeypatch
):
    seen = []

    def features(texts):
        seen.append(texts)
        return torch.tensor([[float(len(set(text)))] for text in texts])

    monkeypatch.setattr(text_features, "has_mauve", lambda: True)
    monkeypatch.setattr(text_features.mauve, "sentence_features", features)
    monkeypatch.setattr(
        text_features.mauve, "mauve", lambda real, generated: float(real.equal(generated))
    )
    found = more_scores(samples, {"good"}, corpus, CONTEXT, empty(samples))
    assert found["good"]["mauve"] == 1.0
    assert "mauve" not in found["bad"]  # not shown
    (texts,) = seen  # the encoder is read once
    truth = samples["good"]
    other = texts[2 * len(truth) :]
    assert len(other) == len(truth)
    assert {len(text) for text in other} == {len(truth[0])}
    assert not set(other) & set(truth)
    # What is known is not computed again.
    assert more_scores(samples, {"good"}, corpus, CONTEXT, found) == {}
    assert len(seen) == 1
