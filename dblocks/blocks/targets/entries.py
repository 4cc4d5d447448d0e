"""Checks that the entries of a batch, or keywords of a call, are valid and that all are read."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dblocks.blocks.targets.base import METHODS, TARGET, Batch, CheckedBatch, Target
from dblocks.ops._checks import values_known


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
    """Raises for an entry of a training batch that nothing reads.

    The entries that are read are the `reads` of the network and its target. If one of them defines
    none, or its class overrides methods below the class that defines it, any entry is accepted.

    Args:
        model: the network.
        batch: what it is given.
        target: the network's.

    Raises:
        ValueError: for any other entry, which the error names, with those that are read.
    """
    _refuse_others(model, batch, "batch", _trained_on(model, target))


def check_call(model: Any, cond: Batch, target: Target) -> None:
    """Raises for a keyword that a call, such as one of a sampler, does not read.

    An example is the labels that a classifier is trained on. The keywords that are read are the
    `call_reads` of the network, or by default those that training reads.

    Args:
        model: the network.
        cond: the keywords.
        target: the network's.

    Raises:
        ValueError: for any other keyword, which the error names, with those that are read.
    """
    known, trained_on = (
        _named(model, "call_reads", ("embed_condition",)),
        _trained_on(model, target),
    )
    if known is None:
        _refuse_others(model, cond, "call", trained_on)
        return
    of_training = (trained_on or set()).difference(known)
    others = [n for n in cond if n in of_training and cond[n] is not None]
    why = "training reads it, and a call does not: leave it out" if others else ""
    _refuse_others(model, cond, "call", known, why)


def _refuse_others(
    model: Any, given: Batch, use: str, names: Iterable[str] | None, why: str = ""
) -> None:
    if names is None:
        return
    known = sorted(names)
    unknown = [name for name in given if name not in known and given[name] is not None]
    if unknown:
        raise ValueError(
            f"a {use} for {type(model).__name__} must hold only what is read, {known}, "
            f"got {', '.join(map(repr, unknown))} too; {why or _hint(str(unknown[0]), known)}"
        )


def scored_shape(target: Target, batch: Batch) -> tuple[int, ...]:
    """The shape of sigma for a training batch.

    Raises:
        ValueError: the batch is empty, since the mean of no losses is NaN.
    """
    shape = target.sigma_shape(batch)
    if math.prod(shape) == 0:
        given = {key: list(v.shape) for key, v in batch.items() if isinstance(v, Tensor)}
        raise ValueError(
            f"a batch to train on must hold at least one sample, got the shapes {given}; leave out "
            "batches that are empty"
        )
    return shape


def check_scored(count: Tensor | None) -> None:
    """Raises if nothing of a batch to train on is scored: its loss would be 0 or NaN.

    Where reading the count would synchronise, the device asserts it.

    Args:
        count: as of `Target.scored`; of all processes that share the batch.

    Raises:
        ValueError: it is 0.
    """
    message = (
        "a batch to train on must hold at least one token that is scored, got none: the first of a "
        "text is given, and a loss_mask or attention_mask leaves out others; leave out such batches"
    )
    if count is None:
        return
    if not values_known(count):
        torch.ops.aten._assert_async.msg(count > 0, message)
    elif not count:
        raise ValueError(message)


def _hint(unknown: str, known: Sequence[str]) -> str:
    # The search for close matches cannot be traced in a graph.
    close = [] if torch.compiler.is_compiling() else difflib.get_close_matches(unknown, known, n=1)
    return f"did you mean {close[0]!r}?" if close else "leave out what is not read"


def _trained_on(model: Any, target: Target) -> set[str] | None:
    of_network, of_target = _named(model, "reads", METHODS), _named(target, "reads", TARGET)
    return None if of_network is None or of_target is None else {*of_network, *of_target}


def _named(part: Any, name: str, methods: Iterable[str]) -> Iterable[str] | None:
    """The named attribute; None if a subclass of the class that defines it overrides methods.

    Such a subclass, for example of `ViT`, may read more entries.
    """
    if name in getattr(part, "__dict__", ()):
        return getattr(part, name)
    for kind in type(part).__mro__:
        if name in kind.__dict__:
            return getattr(part, name)
        if any(method in kind.__dict__ for method in methods):
            return None
    return None
