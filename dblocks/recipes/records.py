"""Runs training from start to end, and writes the record: options, environment, cost, results."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dblocks.checkpoint import replacing
from dblocks.config import json_text, read_json
from dblocks.info import environment
from dblocks.recipes.costs import LayerCounter, memory
from dblocks.recipes.keeping import Keeper, Keeping, Progress
from dblocks.recipes.progress import progress_bar
from dblocks.recipes.run import Run, check_device
from dblocks.recipes.trainer import Trainer
from dblocks.scale import Stop

FORMAT = 1  # format of the record


class Trained(NamedTuple):
    """The result of `train`."""

    trainer: Trainer
    """The trainer, which has the trained network."""
    record: dict[str, Any]
    """The record as JSON values: options, environment, cost and results."""


def train(
    run: Run,
    *,
    prepare: Callable[[Trainer], None] = lambda trainer: None,
    progress: bool = False,
    save: Callable[[Trainer], None] | None = None,
    keeping: Keeping | None = None,
    mesh: Any = None,
    on_point: Callable[[dict[str, Any]], None] | None = None,
) -> Trained:
    """Trains one network and measures its cost and results.

    Evaluations during training are only for the curve: nothing is selected by them. For a single
    block, only its loss and its cost are measured.

    Args:
        run: options of the run.
        prepare: called with the trainer before training.
        progress: whether to show a progress bar.
        save: called with the trainer after training, before the evaluation, which may fail.
        keeping: checkpoints to write and to resume from.
        mesh: the processes that train the block together; see `Trainer.place`.
        on_point: called with each point of the curve.

    Raises:
        Interrupted: Ctrl-C or SIGTERM was received, and there is a checkpoint.
    """
    where = environment()  # now: something may be committed meanwhile
    check_device(run.device)
    trainer = run.trainer()
    prepare(trainer)
    trainer.place(mesh)
    trainer.shows_progress = progress
    alone = run.block is not None
    with LayerCounter([] if alone else trainer.counted()) as counter:
        done = _fit(trainer, counter, progress=progress, keeping=keeping, on_point=on_point)
    trainer.take_average()
    trainer.check_finite()
    if save is not None:
        save(trainer)
    layer_evaluations = counter.count
    layers = {
        "layer_evaluations": layer_evaluations,
        "layers_per_step": layer_evaluations // run.steps,
        "samples": run.steps * run.batch_size,
    }
    record = {
        **begun(trainer),
        "environment": where,
        **({"steps_of_block": done.own_steps} if alone else trainer.results(done.curve[-1])),
        **({} if alone else layers),
        **memory(trainer),
        "seconds": round(done.seconds, 3),
        "curve": done.curve,
    }
    return Trained(trainer, record)


def begun(trainer: Trainer) -> dict[str, Any]:
    """The record before training."""
    return {
        "format": FORMAT,
        "run": trainer.run.to_dict(),
        "model": trainer.network.config.to_dict(),
        "blocks": None if trainer.config is None else trainer.config.to_dict(),
        **({"continued": trainer.continued} if trainer.continued else {}),
    }


def _fit(
    trainer: Trainer,
    counter: LayerCounter,
    *,
    progress: bool,
    keeping: Keeping | None,
    on_point: Callable[[dict[str, Any]], None] | None,
) -> Progress:
    """Takes all steps; returns the points of the curve and the seconds of training alone."""
    run, done = trainer.run, Progress(trainer.num_blocks, counter)
    marks = {round(run.steps * i / run.points) for i in range(1, run.points + 1)} - {0}
    keeper = None if keeping is None else Keeper(keeping, trainer, done, begun(trainer))
    bar = progress_bar("training", run.name, run.steps, shown=progress, done=done.step)
    with Stop() if keeper else nullcontext() as stop, keeper or nullcontext():
        for step in range(done.step, run.steps):
            start = time.perf_counter()
            block, loss = trainer.step(step)
            done.seconds += time.perf_counter() - start
            done.add(block, loss)
            bar.update()
            if step + 1 in marks:
                _add_point(trainer, counter, done)
                bar.set_postfix_str(trainer.progress(done.curve[-1]) if run.block is None else "")
                if on_point:
                    on_point(done.curve[-1])
                if keeper:
                    keeper.write_log()
            if keeper:
                received = None if stop is None else stop.received
                keeper.after_step(received, own=loss is not None)
        # A run that ends at the step of its checkpoint may have no point there.
        if not done.curve or done.curve[-1]["step"] != done.step:
            _add_point(trainer, counter, done)
            if keeper:
                keeper.write_log()
    bar.close()
    return done


def _add_point(trainer: Trainer, counter: LayerCounter, done: Progress) -> None:
    """Adds a point of the curve, with the mean losses since the previous point."""
    point = {
        "step": done.step,
        "layer_evaluations": counter.count,
        "block_loss": done.take_losses(),
    }
    if trainer.run.block is not None:
        done.curve.append(point)
        return
    with counter.paused(), trainer.averaged():
        done.curve.append(point | trainer.measure())


def use_one_thread() -> None:
    """Sets PyTorch to one thread: small networks gain little from more threads, and lose much by
    waiting for them on busy cores."""
    torch.set_num_threads(1)


def train_to_record(run: Run, path: Path) -> dict[str, Any]:
    """Runs training on one thread and writes its record to `path`; for a separate process."""
    use_one_thread()
    record = train(run).record
    write_record(path, record)
    return record


def write_record(path: Path, record: Any) -> None:
    """Writes JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json_text(record) + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """Reads a record written by `write_record`.

    Raises:
        ValueError: the file is not a record, or has another format.
    """
    try:
        record = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a record: {error}; delete it to repeat the run") from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path} must be a record of format {FORMAT}, got {found!r}; delete it to repeat the "
            "run"
        )
    return record
