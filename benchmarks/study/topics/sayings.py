"""The data: which topic a saying is filed under, in Debian's package `fortunes`."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dblocks.recipes.data.batches import Batch
from dblocks.recipes.data.splits import (
    HELD_OUT,
    SPLIT_SEED,
    VALIDATION,
    Part,
    batch_indices,
    stratified_split,
)

FOLDER = Path("/usr/share/games/fortunes")
FEWEST = 140  # sayings of a topic
# Files of all sorts, of disclaimers and of drawings: they have no topic.
NO_TOPIC = {"ascii-art", "cookie", "disclaimer", "fortunes", "miscellaneous", "translate-me"}
CONTEXT = 48  # tokens that are read of a saying


class Sayings(NamedTuple):
    """Texts and the numbers of their topics."""

    texts: list[str]
    labels: Tensor
    """int64 [N]."""
    topics: list[str]


def load_sayings(folder: Path = FOLDER) -> Sayings:
    """All sayings of the topics that have at least 140, each once.

    A saying that is filed under two topics is left out.

    Raises:
        ValueError: the folder is not there or holds fewer than two topics.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} must be the folder of Debian's package fortunes, got none; install it, or "
            "give a folder whose files hold sayings between lines of %"
        )
    paths = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.suffix]
    found: dict[str, set[str]] = {}
    for path in paths:
        if path.name in NO_TOPIC or path.is_symlink():
            continue
        for saying in re.split(r"^%\s*$", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if text := " ".join(saying.split()):
                found.setdefault(text, set()).add(path.name)
    once = {text: topics.pop() for text, topics in found.items() if len(topics) == 1}
    counts: dict[str, int] = {}
    for topic in once.values():
        counts[topic] = counts.get(topic, 0) + 1
    topics = sorted(topic for topic, count in counts.items() if count >= FEWEST)
    if len(topics) < 2:
        raise ValueError(
            f"{folder} must hold at least 2 topics of {FEWEST} sayings, got {len(topics)}"
        )
    chosen = [(text, topics.index(topic)) for text, topic in once.items() if topic in topics]
    texts, labels = zip(*chosen, strict=True)
    return Sayings(list(texts), torch.tensor(labels), topics)


class Texts(NamedTuple):
    """Sayings as a model reads them."""

    tokens: Tensor
    """int64 [N, 48]."""
    attention_mask: Tensor
    """1 at tokens, 0 at the padding behind them, int64 [N, 48]."""
    labels: Tensor
    """int64 [N]."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> Batch:
        """The texts of some indices, as long as the longest of them."""
        mask = self.attention_mask[index]
        longest = int(mask.sum(1).max())
        return {
            "tokens": self.tokens[index, :longest],
            "attention_mask": mask[:, :longest],
            "labels": self.labels[index],
        }


def encode(sayings: Sayings, tokenizer: Any) -> Texts:
    """The first 48 tokens of each."""
    got = tokenizer(
        sayings.texts, truncation=True, max_length=CONTEXT, padding="max_length",
        return_tensors="pt",
    )  # fmt: skip
    return Texts(got["input_ids"], got["attention_mask"], sayings.labels)


def parts(texts: Texts, part: Part) -> tuple[Texts, Texts]:
    """What to train on and what to evaluate on: 30 % are held out, the same ones in every run."""

    def of(source: Texts, index: Tensor) -> Texts:
        return Texts(*(value[index] for value in source))

    kept, taken = stratified_split(texts.labels, HELD_OUT, SPLIT_SEED)
    training, held_out = of(texts, kept), of(texts, taken)
    if part == "final":
        return training, held_out
    fit, validation = stratified_split(training.labels, VALIDATION, SPLIT_SEED)
    return of(training, fit), of(training, validation)


class SayingsData:
    """Batches of sayings, as functions of (seed, step)."""

    def __init__(self, texts: Texts, batch_size: int, seed: int) -> None:
        self.of, self.batch_size, self.seed = texts, batch_size, seed

    def batch(self, step: int) -> Batch:
        """Tokens and attention_mask [N, T], and labels [N]."""
        size = len(self.of)
        return self.of.batch(batch_indices(size, self.batch_size, seed=self.seed, step=step))

    def texts(self) -> dict[str, str]:
        """Nothing beside the network."""
        return {}

    def digest(self) -> str:
        """Of the tokens and labels."""
        digest = hashlib.sha256()
        for value in self.of:
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()
