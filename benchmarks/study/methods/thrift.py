"""Ways to train the same network to the same numbers in less memory: measured, not trained again.

Checkpointing keeps the input of each layer and computes the rest again; offload keeps on the host
what autograd saves (`save_on_cpu`); residency keeps one block at a time on the device. Gradients
are bit for bit those without, so that the quality is that of the row without. On a CPU host and
device are the same memory: bytes are counted, and seconds contain no transfer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dblocks.blocks.memory import SavedActivations
from dblocks.info import environment
from dblocks.recipes.costs import MIB, memory
from dblocks.recipes.records import FORMAT
from dblocks.recipes.run import Run
from dblocks.recipes.trainer import Trainer
from dblocks.scale import resident

Technique = Literal["none", "checkpointing", "offload", "residency"]
STEPS = 5  # that are timed, beside as many without the technique


def measure(run: Run, technique: Technique, of: str, steps: int = STEPS) -> dict[str, Any]:
    """A record of the memory and the time of training steps.

    Args:
        run: what is trained.
        technique: how memory is spared.
        of: the row that trains it.
        steps: that are timed.
    """
    plain, spared = run.trainer(), run.trainer()
    around = apply(spared, technique)
    seconds: tuple[list[float], list[float]] = ([], [])
    for step in range(steps):
        for trainer, context, found in zip(
            (plain, spared), (nullcontext, around), seconds, strict=True
        ):
            start = time.perf_counter()
            with context():
                trainer.step(step)
            found.append(time.perf_counter() - start)
    without, each = (median(found[1:] or found) for found in seconds)
    return {
        "format": FORMAT,
        "run": run.to_dict(),
        "technique": technique,
        "of": of,
        "environment": environment(),
        **bytes_of(plain, spared, technique),
        "seconds_per_step": each,
        "slowdown": each / without,
    }


def apply(trainer: Trainer, technique: Technique) -> Callable[[], AbstractContextManager]:
    """Sets the technique up; returns what makes the context of each step.

    Raises:
        ValueError: residency is asked for where there are no blocks.
    """
    if technique == "checkpointing":
        for layer in trainer.counted():
            checkpoint_(layer)
    if technique == "residency":
        if trainer.model is None or trainer.block_optimizers is None:
            raise ValueError("residency needs a network in blocks, got one trained end to end")
        resident(trainer.model, trainer.block_optimizers, trainer.run.device)
    return save_on_cpu if technique == "offload" else nullcontext


def checkpoint_(layer: nn.Module) -> None:
    """Lets a layer keep its input only; what it computes again does not count as a call."""
    forward = layer.forward

    def kept(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    layer.forward = kept


def bytes_of(plain: Trainer, spared: Trainer, technique: Technique) -> dict[str, float]:
    """Bytes of a step, in MiB, by what is on the device and what on the host.

    `activations_mib` is what the forward pass leaves on the device for the backward, `again_mib`
    what comes back at a time; `state_mib` parameters, gradients and optimizer state of what a step
    trains, `process_mib` of all blocks; `device_mib` all that is on the device, `host_mib` what
    waits elsewhere.

    Args:
        plain: a trainer without the technique, after some steps.
        spared: one with it.
        technique: which.
    """
    found, again, host = memory(spared), 0, 0.0
    state = found["state_mib"] if technique == "residency" else found["process_mib"]
    if technique == "residency":
        host = found["process_mib"] - found["state_mib"]
    if technique == "checkpointing":
        again = max(_of_a_layer(plain, block) for block in plain.trained_blocks)
    if technique == "offload":
        packed = [_packed(plain, block) for block in plain.trained_blocks]
        again, host = max(map(max, packed)), max(map(sum, packed)) / MIB
        found["activations_mib"] = 0.0
    device = found["activations_mib"] + again / MIB + state
    return {**found, "again_mib": again / MIB, "device_mib": device, "host_mib": host}


def _of_a_layer(trainer: Trainer, block: int) -> int:
    """What a layer saves beside its input: the largest of a block."""
    batch, parameters = trainer.batch(0), list(trainer.trained.parameters())
    largest = 0
    for layer in trainer.counted():
        inputs: list[int] = []
        handle = layer.register_forward_pre_hook(_adding(inputs))
        with SavedActivations(parameters, within=[layer]) as saved:
            loss = trainer.loss(batch, block)
        handle.remove()
        largest = max(largest, saved.bytes - sum(inputs))
        del loss
    return largest


def _adding(sizes: list[int]) -> Callable[..., None]:
    """A hook that adds the bytes of a layer's input."""

    def add(_: nn.Module, args: Any) -> None:
        sizes.append(args[0].untyped_storage().nbytes())

    return add


def _packed(trainer: Trainer, block: int) -> list[int]:
    """What `save_on_cpu` copies: every saved tensor, also weights, as often as it is saved."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.loss(trainer.batch(0), block)
    return sizes
