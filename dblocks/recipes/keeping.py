"""Checkpoints of a run: contents, times of writing, and resuming."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dblocks.checkpoint import replacing
from dblocks.config import json_text
from dblocks.scale import Checkpoints, Gathered, Interrupted
from dblocks.scale.gathered import Snapshot
from dblocks.scale.mesh import largest
from dblocks.scale.state import state_of

if TYPE_CHECKING:
    from dblocks.recipes.costs import LayerCounter
    from dblocks.recipes.trainer import Trainer

FOLDER = "checkpoints"  # inside the folder of the run
LOG_FILE = "log.jsonl"  # next to it, with one line per point of the curve


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Whether and where a run keeps checkpoints."""

    folder: Path
    """The folder of the checkpoints."""
    every: int | None
    """Steps between two checkpoints; None to write one only when a signal ends the run."""
    keep: int
    """Number of checkpoints to keep."""
    resume: bool
    """Whether to resume from the newest one; otherwise existing ones are removed."""
    also: int | None = None
    """A further step after which a checkpoint is written, such as the start of other runs."""


class Progress:
    """The progress of a run: the state in a checkpoint besides network and optimizers."""

    def __init__(self, num_blocks: int, counter: LayerCounter) -> None:
        self.step = 0
        """Number of steps taken; also the position in the data, which is a function of the step."""
        self.own_steps = 0
        """Number of these steps on blocks that are trained here."""
        self.seconds = 0.0
        self.curve: list[dict[str, Any]] = []
        self.continued: list[list[int]] = []
        """Where the run was resumed with another number of steps: (after step, earlier number)."""
        self._counter = counter
        self._losses: list[list[float]] = [[] for _ in range(num_blocks)]

    def add(self, block: int, loss: float | None) -> None:
        """Records a step."""
        self.step += 1
        if loss is not None:
            self.own_steps += 1
            self._losses[block].append(loss)

    def take_losses(self) -> list[float | None]:
        """The mean loss of each block since the last call."""
        means = [sum(losses) / len(losses) if losses else None for losses in self._losses]
        self._losses = [[] for _ in means]
        return means

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "step": self.step,
            "own_steps": self.own_steps,
            "seconds": self.seconds,
            "curve": self.curve,
            "losses": self._losses,
            "continued": self.continued,
            "layer_evaluations": self._counter.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state of `state_dict`."""
        self.step, self.own_steps = state["step"], state["own_steps"]
        self.seconds, self.curve = state["seconds"], state["curve"]
        self._losses, self.continued = state["losses"], state.get("continued", [])
        self._counter.count = state["layer_evaluations"]


class RandomState:
    """The state of PyTorch's default generators, which parts of a network may use."""

    def state_dict(self) -> dict[str, Any]:
        """Their states."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a state of `state_dict`."""
        torch.set_rng_state(state["cpu"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])


class Keeper:
    """Resumes a run from the newest checkpoint, and writes its checkpoints.

    Args:
        keeping: whether and where to keep checkpoints.
        trainer: the trainer of the run.
        progress: the progress of the run, updated from the checkpoint.
        begun: JSON values that identify the run.

    Raises:
        ValueError: the folder cannot be written to, or there is no valid checkpoint of this run.
    """

    def __init__(
        self, keeping: Keeping, trainer: Trainer, progress: Progress, begun: dict[str, Any]
    ) -> None:
        self.keeping, self.progress, self.steps = keeping, progress, trainer.run.steps
        self.mesh = trainer.mesh
        self.first = self.mesh is None or self.mesh.get_local_rank() == 0
        configuration = begun | {"run": trainer.run.settings(), "data": trainer.batches.digest()}
        texts = trainer.batches.texts().items()
        configuration |= {name: hashlib.sha256(t.encode()).hexdigest() for name, t in texts}
        self.checkpoints = Checkpoints(
            keeping.folder, configuration, keep=keeping.keep, changeable=("run.steps",),
            background=True,
        )  # fmt: skip
        self.sharded = self.mesh is not None and trainer.run.sharding == "fsdp"
        optimizers: Any = trainer.block_optimizers or trainer.optimizers[0]
        self.objects: dict[str, Any] = {
            "model": self._whole(trainer.trained),
            "optimizers": self._whole(optimizers),
            "generator": trainer.generator,
            "random": RandomState(),
            "progress": progress,
        }
        if trainer.residency is not None and trainer.residency.steps_per_visit > 1:
            self.objects["residency"] = trainer.residency
        if not keeping.resume:
            if self.first:
                self.checkpoints.clear()
            return
        found = self.checkpoints.resume(self.objects)
        self._check_agreed(progress.step)
        if found is not None:
            self._go_on(trainer)
        said = f"resumed after step {progress.step} of {self.steps}"
        if found is None:
            said = f"no checkpoint in {keeping.folder} yet: training starts from the beginning"
        if self.first:
            print(said, file=sys.stderr)

    def _whole(self, holder: Any) -> Any:
        """Gathers the full state if it is sharded; the first process holds and writes it."""
        return Gathered(holder, here=self.first) if self.sharded else holder

    def write_log(self) -> None:
        """Writes the whole curve so far: after resuming, each point appears once."""
        if not self.first:
            return
        path = self.keeping.folder.parent / LOG_FILE
        lines = [json_text(point, indent=None) for point in self.progress.curve]
        try:
            with replacing(path) as part:
                part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        except OSError as error:
            warnings.warn(f"{path} could not be written: {error}", stacklevel=2)

    def wait(self) -> None:
        """Waits until the current checkpoint is written.

        Warns:
            UserWarning: the checkpoint cannot be written; training continues.
        """
        try:
            self.checkpoints.wait()
        except OSError as error:
            last = self.checkpoints.last
            kept = "there is none yet" if last is None else f"that of step {last} is kept"
            warnings.warn(f"{error}; {kept}", stacklevel=2)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def after_step(self, received: int | None, *, own: bool = True) -> None:
        """Writes a checkpoint if one is due, and ends the run if a signal was received.

        Args:
            received: the number of the signal, or None.
            own: whether the step was on a block trained here; after such a step, processes that
                train together agree on whether there was a signal.

        Raises:
            Interrupted: a signal was received.

        Warns:
            UserWarning: the checkpoint cannot be written; training continues.
        """
        if self.mesh is not None:
            received = (largest(received or 0, self.mesh) or None) if own else None
        step, every = self.progress.step, self.keeping.every
        due = step == self.steps or step == self.keeping.also
        due = due or (every is not None and step % every == 0)
        if due or received is not None:
            objects = self.objects
            if self.sharded:  # a collective; it comes before anything that may fail
                objects = {name: Snapshot(state_of(o)) for name, o in objects.items()}
            if self.first:
                self.wait()
                self.checkpoints.save(step, objects)
        if received is not None or step == self.steps:
            self.wait()
        if received is not None:
            last = self.checkpoints.last
            how = "no checkpoint" if last is None else f"--resume continues after step {last}"
            said = f"interrupted after step {step} of {self.steps}; {how}"
            raise Interrupted(said if self.first else "", received)

    def _go_on(self, trainer: Trainer) -> None:
        """Accepts another number of steps, if it is not less than the number of steps taken."""
        run, step, before = trainer.run, self.progress.step, self.checkpoints.resumed["run.steps"]
        trainer.continued = self.progress.continued
        if before == run.steps:
            return
        if run.steps < step:
            raise ValueError(
                f"steps must be at least {step}, the steps of the checkpoint in "
                f"{self.keeping.folder}, got {run.steps}; to start again, use --overwrite without "
                "--resume"
            )
        self.progress.continued.append([step, before])
        if step == run.steps:
            trainer.average_copies(step)  # the learning rate of the last step of a run
        earlier = dataclasses.replace(run, steps=before)
        same = run.decay == "constant" and all(
            run.lr_at(i) == earlier.lr_at(i) for i in range(step + 1)
        )
        if self.first and step < run.steps and not same:
            rate, other = run.lr_at(step), earlier.lr_at(step)
            how = f"begins with {rate:.3g} instead of {other:.3g}"
            if rate == other:
                how = "has another warm-up, as this is a fraction of the steps"
            warnings.warn(
                f"this run of {before} steps continues after step {step} to {run.steps} steps: "
                f"from here on it has the learning rate of a run of {run.steps} steps, which "
                f"{how}; the result differs from that of one run",
                stacklevel=3,
            )

    def _check_agreed(self, step: int) -> None:
        """Raises ValueError unless all processes resume from the same step; a collective."""
        last = largest(step, self.mesh)
        if last != step or -largest(-step, self.mesh) != step:
            raise ValueError(
                f"all processes must find the same checkpoint in {self.keeping.folder}, got steps "
                f"{step} and {last}; the folder must be shared by all of them"
            )
