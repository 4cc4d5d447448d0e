"""One run from start to end, and the record that it leaves: what was run, where, costs, results."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dblocks.blocks import DiffusionBlocks
from dblocks.checkpoint import replacing
from dblocks.data import Images, digits
from dblocks.info import environment
from dblocks.memory import SavedActivations, state_bytes
from dblocks.models.vit import ViT
from dblocks.recipe import Learner, Run

FORMAT = 1  # of the record
MIB = 2**20
DENOISING_STEPS = (1, 2, 3, 6, 12)  # with which the final accuracy is measured too


class Trained(NamedTuple):
    """What a run leaves."""

    model: ViT | DiffusionBlocks
    """A `ViT` where it was trained end to end."""
    record: dict[str, Any]
    """JSON values: the run, where it ran, what it cost and what it reached."""


class LayerCounter:
    """Counts the layers that training runs inside the `with` block.

    It counts by hooks, which the end removes; evaluation, without gradients, is free.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.count = 0
        self._layers = list(layers)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> LayerCounter:
        self._handles = [layer.register_forward_hook(self._add) for layer in self._layers]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.count += torch.is_grad_enabled()


def train(run: Run, *, progress: bool = False) -> Trained:
    """Train one network and measure what it cost and reached.

    The accuracies on the way are for a curve only: nothing is chosen by them.

    Args:
        run: what to train.
        progress: show a progress bar.
    """
    where = environment()  # of the code that runs, whatever is committed meanwhile
    data, evaluated = digits(run.part)
    learner = Learner(run, data)
    with LayerCounter(learner.vit.layers) as counter:
        curve, seconds = _fit(learner, evaluated, counter, progress=progress)
    layer_evaluations = counter.count
    record = {
        "format": FORMAT,
        "run": run.to_dict(),
        "model": learner.vit.config.to_dict(),
        "blocks": None if learner.config is None else learner.config.to_dict(),
        "adaln": learner.vit.config.conditioning != "none",
        "environment": where,
        "accuracy": curve[-1]["accuracy"],
        "accuracy_by_denoising_steps": _by_denoising_steps(learner, evaluated),
        "layer_evaluations": layer_evaluations,
        "layers_per_step": layer_evaluations // run.steps,
        "samples": run.steps * run.batch_size,
        **_memory(learner),
        "seconds": round(seconds, 3),
        "curve": curve,
    }
    return Trained(learner.model or learner.vit, record)


def _fit(
    learner: Learner, evaluated: Images, counter: LayerCounter, *, progress: bool
) -> tuple[list[dict[str, Any]], float]:
    """All steps; returns the points of the curve and the seconds spent in training alone."""
    run, curve, seconds = learner.run, [], 0.0
    marks = {round(run.steps * i / run.points) for i in range(1, run.points + 1)} - {0}
    losses = _empty_losses(run)
    bar = _bar(run, progress)
    for step in range(run.steps):
        start = time.perf_counter()
        block, loss = learner.step(step)
        seconds += time.perf_counter() - start
        losses[block].append(loss)
        bar.update()
        if step + 1 in marks:
            curve.append(_point(learner, evaluated, step + 1, counter.count, losses))
            losses = _empty_losses(run)
            bar.set_postfix_str(f"accuracy {100 * curve[-1]['accuracy']:.1f} %")
    bar.close()
    return curve, seconds


def _point(
    learner: Learner, data: Images, step: int, count: int, losses: list[list[float]]
) -> dict[str, Any]:
    """One point of the curve; the losses are cross-entropies since the point before."""
    by_block = _block_accuracies(learner, data)
    return {
        "step": step,
        "layer_evaluations": count,
        "accuracy": by_block[-1],
        "block_accuracy": by_block,
        "block_loss": [sum(v) / len(v) if v else None for v in losses],
    }


def _empty_losses(run: Run) -> list[list[float]]:
    return [[] for _ in range(1 if run.end_to_end else run.blocks)]


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


def _block_accuracies(learner: Learner, data: Images) -> list[float]:
    """The accuracy after each block's call on the way from noise to the answer; the last is it."""
    if learner.model is None:
        return [learner.classifier.accuracy(data)]
    num_blocks = learner.model.config.num_blocks
    grid = learner.model.config.schedule.steps(num_blocks)
    with warnings.catch_warnings():
        # A way that is cut short skips the later blocks, as it should.
        warnings.simplefilter("ignore", UserWarning)
        return [learner.classifier.accuracy(data, sigmas=grid[: b + 1]) for b in range(num_blocks)]


def _by_denoising_steps(learner: Learner, data: Images) -> dict[str, float] | None:
    if learner.model is None:
        return None
    with warnings.catch_warnings():
        # Fewer steps than blocks skip some of them: that is what is asked here.
        warnings.simplefilter("ignore", UserWarning)
        return {str(n): learner.classifier.accuracy(data, n) for n in DENOISING_STEPS}


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
    costs = [_step_bytes(learner, batch, b) for b in range(len(_empty_losses(learner.run)))]
    activations, state, process = (max(column) / MIB for column in zip(*costs, strict=True))
    return {"activations_mib": activations, "state_mib": state, "process_mib": process}


def _step_bytes(learner: Learner, batch: dict[str, Tensor], block: int) -> tuple[int, int, int]:
    """Bytes saved for the backward pass, and held by the step and by the process at its end."""
    network = learner.model or learner.vit
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
