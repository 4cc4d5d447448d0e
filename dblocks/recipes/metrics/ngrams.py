"""Metrics of generated text without a model: n-grams and repetition."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def ngrams(text: str, n: int) -> Counter[str]:
    """Counts each sequence of `n` characters."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


def ngram_divergence(texts: Sequence[str], reference: str, n: int) -> float:
    """Jensen-Shannon divergence of the n-grams of `texts` and of `reference`, in bits, in [0, 1].

    It is `(KL(p || m) + KL(q || m)) / 2` with the relative frequencies p and q and their mean m. It
    is larger for smaller samples: only compare texts of the same size.

    Raises:
        ValueError: one side has no sequence of n characters.
    """
    ours = sum((ngrams(text, n) for text in texts), Counter[str]())
    theirs = ngrams(reference, n)
    if not ours or not theirs:
        raise ValueError(f"both sides must have at least {n} characters, got a shorter text")
    count, total = ours.total(), theirs.total()
    bits = 0.0
    for gram in ours.keys() | theirs.keys():
        p, q = ours[gram] / count, theirs[gram] / total
        m = (p + q) / 2
        bits += sum(share * math.log2(share / m) for share in (p, q) if share) / 2
    return min(max(bits, 0.0), 1.0)


def known_share(texts: Sequence[str], known: str, n: int) -> float:
    """The fraction of the n-grams of `texts` that occur in the text `known`, in [0, 1]."""
    ours = sum((ngrams(text, n) for text in texts), Counter[str]())
    if not ours:
        raise ValueError(f"a text must have at least {n} characters, got shorter ones")
    grams = ngrams(known, n).keys()
    return sum(count for gram, count in ours.items() if gram in grams) / ours.total()


def repetition_rate(texts: Sequence[str], n: int) -> float:
    """The fraction of n-grams that occurred earlier in the same text, in [0, 1]."""
    counts = [ngrams(text, n) for text in texts]
    total = sum(count.total() for count in counts)
    if not total:
        raise ValueError(f"a text must have at least {n} characters, got shorter ones")
    return 1 - sum(map(len, counts)) / total


def distinct_share(texts: Sequence[str], n: int, *, words: bool = False) -> float:
    """The fraction of distinct n-grams among those of all texts, in [0, 1]: "distinct-n".

    It is lower for repetition within and across texts, and for longer texts: only compare texts of
    the same size.

    Args:
        texts: the texts.
        n: number of characters or words.
        words: whether n-grams are of words between spaces, as published, instead of characters.

    Raises:
        ValueError: all texts are shorter than n, or n is not positive.

    Source: Li et al. 2016, arXiv 1510.03055.
    """
    if words:
        found = sum((_word_ngrams(text, n) for text in texts), Counter[tuple[str, ...]]())
    else:
        found = sum((ngrams(text, n) for text in texts), Counter[str]())
    if not found:
        kind = "words" if words else "characters"
        raise ValueError(f"a text must have at least {n} {kind}, got shorter ones")
    return len(found) / found.total()


def _word_ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
