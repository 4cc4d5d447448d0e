"""The entries of a batch, or keywords of a call: checked, and none that nobody reads."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dblocks.blocks.targets.base import METHODS, TARGET, Batch, CheckedBatch, Target


def checked(model: Any, batch: Batch, target: Target) -> Batch:
    """The batch as the model's `target` checked it, which it does once; see `check_entries`."""
    if isinstance(batch, CheckedBatch):
        return batch
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch must be a mapping of names to tensors, got {type(batch).__name__}; such as "
            "{'tokens': tokens} or {'images': images, 'labels': labels}"
        )
    given = target.check(batch)
    check_entries(model, batch, target)
    return given


def check_entries(model: Any, batch: Batch, target: Target) -> None:
    """Raises for an entry of a batch, or a keyword of a call, that nobody reads.

    Those that are read are what the network and its target name as `reads`. Where one of them names
    none, or has methods of its own beside what it derives from, everything is accepted.

    Args:
        model: the network.
        batch: what it is given.
        target: the network's.

    Raises:
        ValueError: there is another entry; the error names it, and those that are read.
    """
    of_network, of_target = _reads(model, METHODS), _reads(target, TARGET)
    if of_network is None or of_target is None:
        return
    known = sorted({*of_network, *of_target})
    unknown = [name for name in batch if name not in known and batch[name] is not None]
    if not unknown:
        return
    raise ValueError(
        f"a batch or call for {type(model).__name__} must hold only what is read, {known}, "
        f"got {', '.join(map(repr, unknown))} too; {_hint(str(unknown[0]), known)}"
    )


def scored_shape(target: Target, batch: Batch) -> tuple[int, ...]:
    """The shape of sigma of a batch that is trained on.

    Raises:
        ValueError: it is empty: the mean of no losses is NaN.
    """
    shape = target.sigma_shape(batch)
    if math.prod(shape) == 0:
        given = {key: list(v.shape) for key, v in batch.items() if isinstance(v, Tensor)}
        raise ValueError(
            f"a batch to train on must hold at least one sample, got the shapes {given}; leave out "
            "batches that are empty"
        )
    return shape


def _hint(unknown: str, known: Sequence[str]) -> str:
    # A graph cannot hold what looks for close ones.
    close = [] if torch.compiler.is_compiling() else difflib.get_close_matches(unknown, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "leave out what is not read"


def _reads(part: Any, methods: Iterable[str]) -> Iterable[str] | None:
    """What a network or target names; None where a class below the one that names it has methods.

    Such as a network of one's own that derives from a `ViT` and reads more.
    """
    if "reads" in getattr(part, "__dict__", ()):
        return part.reads
    for kind in type(part).__mro__:
        if "reads" in kind.__dict__:
            return part.reads
        if any(name in kind.__dict__ for name in methods):
            return None
    return None
