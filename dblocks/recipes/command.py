"""Common code of the networks' commands: training, saving and loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dblocks import blocks, checkpoint, scale
from dblocks.checkpoint.networks import RECORD_FILE
from dblocks.config import check_count, json_text
from dblocks.recipes import records
from dblocks.recipes.keeping import FOLDER as CHECKPOINTS_FOLDER
from dblocks.recipes.keeping import Keeping
from dblocks.recipes.merged import eval_command, measured
from dblocks.recipes.paper.choice import check_files, experiment_of, run_of
from dblocks.recipes.paper.experiment import Experiment
from dblocks.recipes.paper.report import beside
from dblocks.recipes.run import Run
from dblocks.recipes.tables import OF_LAYERS, Column, text_table
from dblocks.recipes.tensorboard import Board
from dblocks.recipes.trainer import Trainer
from dblocks.scale.mesh import ALONE, Layout, joined, wait_for_all, world_size

TOKENIZER_FILE = "tokenizer.json"
SAVED_FILES = ("model.safetensors", "config.json", "block.json", RECORD_FILE, TOKENIZER_FILE)
KEEP = 2  # default number of checkpoints to keep


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How `dblocks train` trains a network: its flags are the fields of `run`."""

    run: Run
    """The defaults of the flags, for a run of minutes on a CPU."""
    out: Path
    """Where the network is saved by default."""
    columns: Sequence[Column]
    """The columns of the printed table."""
    gpu: Run | None = None
    """The defaults with `--recipe gpu`, for a large GPU; None if there is no such recipe."""
    paper: Sequence[Experiment] = ()
    """The experiments of the paper, `--recipe paper`; empty if there is no such recipe."""
    published: Mapping[str, Any] = field(default_factory=dict)
    """The options that `--published` changes; empty if there is no such flag."""
    published_help: str = ""
    """Help text of `--published`."""
    after: str = ""
    """Text to print at the end; {out} is replaced by the folder."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The values of `--recipe`."""
        more = [("gpu", self.gpu is not None), ("paper", bool(self.paper))]
        return ("small", *(name for name, there in more if there))

    def defaults(
        self, kind: str | None = None, *, data: str | None = None, published: bool = False
    ) -> Run:
        """The defaults of the flags with `--recipe`, `--data` and `--published`.

        Raises:
            ValueError: the paper has no experiment on the data, or both "paper" and `published` are
                given.
        """
        run = self.run
        if kind == "gpu" and self.gpu is not None:
            run = self.gpu
        if kind == "paper" and self.paper:
            if published:
                raise ValueError("--recipe paper already is as published; leave --published out")
            run = run_of(experiment_of(self.paper, data), run)
        return dataclasses.replace(run, **self.published) if published else run

    def train(
        self,
        run: Run,
        out: Path,
        *,
        overwrite: bool = False,
        checkpoint_every: int | None = None,
        keep: int = KEEP,
        resume: bool = False,
        tensorboard: Path | None = None,
        kind: str = "small",
    ) -> None:
        """Trains with a progress bar, writes network and record, and prints the table.

        Args:
            run: options of the run.
            out: folder to write to; a single block is written to a sub-folder.
            overwrite: whether to replace existing files.
            checkpoint_every: steps between two checkpoints.
            keep: number of checkpoints to keep.
            resume: whether to continue from the newest checkpoint.
            tensorboard: folder for TensorBoard files; a single block uses a sub-folder.
            kind: the value of `--recipe`: "paper" also prints the paper's results.

        Raises:
            ValueError: before training: the files of the paper's data are not given; or `out`
                cannot be written to, or holds a network or checkpoints and neither `overwrite` nor
                `resume` is given.
            ImportError: before training: a required package is not installed.
            Interrupted: Ctrl-C or SIGTERM was received, and there is a checkpoint.
        """
        experiment = None
        if kind == "paper":
            experiment = experiment_of(self.paper, getattr(run, "data", None))
            check_files(experiment, run)
        options: dict[str, Any] = {
            "overwrite": overwrite, "checkpoint_every": checkpoint_every, "keep": keep,
            "resume": resume, "tensorboard": tensorboard,
        }  # fmt: skip
        if world_size() == 1 or (run.block is not None and run.sharing == "reduce"):
            self._train(run, out, experiment=experiment, **options)
            return
        if run.end_to_end:
            raise ValueError("--end-to-end trains in one process; start it without torchrun")
        if run.sharing == "reduce" and world_size() != run.blocks:
            raise ValueError(
                f"--shared reduce must have a process for each of the {run.blocks} blocks, got "
                f"{world_size()}"
            )
        if run.block is None:
            check_free(out, saved_files(out), overwrite=overwrite or resume)
        with joined(run.blocks, run.device, run.block) as layout:
            for block in layout.blocks:
                self._train(dataclasses.replace(run, block=block), out, layout, **options)
            wait_for_all()
            if layout.merges:
                scale.merge_blocks(out, [out / f"block-{b}" for b in range(run.blocks)])
        if layout.merges:  # at this point no other process waits for this one
            self._measure(dataclasses.replace(run, block=0), out, experiment)

    def _measure(self, run: Run, out: Path, experiment: Experiment | None) -> None:
        """Evaluates the network merged in `out`; prints the results and adds them to the record."""
        try:
            record = measured(run, out)
        except torch.OutOfMemoryError as error:
            print(f"The whole network does not fit on {run.device} for evaluation: {error}")
            print(f"Evaluate it on another device: {eval_command(out, run, self.run)}")
            return
        records.write_record(out / RECORD_FILE, record)
        columns = [column for column in self.columns if column not in OF_LAYERS]
        print(text_table({run.name: [record]}, columns))
        self._say_more(run, out, experiment, record)

    def _say_more(self, run: Run, out: Path, experiment: Experiment | None, record: Any) -> None:
        if experiment is not None:
            print(f"\n{beside(experiment, run, run_of(experiment, self.run), record)}")
        print(f"\n{saved_line(out)}")
        if self.after:
            print(self.after.format(out=out))

    def _train(
        self,
        run: Run,
        out: Path,
        layout: Layout = ALONE,
        *,
        experiment: Experiment | None = None,
        overwrite: bool,
        checkpoint_every: int | None,
        keep: int,
        resume: bool,
        tensorboard: Path | None,
    ) -> None:
        """Runs one job: all blocks, or one block on the processes of `layout`."""
        if run.block is not None:
            out = out / f"block-{run.block}"
            tensorboard = tensorboard and tensorboard / f"block-{run.block}"
        folder = out / CHECKPOINTS_FOLDER
        keeping = None
        if checkpoint_every is not None or resume:
            check_count("--checkpoint-every", 1 if checkpoint_every is None else checkpoint_every)
            check_count("--keep", keep)
            keeping = Keeping(folder=folder, every=checkpoint_every, keep=keep, resume=resume)
        kept = folder.is_dir() and any(folder.glob("step-*"))
        if kept and not resume and not overwrite:
            raise ValueError(
                f"--out must be a folder without checkpoints, got {out}; continue with --resume, "
                "use another folder, or start again with --overwrite"
            )
        if resume and not kept and not overwrite and any(f.exists() for f in saved_files(out)):
            raise ValueError(
                f"--resume needs a checkpoint, got none in {folder}, and {out} holds a network; "
                "use another folder, or start again with --overwrite and --checkpoint-every"
            )
        check_free(out, saved_files(out), overwrite=overwrite or resume)
        on_point = None
        if tensorboard is not None and layout.first:
            on_point = Board(tensorboard).add  # first, as it may not be installed
        if run.device == "cpu":
            records.use_one_thread()

        def save(trainer: Trainer) -> None:
            if not layout.first and run.sharding != "fsdp":
                return
            # Saves the record so far too, so that the folder never holds that of another model.
            begun = records.begun(trainer)
            texts = trainer.batches.texts()
            if run.block is not None:
                settings = run.settings()
                if trainer.continued:
                    settings["continued"] = trainer.continued
                scale.save_block(out, trainer.trained, texts=texts, about={"run": settings})
                return
            texts = {RECORD_FILE: json_text(begun) + "\n", **texts}
            checkpoint.save_model(out, trainer.trained, texts=texts)

        with checkpoint.no_empty_folder(out):
            if layout.first:
                checkpoint.prepare(out)
            trained = records.train(
                run, progress=layout.first, save=save, keeping=keeping, mesh=layout.mesh,
                on_point=on_point,
            )  # fmt: skip
        if not layout.first:
            return
        records.write_record(out / RECORD_FILE, trained.record)
        if run.block is not None:
            print(_of_block(run, trained.record, out, merged=layout.merged))
            return
        print(text_table({run.name: [trained.record]}, self.columns))
        self._say_more(run, out, experiment, trained.record)


def _of_block(run: Run, record: dict[str, Any], out: Path, *, merged: bool) -> str:
    losses = [point["block_loss"][run.block] for point in record["curve"]]
    last = next((loss for loss in reversed(losses) if loss is not None), None)
    shown = "no step" if last is None else f"{record['steps_of_block']} of {run.steps} steps, "
    shown += "" if last is None else f"loss {last:.4f}, {record['process_mib']:.1f} MiB of state"
    lines = [f"block {run.block} of {run.blocks}: {shown}"]
    lines.append(saved_line(out))
    if not merged:
        lines.append(f"After training all blocks: dblocks merge {out.parent} {out.parent}")
    return "\n".join(lines)


def saved_files(out: Path) -> list[Path]:
    """The paths of a network's files in a folder, whether they exist or not."""
    return [checkpoint.current(out, name) for name in SAVED_FILES]


def saved_line(out: Path) -> str:
    """A sentence about the files of a network in a folder."""
    *names, last = [name for name in SAVED_FILES if checkpoint.current(out, name).exists()]
    return f"Saved {', '.join(names)} and {last} in {out}"


def check_free(out: Path, files: Sequence[Path], *, overwrite: bool, name: str = "--out") -> None:
    """Raises ValueError if files to be written exist and must not be replaced.

    Args:
        out: the path given by the user.
        files: the files to be written.
        overwrite: whether they may be replaced.
        name: name of the argument.
    """
    found = [path.name for path in files if path.exists()]
    if found and not overwrite:
        there = "" if out in files else f" with {', '.join(found)}"
        raise ValueError(
            f"{name} must not exist yet, got {out}{there}; use another name, or --overwrite"
        )


def load_network(folder: Path, kind: type) -> tuple[Any, Any]:
    """Loads a model, in blocks or not; returns it and its network, which must be a `kind`.

    Args:
        folder: the folder written by `dblocks train`.
        kind: the class of the network.

    Raises:
        ValueError: the folder holds no model, or another one.
    """
    model = checkpoint.load_model(folder)
    network = model.base_model if isinstance(model, blocks.DiffusionBlocks) else model
    if not isinstance(network, kind):
        raise ValueError(
            f"{folder} must hold a {kind.__name__}, got a {type(network).__name__}: "
            f"use `dblocks eval {name_of(folder)} --checkpoint {folder}`"
        )
    return model, network


def name_of(folder: Path) -> str:
    """The name on the command line of the network in a folder, such as causal-lm."""
    return checkpoint.read_config(folder)["model"].replace("_", "-")


def check_positive(steps: int | None) -> None:
    """Raises ValueError unless `--steps` is positive."""
    if steps is not None and steps < 1:
        raise ValueError(f"--steps must be positive, got {steps}")


def check_steps(steps: int | None, folder: Path, model: Any) -> bool:
    """Whether the model is in blocks; raises ValueError if it does not support `--steps`."""
    check_positive(steps)
    in_blocks = isinstance(model, blocks.DiffusionBlocks)
    if steps is not None and not in_blocks:
        raise ValueError(
            f"--steps is the number of denoising steps, and the network in {folder} was trained "
            "end to end: it runs all its layers once; leave --steps out"
        )
    return in_blocks
