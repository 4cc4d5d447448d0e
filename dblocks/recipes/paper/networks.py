"""The networks of the paper's experiments without their data, and the flags of a plan."""

from __future__ import annotations

from typing import Any, cast

import torch

from dblocks.recipes.data.splits import Images
from dblocks.recipes.paper.experiment import Experiment
from dblocks.recipes.run import Run

H200 = "141GB"  # memory; source: NVIDIA's data sheet


def network_config(experiment: Experiment, run: Run) -> Any:
    """The config of a run's network for the data set of an experiment."""
    maker = cast(Any, run)
    if not experiment.shape:
        return maker.model_config(experiment.labels)
    last = torch.tensor([experiment.labels - 1], device="cpu")
    images = Images(torch.zeros(1, *experiment.shape, device="cpu"), last)
    if experiment.network == "vit":
        return maker.vit_config(images, images)
    return maker.dit_config(images)


def plan_of(experiment: Experiment, run: Run) -> dict[str, Any]:
    """The flags of `dblocks plan` for an experiment on one H200."""
    return {
        **vars(network_config(experiment, run)),
        "memory": H200,
        "batch_size": run.batch_size,
        "blocks": run.num_blocks,
        "bf16": run.bf16,
        "ema": run.ema,
        "train_tokens": str(experiment.epochs * experiment.samples),
    }
