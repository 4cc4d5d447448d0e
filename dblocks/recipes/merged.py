"""Evaluates a network merged from blocks that were trained separately."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from dblocks.checkpoint import current
from dblocks.checkpoint.networks import load_weights_, read_config
from dblocks.config import read_json
from dblocks.info import environment
from dblocks.recipes.records import begun
from dblocks.recipes.run import Run

# Options of training that `dblocks eval` needs too.
OF_DATA = ("data", "data_path", "image_size", "scale", "fold")


def measured(run: Run, out: Path) -> dict[str, Any]:
    """The record of a merged network, as for a run of one process, with the costs of the blocks.

    Args:
        run: the run of one of its blocks.
        out: folder of the merged network.

    Raises:
        torch.OutOfMemoryError: the whole network does not fit on the device.
    """
    whole = dataclasses.replace(
        run, block=None, shared=run.sharing, resident=False, steps_per_visit=None, prefetch=None,
        host=None, sharding=None,
    )  # fmt: skip
    where, trainer = environment(), whole.trainer()
    load_weights_(trainer.trained, out)
    trainer.place()
    results = trainer.results(trainer.measure())
    merged = read_json(current(out, "run.json"))["merged"]
    costs = _costs(whole, out)
    return {**begun(trainer), "environment": where, **results, **costs, "merged": merged}


def _costs(run: Run, out: Path) -> dict[str, Any]:
    """Memory of the largest process of a block, and the total seconds of all."""
    found = [read_json(current(out / f"block-{b}", "run.json")) for b in range(run.blocks)]
    memory = ("activations_mib", "state_mib", "process_mib")
    return {
        "samples": run.steps * run.batch_size,
        **{name: max(record[name] for record in found) for name in memory},
        "seconds": round(sum(record["seconds"] for record in found), 3),
    }


def eval_command(out: Path, settings: Run | dict[str, Any], defaults: Run) -> str:
    """The command that evaluates a network.

    Args:
        out: folder of the network.
        settings: options of its training, as a run or JSON values.
        defaults: defaults of the flags.
    """
    values = settings if isinstance(settings, dict) else vars(settings)
    network = read_config(out)["model"].replace("_", "-")
    words = ["dblocks", "eval", network, "--checkpoint", str(out)]
    for name in OF_DATA:
        value = values.get(name)
        # A merged network has no record of its training, which would name the data.
        if value is not None and (name == "data" or value != getattr(defaults, name, None)):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
