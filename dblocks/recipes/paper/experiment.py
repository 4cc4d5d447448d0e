"""What an experiment of the paper is: the settings, where each is from, and what it reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Value(NamedTuple):
    """A setting: the value of a field of a run."""

    value: Any
    source: str
    """Where it is from or, of a choice of ours, why it is so."""


class Published(NamedTuple):
    """A row of a table of the paper."""

    method: str
    value: str
    """As it is printed there."""
    table: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment of the paper: how to train a network on a data set, and what that reached."""

    network: str
    """As the command line names it."""
    data: str
    """The data set, a name that `--data` takes."""
    files: str
    """What its files are, for whoever has to bring them."""
    epochs: int
    """How often a block sees the data."""
    samples: int
    """Of the training part: images, or tokens of a text."""
    shape: tuple[int, ...] = ()
    """Channels, height and width of an image; none of a text."""
    labels: int
    """Classes of images, or tokens of the vocabulary."""
    published: Mapping[str, Value]
    """Fields of the run that the paper or its released code gives, and those that follow."""
    ours: Mapping[str, Value]
    """Fields that neither gives."""
    differs: tuple[str, ...]
    """What is not as in the paper, in sentences."""
    metric: str
    """What the rows say."""
    rows: tuple[Published, ...]
    measured: Callable[[Mapping[str, Any]], float | None]
    """Reads the same quantity of a record here; None where it is not measured here."""
    unmeasured: str = ""
    """How to measure it elsewhere, where it is not measured here."""
    tokenizer: str = ""
    """The tokenizer that the text needs by `--tokenizer`; none: characters."""

    def settings(self) -> dict[str, Any]:
        """The fields of the run, but for the data."""
        return {name: value.value for name, value in {**self.published, **self.ours}.items()}


CUDA = {"device": Value("cuda", "nobody trains these on a CPU")}


def not_measured(record: Mapping[str, Any]) -> None:
    """Nothing: what the paper measures needs the features of a large pretrained network."""


def steps(*, epochs: int, samples: int, batch_size: int, blocks: int) -> int:
    """Steps in which each of the blocks sees the data so often, without incomplete batches.

    A step trains one block. Source: App. H, "training all B blocks for K iterations each".
    """
    return blocks * epochs * (samples // batch_size)
