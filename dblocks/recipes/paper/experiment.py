"""Experiments of the paper: settings with their sources, and published results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Value(NamedTuple):
    """A setting: the value of a field of a run."""

    value: Any
    source: str
    """The source or, for our own choices, the reason."""


class Published(NamedTuple):
    """A row of a table of the paper."""

    method: str
    value: str
    """The number as printed."""
    table: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment of the paper: a network, a data set, settings, and published results."""

    network: str
    """The name of the network on the command line."""
    data: str
    """The data set, a name that `--data` takes."""
    files: str
    """A description of the files that the user must provide."""
    epochs: int
    """Number of epochs for each block."""
    samples: int
    """Size of the training part: images, or tokens of a text."""
    shape: tuple[int, ...] = ()
    """Channels, height and width of an image; empty for a text."""
    labels: int
    """Classes of images, or tokens of the vocabulary."""
    published: Mapping[str, Value]
    """Fields of the run given by the paper or its code, or derived from these."""
    ours: Mapping[str, Value]
    """Fields of the run given by neither."""
    differs: tuple[str, ...]
    """Differences from the paper, as sentences."""
    metric: str
    """The metric in the rows."""
    rows: tuple[Published, ...]
    measured: Callable[[Mapping[str, Any]], float | None]
    """Reads the same metric from a record; None if it is not measured here."""
    unmeasured: str = ""
    """How to measure it elsewhere, if it is not measured here."""
    tokenizer: str = ""
    """The tokenizer to pass as `--tokenizer`; empty for characters."""

    def settings(self) -> dict[str, Any]:
        """The fields of the run except the data."""
        return {name: value.value for name, value in {**self.published, **self.ours}.items()}


CUDA = {"device": Value("cuda", "not feasible on a CPU")}


def not_measured(record: Mapping[str, Any]) -> None:
    """Returns None: the paper's metric needs the features of a large pretrained network."""


def steps(*, epochs: int, samples: int, batch_size: int, blocks: int) -> int:
    """Number of steps for this number of epochs per block, without incomplete batches.

    A step trains one block. Source: App. H, "training all B blocks for K iterations each".
    """
    return blocks * epochs * (samples // batch_size)
