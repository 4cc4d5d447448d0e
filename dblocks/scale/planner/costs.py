"""The cost of each block of a network: bytes held, saved and moved, and operations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dblocks.blocks.config import Shared
from dblocks.scale.planner.optimizers import Optimizer, Use, use
from dblocks.scale.planner.step import Held, Peak, checkpointed, step_peak
from dblocks.scale.planner.subject import Subject, block_loss, onto_cpu, without_data
from dblocks.scale.planner.trace import Part, Trace, trace

BACKWARD = 2  # a backward pass costs this times the forward: gradients of inputs and of weights


class Bytes(NamedTuple):
    """Memory of a set of parameters, in bytes."""

    parameters: int = 0
    trained: int = 0
    by_optimizer: Use = Use()

    @classmethod
    def of(
        cls, parameters: Iterable[Tensor], optimizer: Optimizer, *, average: bool = False
    ) -> Bytes:
        """The memory of these parameters; optimizer state counts trained ones only."""
        held = list({id(p): p for p in parameters}.values())
        trained = [p for p in held if p.requires_grad]
        sizes = (sum(p.nbytes for p in held), sum(p.nbytes for p in trained))
        return cls(*sizes, use(trained, optimizer, average=average))

    @property
    def optimizer(self) -> int:
        """Bytes of the optimizer's state."""
        return self.by_optimizer.state

    def plus(self, *others: Bytes) -> Bytes:
        """The sums."""
        parameters, trained, found = self
        for other in others:
            parameters, trained = parameters + other.parameters, trained + other.trained
            found = found.plus(other.by_optimizer)
        return Bytes(parameters, trained, found)


@dataclass(frozen=True)
class Cost:
    """The cost of a step, end to end or of one block."""

    held: Bytes
    activations: int
    """Bytes saved for the backward at the end of the forward."""
    peak: Peak
    flops: int
    """Floating-point operations of forward, backward and recomputation."""


class Costs:
    """The costs of each way to train a network, from forward passes without data.

    Args:
        subject: the network.
        samples: batch size.
        shared: how the parameters outside the layers are trained.
        optimizer: name of the optimizer.
        bf16: whether layers compute in bfloat16 (autocast).
        average: whether a moving average of the trained weights is kept.
    """

    def __init__(
        self,
        subject: Subject,
        samples: int,
        *,
        shared: Shared = "train",
        optimizer: Optimizer = "adamw",
        bf16: bool = False,
        average: bool = False,
    ) -> None:
        self.subject, self.samples, self.bf16 = subject, samples, bf16
        self.optimizer: Optimizer = optimizer
        self.average = average
        with torch.device("meta"):
            dm = subject.blocks(subject.config(1, shared))
        layers = list(dm.base_model.layers)
        with without_data():
            onto_cpu(dm)
            batch = subject.batch(samples)
            with self._autocast():
                self.trace = trace(lambda: block_loss(dm, batch), dm, layers, once=True)
        self.by_layer = [self._bytes(layer.parameters()) for layer in layers]
        inside = {id(p) for layer in layers for p in layer.parameters()}
        outside = [p for p in dm.parameters() if id(p) not in inside]
        self.outside = self._bytes(outside)
        # A block's own copies move with it; shared parameters stay.
        common = {id(p) for p in dm.shared_parameters()}
        own = (p for p in outside if id(p) not in common)
        self.outside_own = self._bytes(own)
        self.num_layers = len(layers)
        self._blocks: dict[tuple[int, int], Cost] = {}

    def block(self, first: int, end: int) -> Cost:
        """A step on a block of the layers first..end-1."""
        if (first, end) not in self._blocks:
            names = ["the embedding", *(f"layer {i}" for i in range(first, end)), "the output head"]
            parts = self.trace.parts(first, end)
            held = self.outside.plus(*self.by_layer[first:end])
            self._blocks[first, end] = self._cost(held, names, parts)
        return self._blocks[first, end]

    def travels(self, first: int, end: int) -> Bytes:
        """The bytes that move to and from the device with a block."""
        return self.outside_own.plus(*self.by_layer[first:end])

    @cached_property
    def end_to_end(self) -> Cost:
        """A step of the whole network."""
        held, names, found = self._whole
        return self._cost(held, names, found.parts(0, len(found.layers)))

    @cached_property
    def checkpointing(self) -> Cost:
        """As `end_to_end`, with gradient checkpointing of every layer."""
        held, names, found = self._whole
        layers = [checkpointed(part) for part in found.parts(0, len(found.layers))[1:-1]]
        cost = self._cost(held, names, [found.before, *layers, found.after])
        again = sum(part.flops for part in layers)
        return Cost(cost.held, cost.activations, cost.peak, cost.flops + again)

    @cached_property
    def _whole(self) -> tuple[Bytes, list[str], Trace]:
        subject = self.subject
        if subject.whole is None:
            found, held = self.trace, self.outside.plus(*self.by_layer)
        else:
            with torch.device("meta"):
                model, layers, loss = subject.whole()
            _trainable(model)
            with without_data():
                onto_cpu(model)
                batch = subject.batch(self.samples)
                with self._autocast():
                    found = trace(lambda: loss(batch), model, layers, once=True)
            held = self._bytes(model.parameters())
        count = len(found.layers)
        names = ["the embedding", *(f"layer {i}" for i in range(count)), "the output head"]
        return held, names, found

    def _cost(self, held: Bytes, names: Sequence[str], parts: Sequence[Part]) -> Cost:
        named = list(zip(names, parts, strict=True))
        flops = (1 + BACKWARD) * sum(part.flops for part in parts)
        saved = sum(part.saved for part in parts)
        found = held.by_optimizer
        along = Held(held.parameters, held.trained, found.state, found.temporaries)
        return Cost(held, saved, step_peak(along, named), flops)

    def _bytes(self, parameters: Iterable[Tensor]) -> Bytes:
        return Bytes.of(parameters, self.optimizer, average=self.average)

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext()


def _trainable(model: nn.Module) -> None:
    """Makes all parameters trainable, also those that an earlier conversion froze."""
    model.requires_grad_(True)
