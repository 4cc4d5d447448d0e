"""One run from start to end, and the record that it leaves: what was run, where, costs, results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dblocks.blocks.memory import SavedActivations, state_bytes
from dblocks.checkpoint import replacing
from dblocks.info import environment
from dblocks.recipes.run import Batch, Learner, Run

FORMAT = 1  # of the record
MIB = 2**20


class Trained(NamedTuple):
    """What a run leaves."""

    learner: Learner
    """With the trained network."""
    record: dict[str, Any]
    """JSON values: the run, where it ran, what it cost and what it reached."""


class LayerCounter:
    """Counts how often training calls some modules inside the `with` block.

    It counts by hooks, which the end removes; what is called inside `paused()` is free.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.count = 0
        self._counts = True
        self._modules = list(modules)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> LayerCounter:
        self._handles = [module.register_forward_hook(self._add) for module in self._modules]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls are not counted inside the `with` block: evaluation."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def _add(self, module: nn.Module, args: Any, output: Any) -> None:
        self.count += self._counts


def train(
    run: Run, *, progress: bool = False, save: Callable[[Learner], None] | None = None
) -> Trained:
    """Train one network and measure what it cost and reached.

    What is measured on the way is for a curve only: nothing is chosen by it.

    Args:
        run: what to train.
        progress: show a progress bar.
        save: called with the trained network before its results are measured, which may fail.
    """
    where = environment()  # of the code that runs, whatever is committed meanwhile
    learner = run.learner()
    with LayerCounter(learner.counted()) as counter:
        curve, seconds = _fit(learner, counter, progress=progress)
    if save is not None:
        save(learner)
    layer_evaluations = counter.count
    record = {
        "format": FORMAT,
        "run": run.to_dict(),
        "model": learner.network.config.to_dict(),
        "blocks": None if learner.config is None else learner.config.to_dict(),
        "environment": where,
        **learner.results(curve[-1]),
        "layer_evaluations": layer_evaluations,
        "layers_per_step": layer_evaluations // run.steps,
        "samples": run.steps * run.batch_size,
        **_memory(learner),
        "seconds": round(seconds, 3),
        "curve": curve,
    }
    return Trained(learner, record)


def _fit(
    learner: Learner, counter: LayerCounter, *, progress: bool
) -> tuple[list[dict[str, Any]], float]:
    """All steps; returns the points of the curve and the seconds spent in training alone."""
    run, curve, seconds = learner.run, [], 0.0
    marks = {round(run.steps * i / run.points) for i in range(1, run.points + 1)} - {0}
    losses = _empty_losses(learner)
    bar = _bar(run, progress)
    for step in range(run.steps):
        start = time.perf_counter()
        block, loss = learner.step(step)
        seconds += time.perf_counter() - start
        losses[block].append(loss)
        bar.update()
        if step + 1 in marks:
            # The losses are those since the point before.
            means = [sum(v) / len(v) if v else None for v in losses]
            point = {"step": step + 1, "layer_evaluations": counter.count, "block_loss": means}
            with counter.paused():
                curve.append(point | learner.measure())
            losses = _empty_losses(learner)
            bar.set_postfix_str(learner.progress(curve[-1]))
    bar.close()
    return curve, seconds


def _empty_losses(learner: Learner) -> list[list[float]]:
    return [[] for _ in range(learner.num_blocks)]


def _bar(run: Run, progress: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "training shows its progress with the package tqdm, which is not installed; "
            "`pip install 'dblocks[train]'`"
        ) from error
    # disable=None is tqdm's way of being silent where the output is not a terminal.
    return tqdm(total=run.steps, desc=run.name, unit="step", disable=None if progress else True)


def use_one_thread() -> None:
    """Compute on one thread: a network so small gains little by more, and loses much by waiting
    for them where the cores are busy."""
    torch.set_num_threads(1)


def train_to_record(run: Run, path: Path) -> dict[str, Any]:
    """One run on one thread, and its record written to `path`; for a process of its own."""
    use_one_thread()
    record = train(run).record
    write_record(path, record)
    return record


def write_record(path: Path, record: Any) -> None:
    """Write JSON so that the file is there either whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """A record written by `write_record`.

    Raises:
        ValueError: the file is no record, or one of another format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a record: {error}; delete it to run it again") from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} must be a record of format {FORMAT}, got {found!r}; delete it to run it again"
        )
    return record


def _memory(learner: Learner) -> dict[str, float]:
    """The largest of the blocks' steps, in MiB: saved activations, and state held.

    `state_mib` is what the step reads and updates, all that a worker of that block holds;
    `process_mib` what this process holds, where all blocks live.
    """
    batch = learner.batch(0)
    costs = [_step_bytes(learner, batch, b) for b in range(learner.num_blocks)]
    activations, state, process = (max(column) / MIB for column in zip(*costs, strict=True))
    return {"activations_mib": activations, "state_mib": state, "process_mib": process}


def _step_bytes(learner: Learner, batch: Batch, block: int) -> tuple[int, int, int]:
    """Bytes saved for the backward pass, and held by the step and by the process at its end."""
    network = learner.trained
    with SavedActivations(network.parameters()) as saved:
        loss = learner.loss(batch, block)
    loss.backward()
    held = {id(o): _held(o) for o in learner.optimizers}
    step = sum(held[id(o)] for o in learner.optimizers_of(block))
    frozen = sum(p.nbytes for p in network.parameters() if not p.requires_grad)
    network.zero_grad(set_to_none=True)
    return saved.bytes, step + frozen, sum(held.values()) + frozen


def _held(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's parameters, of their gradients, and of its state."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return state_bytes(parameters, optimizer)
