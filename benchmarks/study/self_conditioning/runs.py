"""What runs of self-conditioned blocks have in common: the share of steps, and what they count.

A block that sees the prediction of the block before needs calls of all blocks before it, forward
only: a third of the work of a layer that is also differentiated (a backward takes twice a forward).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.study.self_conditioning.networks import ConditionedBlocks
from dblocks.recipes.run import Run

FORWARD = 1 / 3  # the work of a layer that is run forward only
SHARE = 0.5  # of a block's steps that see the block before


def check_run(run: Run, share: float) -> None:
    """Raises ValueError for what such blocks cannot be."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    if run.blocks == 1:
        raise ValueError("blocks must be 2 or more, as a block sees the one before it, got 1")
    if run.shared == "frozen":
        raise ValueError(
            "shared must not be 'frozen', as W, which adds the prediction of the block before, is "
            "shared and begins at zero, where it would stay; use 'train' or 'private'"
        )
    for name in ("end_to_end", "block", "resident"):
        if (value := getattr(run, name)) not in (None, False):
            raise ValueError(
                f"{name} must be left out, as a step of a block also calls the blocks before it, "
                f"got {value}"
            )


def layers_per_step(depth: int, blocks: int, share: float, forward: float = FORWARD) -> float:
    """Layer evaluations of a step on the average, with calls that are forward only at `forward`."""
    return depth / blocks * (1 + share * forward * (blocks - 1) / 2)


def work(run: Run, layer_evaluations: int) -> dict[str, float]:
    """Calls of layers that were forward only, and all calls with these counted as a third."""
    trained = run.steps * run.depth // run.blocks
    forward = layer_evaluations - trained
    return {"forward_only": forward, "work": round(trained + FORWARD * forward, 1)}


def made(
    run: Run, share: float, config: Any, kind: type[Any], make: Callable[[], Any]
) -> tuple[nn.Module, ConditionedBlocks]:
    """The network of `kind` in blocks, with the weights that the plain one of `make` begins with.

    Args:
        run: with the seed.
        share: see `ConditionedBlocks`.
        config: of the blocks.
        kind: a `ConditionedViT` or a `ConditionedLM`.
        make: makes the network without the condition.
    """
    sizes = make().config
    torch.manual_seed(run.seed)
    network = kind(sizes)
    return network, ConditionedBlocks(network, config, share)
