"""What the commands of all networks share: train and save, and load what was saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dblocks.recipes.report import Column
    from dblocks.recipes.run import Learner, Run


def train_and_save(run: Run, out: Path, columns: Sequence[Column]) -> None:
    """Trains with a progress bar, writes checkpoint and record, and prints the table.

    Raises:
        ValueError: `out` cannot be written to; found out before training.
        ImportError: a package that this needs is not installed; likewise.
    """
    from dblocks import checkpoint
    from dblocks.recipes import records
    from dblocks.recipes.report import text_table

    checkpoint.prepare(out)
    if run.device == "cpu":
        records.use_one_thread()

    def save(learner: Learner) -> None:
        checkpoint.save_model(out, learner.trained)
        learner.save_beside(out)

    record = records.train(run, progress=True, save=save).record
    records.write_record(out / "run.json", record)
    print(text_table({run.name: [record]}, columns))
    print(f"\nSaved model.safetensors, config.json and run.json in {out}")


def load_network(folder: Path, kind: type, command: str) -> tuple[Any, Any]:
    """The model of a folder, in blocks or not, and its network, which must be a `kind`.

    Args:
        folder: where `dblocks train` wrote.
        kind: the class of the network.
        command: as the command line names it, such as causal-lm.

    Raises:
        ValueError: the folder holds no model, or another one.
    """
    from dblocks import blocks, checkpoint

    model = checkpoint.load_model(folder)
    network = model.base_model if isinstance(model, blocks.DiffusionBlocks) else model
    if not isinstance(network, kind):
        raise ValueError(
            f"{folder} must hold a {kind.__name__}, got a {type(network).__name__}; "
            f"see `dblocks train {command} --help`"
        )
    return model, network


def check_steps(steps: int | None, folder: Path, model: Any) -> bool:
    """Whether the model is in blocks; raises ValueError for `--steps` that do not fit it."""
    from dblocks import blocks

    if steps is not None and steps < 1:
        raise ValueError(f"--steps must be positive, got {steps}")
    in_blocks = isinstance(model, blocks.DiffusionBlocks)
    if steps is not None and not in_blocks:
        raise ValueError(
            f"--steps counts denoising steps, and the network in {folder} was trained end to end: "
            "it runs all its layers once; leave --steps out"
        )
    return in_blocks


def progress_bar(label: str, total: int | None = None) -> Any:
    """A bar of sampling steps, silent where the output is not a terminal.

    Raises:
        ImportError: tqdm is not installed.
    """
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "sampling shows its progress with the package tqdm, which is not installed; "
            "`pip install 'dblocks[train]'`"
        ) from error
    # disable=None is tqdm's way of being silent where the output is not a terminal.
    return tqdm(total=total, desc=label, unit="step", disable=None)
