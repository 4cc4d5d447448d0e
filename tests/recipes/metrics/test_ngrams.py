import math

import pytest

from dblocks.recipes.metrics.ngrams import (
    distinct_share,
    known_share,
    ngram_divergence,
    ngrams,
    repetition_rate,
)


def test_ngrams_overlap():
    assert ngrams("aaab", 2) == {"aa": 2, "ab": 1}
    assert not ngrams("a", 2)


def test_divergence_is_zero_for_equal_and_one_for_disjoint_text():
    assert ngram_divergence(["abcabc"], "abcabc", 2) == 0
    assert ngram_divergence(["abab"], "cdcd", 2) == pytest.approx(1)


def test_divergence_of_known_distributions():
    # p = (1/2, 1/2), q = (1, 0): KL to the mean (3/4, 1/4) on both sides, in bits.
    p_side = 0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25)
    q_side = math.log2(1 / 0.75)
    assert ngram_divergence(["ab"], "aa", 1) == pytest.approx((p_side + q_side) / 2)
    assert ngram_divergence(["aa"], "ab", 1) == pytest.approx((p_side + q_side) / 2)


def test_texts_are_not_joined():
    assert known_share(["ab", "ba"], "ba", 2) == 0.5
    assert ngram_divergence(["ab", "ab"], "ab", 2) == 0


def test_repetition_counts_what_came_before_in_the_same_text():
    assert repetition_rate(["abcd"], 2) == 0
    assert repetition_rate(["aaaa"], 2) == pytest.approx(2 / 3)
    assert repetition_rate(["ab", "ab"], 2) == 0


def test_distinct_ngrams_are_counted_over_all_texts():
    assert distinct_share(["abcd", "efgh"], 2) == 1
    assert distinct_share(["aaaa"], 1) == 0.25
    assert distinct_share(["ab", "ab"], 2) == 0.5  # also what another text has said
    assert distinct_share(["ab", "ba"], 1) == 0.5
    words = ["the cat and the dog", "a  cat"]
    assert distinct_share(words, 1, words=True) == pytest.approx(5 / 7)
    assert distinct_share(words, 2, words=True) == 1
    with pytest.raises(ValueError, match="at least 3 words"):
        distinct_share(["two words"], 3, words=True)


@pytest.mark.parametrize(
    "call",
    [
        lambda: distinct_share(["a"], 2),
        lambda: ngram_divergence(["a"], "abc", 2),
        lambda: ngram_divergence(["abc"], "a", 2),
        lambda: known_share([], "abc", 2),
        lambda: repetition_rate(["a"], 2),
    ],
)
def test_too_short_a_text_is_an_error(call):
    with pytest.raises(ValueError, match="at least 2 characters"):
        call()


def test_n_is_positive():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        ngrams("a", 0)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        distinct_share(["a"], 0, words=True)
