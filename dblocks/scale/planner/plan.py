"""The plan of a network: every way to train it, with its memory, its time, and what fits."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dblocks.blocks.config import BlocksConfig
from dblocks.config import check_count
from dblocks.scale.planner.costs import Cost, Costs
from dblocks.scale.planner.split import balanced

Prefetch = Literal["none", "parameters", "all"]
Split = Literal["even", "memory", "time"]


@dataclass(frozen=True)
class Machine:
    """The machine of a plan."""

    memory: int
    """Bytes of each device."""
    link: float
    """Bytes per second between a device and the host."""
    flops: float
    """Floating-point operations per second that a device reaches."""
    devices: int = 1
    steps_per_visit: int = 10
    """Steps on a block before the next one replaces it on the device."""
    prefetch: Prefetch = "none"
    """The part of the next block that is copied while a block is trained; see `resident`."""

    def __post_init__(self) -> None:
        check_count("devices", self.devices)
        check_count("steps_per_visit", self.steps_per_visit)


@dataclass(frozen=True)
class Way:
    """One way to train. Bytes and times are modelled, and are those of the largest block."""

    name: str
    blocks: int
    """Number of blocks; 1 for end-to-end training."""
    layers_per_block: tuple[int, ...]
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    prefetched: int
    """Bytes of the next block that are already on the device."""
    peak: int
    moment: str
    """When the peak occurs, and in which block."""
    fits: bool
    transfer: float
    """Bytes per step between device and host."""
    compute_seconds: float
    step_seconds: float
    overhead: float
    """Time that transfers add to a step, as a fraction of the time of its arithmetic."""
    devices: int
    """Devices in use, without communication between them."""
    tokens_per_second: float
    """Tokens (or images) per second, each trained on by all blocks, over all devices."""


class BlockTime(NamedTuple):
    """Of one step."""

    transfer: float
    compute: float
    seconds: float


class Planner:
    """Makes the rows of a plan.

    Args:
        costs: costs of the network.
        machine: the machine to plan for.
        split: how layers are split into blocks.
    """

    def __init__(self, costs: Costs, machine: Machine, split: Split = "even") -> None:
        self.costs, self.machine = costs, machine
        self.split: Split = split

    def ways(self) -> list[Way]:
        """The rows: end to end, with checkpointing, and every number of blocks."""
        costs = self.costs
        whole = [
            self._whole("end to end", costs.end_to_end),
            self._whole("checkpointing", costs.checkpointing),
        ]
        return whole + [self.blocks(b) for b in range(1, costs.num_layers + 1)]

    def blocks(self, num_blocks: int, split: Split | None = None) -> Way:
        """The row for training in blocks, one block at a time on a device."""
        machine, costs = self.machine, self.costs
        counts = self.layers_per_block(num_blocks, split or self.split)
        ranges = BlocksConfig(num_blocks, layers_per_block=counts).layer_ranges(costs.num_layers)
        found = [costs.block(*layers) for layers in ranges]
        alone = machine.devices >= num_blocks
        extra = [0 if alone else self._prefetched(b, ranges) for b in range(num_blocks)]
        times = [self.time(*layers, alone=alone) for layers in ranges]
        peaks = [cost.peak.bytes + more for cost, more in zip(found, extra, strict=True)]
        b = max(range(num_blocks), key=peaks.__getitem__)
        devices = min(machine.devices, num_blocks)
        slowest = max(times, key=lambda time: time.seconds)
        busiest = _busiest([time.seconds for time in times], devices)
        cost = found[b]
        return Way(
            name=f"{num_blocks} block{'s' if num_blocks > 1 else ''}",
            blocks=num_blocks,
            layers_per_block=counts,
            parameters=cost.held.parameters,
            gradients=cost.held.trained,
            optimizer=cost.held.optimizer,
            activations=cost.activations,
            prefetched=extra[b],
            peak=peaks[b],
            moment=f"{cost.peak.moment}, block {b}",
            fits=peaks[b] <= machine.memory,
            transfer=slowest.transfer,
            compute_seconds=slowest.compute,
            step_seconds=slowest.seconds,
            overhead=max(time.seconds / time.compute - 1 for time in times),
            devices=devices,
            tokens_per_second=self._tokens / busiest,
        )

    def layers_per_block(self, num_blocks: int, split: Split) -> tuple[int, ...]:
        """The number of layers of each block, first to last."""
        L = self.costs.num_layers
        if split == "memory":
            return balanced(L, num_blocks, lambda i, j: self.costs.block(i, j).peak.bytes)
        if split == "time":
            return balanced(L, num_blocks, lambda i, j: self.costs.block(i, j).flops)
        ranges = BlocksConfig(num_blocks).layer_ranges(L)
        return tuple(end - first for first, end in ranges)

    def time(self, first: int, end: int, *, alone: bool) -> BlockTime:
        """The time of a step on a block, by a roofline of arithmetic and the link to the host.

        Args:
            first: index of its first layer.
            end: one more than the index of its last layer.
            alone: whether the block stays on its device.
        """
        machine = self.machine
        compute = self.costs.block(first, end).flops / machine.flops
        if alone:
            return BlockTime(0.0, compute, compute)
        travels = self.costs.travels(first, end)
        parameters = travels.parameters / machine.steps_per_visit
        # Optimizer state moves both ways; trained parameters are copied back.
        others = (travels.trained + 2 * travels.optimizer) / machine.steps_per_visit
        hidden = {"none": 0.0, "parameters": parameters, "all": parameters + others}
        behind = hidden[machine.prefetch] / machine.link
        moved = parameters + others
        seconds = max(compute, behind) + moved / machine.link - behind
        return BlockTime(moved, compute, seconds)

    @property
    def _tokens(self) -> int:
        return self.costs.samples * self.costs.subject.tokens

    def _prefetched(self, block: int, ranges: Sequence[tuple[int, int]]) -> int:
        others = [self.costs.travels(*r) for b, r in enumerate(ranges) if b != block]
        if self.machine.prefetch == "none" or not others:
            return 0
        if self.machine.prefetch == "parameters":
            return max(other.parameters for other in others)
        return max(other.parameters + other.optimizer for other in others)

    def _whole(self, name: str, cost: Cost) -> Way:
        seconds = cost.flops / self.machine.flops
        return Way(
            name=name,
            blocks=1,
            layers_per_block=(self.costs.num_layers,),
            parameters=cost.held.parameters,
            gradients=cost.held.trained,
            optimizer=cost.held.optimizer,
            activations=cost.activations,
            prefetched=0,
            peak=cost.peak.bytes,
            moment=cost.peak.moment,
            fits=cost.peak.bytes <= self.machine.memory,
            transfer=0.0,
            compute_seconds=seconds,
            step_seconds=seconds,
            overhead=0.0,
            devices=1,
            tokens_per_second=self._tokens / seconds,
        )


def smallest_fitting(ways: Sequence[Way]) -> Way | None:
    """The way with the fewest blocks that fits; None if there is none."""
    return next((way for way in ways if way.name.endswith(("block", "blocks")) and way.fits), None)


def _busiest(seconds: Sequence[float], devices: int) -> float:
    """The time of the busiest device, with the longest blocks assigned first."""
    loads = [0.0] * devices
    for time in sorted(seconds, reverse=True):
        heapq.heapreplace(loads, loads[0] + time)
    return max(loads)
