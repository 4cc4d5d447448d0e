"""Scores of generated text that need no model of ours: different n-grams, and MAUVE.

MAUVE is in the features of a pretrained encoder, whose packages are optional.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from dblocks.recipes.data.text import Corpus
from dblocks.recipes.metrics import mauve
from dblocks.recipes.metrics.ngrams import distinct_share
from dblocks.recipes.text_run import PROMPT, continuations

NGRAM = 4  # characters; the held-out text has some 13,000 different runs of four
PACKAGES = ("mauve", "faiss", "transformers", "tokenizers", mauve.ENCODER)

Texts = Mapping[str, Sequence[str]]
Scores = Mapping[str, Mapping[str, float]]


def held_out_texts(corpus: Corpus, context: int) -> tuple[Tensor, list[str]]:
    """Prompts [SAMPLES, PROMPT] of the held-out text, and how it goes on behind each."""
    prompts, truth = continuations(corpus.evaluated, context)
    return prompts, [corpus.tokenizer.decode(row.tolist()) for row in truth]


def more_scores(
    samples: Texts, chosen: Set[str], corpus: Corpus, context: int, scores: Scores
) -> dict[str, dict[str, float]]:
    """What scores lack, by the samples' names; nothing where they are complete.

    Args:
        samples: by name.
        chosen: names of those that get a MAUVE score, beside the reference.
        corpus: what they continue.
        context: tokens of a prompt and a sample.
        scores: what is known of them, and under "reference" of the held-out text in their place.
    """
    texts = {**samples, "reference": held_out_texts(corpus, context)[1]}
    found: dict[str, dict[str, float]] = {}
    for name, written in texts.items():
        if "distinct" not in scores[name]:
            found[name] = {"distinct": distinct_share(written, NGRAM)}
    missing = [name for name in sorted({*chosen, "reference"}) if "mauve" not in scores[name]]
    if missing and has_mauve():
        for name, value in _mauve(texts, missing, corpus, context).items():
            found.setdefault(name, {})["mauve"] = value
    return found


def has_mauve() -> bool:
    """Whether the packages of the extra are there."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def _mauve(texts: Texts, names: Sequence[str], corpus: Corpus, context: int) -> dict[str, float]:
    """Of each against the held-out text in its place; of that against as much of other places."""
    sets = {"": texts["reference"], **{name: texts[name] for name in names}}
    if "reference" in sets:
        sets["reference"] = _between(corpus, context, len(texts["reference"]))
    rows = mauve.sentence_features([text for written in sets.values() for text in written])
    parts = dict(zip(sets, rows.split([len(written) for written in sets.values()]), strict=True))
    return {name: mauve.mauve(parts[""], parts[name]) for name in names}


def _between(corpus: Corpus, context: int, count: int) -> list[str]:
    """As much of the held-out text as the samples, from the middle between their places."""
    tokens, length = corpus.evaluated.tokens, context - PROMPT
    starts = torch.linspace(0, len(tokens) - context, count, dtype=torch.float64)
    middles = ((starts[:-1] + starts[1:]) / 2).long().tolist()
    # One place fewer lies between: the last is the first again, a few characters on.
    middles.append(min(middles[0] + length, len(tokens) - length))
    return [corpus.tokenizer.decode(tokens[s : s + length].tolist()) for s in middles]
