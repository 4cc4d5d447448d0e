"""`dblocks info --model`: reports what `convert` and `fuse_` would do with a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import NamedTuple, get_args

import torch
from torch import nn

from dblocks.blocks import BlocksConfig
from dblocks.info import aligned
from dblocks.integrations.build import build
from dblocks.integrations.convert import Task, convert
from dblocks.integrations.convert.find import find_layers
from dblocks.integrations.convert.residual import check_residual
from dblocks.integrations.convert.tasks import library_of
from dblocks.integrations.fuse import fuse_
from dblocks.schedules import MaskSchedule

WEIGHT_BYTES = 4  # of float32, as the next
TRAINING_BYTES = 12  # the gradient and Adam's two moments
MEMORY = """\
Memory: weights, gradients and Adam's two moments, all in float32; a block's is that of its own and
of the shared parameters, as one worker holds them. Activations are not counted: a block's are those
of its layers alone. dblocks.blocks.memory.SavedActivations measures them."""


class Division(NamedTuple):
    """The parameters of each block, and those that all blocks train."""

    title: str
    config: BlocksConfig
    blocks: Sequence[Sequence[nn.Parameter]]
    shared: Sequence[nn.Parameter]


def report(source: str, num_blocks: int) -> str:
    """The whole answer of `dblocks info --model`, ready to print.

    Args:
        source: where the model's config is; see `dblocks.integrations.build.build`.
        num_blocks: into how many blocks its layers would be cut.

    Raises:
        ValueError: there is no such model, or it has fewer layers than blocks.
        ImportError: its library is not installed.
    """
    BlocksConfig(num_blocks=num_blocks)  # checks the number before a library is imported
    model = build(source)
    parts = ["Model", *_described(model), "", "Residual layers"]
    try:
        layers = find_layers(model)
    except ValueError as error:
        parts += [f"  none: {error}"]
    else:
        parts += _found(model, layers)
        parts += ["", *_blocks(model, layers, num_blocks), "", MEMORY]
    # Last, since it changes the model.
    return "\n".join([*parts, "", "dblocks.fuse_(model)", *_fused(model)])


def _described(model: nn.Module) -> list[str]:
    library = library_of(model)
    version = f" {metadata.version(library)}" if library else ""
    return aligned(
        [
            ("library", f"{library}{version}"),
            ("class", type(model).__name__),
            ("parameters", f"{_count(model.parameters()):,}"),
        ]
    )


def _found(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    names = list(layers)
    kinds = " and ".join(dict.fromkeys(type(layer).__name__ for layer in layers.values()))
    try:
        unknown = check_residual(model, layers)
        shapes = f"not checked: {unknown}" if unknown else "every layer keeps that of its input"
    except ValueError as error:
        shapes = str(error)
    return aligned(
        [
            ("names", " to ".join(dict.fromkeys((names[0], names[-1])))),
            ("number", f"{len(names)} {kinds}"),
            ("shape", shapes),
        ]
    )


def _blocks(model: nn.Module, layers: Mapping[str, nn.Module], num_blocks: int) -> list[str]:
    division, refusals = _converted(model, num_blocks)
    heading = []
    if division is None:
        division = _as_it_is(model, layers, num_blocks)
        heading = ["Not converted by dblocks.convert, whatever the task:", *aligned(refusals), ""]
    config, whole = division.config, list(model.parameters())
    rows = [("block", "layers", config.schedule.symbol, "parameters", "memory", "of end to end")]
    ranges = config.layer_ranges(len(layers))
    for b, (own, (first, last)) in enumerate(zip(division.blocks, ranges, strict=True)):
        low, high = config.schedule.range_of(b, num_blocks)
        held = _bytes(own) + _bytes(division.shared)
        rows.append(
            (
                str(b),
                f"{first}-{last - 1}",
                f"{high:.4g} to {low:.4g}",
                f"{_count(own):,}",
                _size(held),
                f"{held / _bytes(whole):.0%}",
            )
        )
    rows += [
        ("shared", "", "", f"{_count(division.shared):,}", "", ""),
        ("end to end", "", "", f"{_count(whole):,}", _size(_bytes(whole)), "100%"),
    ]
    return [*heading, division.title, *aligned(rows)]


def _converted(model: nn.Module, num_blocks: int) -> tuple[Division | None, list[tuple[str, str]]]:
    """The blocks for the first task that the model can be converted for; else why for none."""
    noise = BlocksConfig(num_blocks=num_blocks)
    masks = BlocksConfig(num_blocks=num_blocks, schedule=MaskSchedule())
    tasks: list[tuple[Task, BlocksConfig]] = [(task, noise) for task in get_args(Task)]
    refusals = []
    for task, config in [*tasks, ("tokens", masks)]:
        schedule, token, mask_token_id = "", "", None
        if config is masks:
            schedule, token = ", schedule=MaskSchedule()", ", mask_token_id=..."
            mask_token_id = 0  # any: it changes no count
        call = f"BlocksConfig(num_blocks={num_blocks}{schedule}), task={task!r}{token}"
        try:
            # What `convert` adds holds no data either.
            with torch.device("meta"):
                dm = convert(model, config, task=task, mask_token_id=mask_token_id)
        except ValueError as error:
            refusals.append(
                (f"{task}{', masked' if schedule else ''}", str(error).partition(";")[0])
            )
            continue
        blocks = [list(dm.block_parameters(b)) for b in range(num_blocks)]
        shared = list(dm.shared_parameters())
        return Division(f"dblocks.convert(model, {call})", config, blocks, shared), []
    return None, refusals


def _as_it_is(model: nn.Module, layers: Mapping[str, nn.Module], num_blocks: int) -> Division:
    config = BlocksConfig(num_blocks=num_blocks)
    stack = list(layers.values())
    blocks = [
        [p for layer in stack[first:last] for p in layer.parameters()]
        for first, last in config.layer_ranges(len(stack))
    ]
    inside = {id(p) for block in blocks for p in block}
    shared = [p for p in model.parameters() if id(p) not in inside]
    return Division("Blocks, without what a conversion adds", config, blocks, shared)


def _fused(model: nn.Module) -> list[str]:
    replaced = Counter(
        (re.sub(r"(?<![^.])\d+(?![^.])", "*", name), before, after)
        for name, before, after in fuse_(model)
    )
    if not replaced:
        return [
            "  replaces nothing: it knows no module of this model; see "
            "dblocks.integrations.fuse.register_fusion"
        ]
    rows = [("name", "number", "class", "becomes")]
    rows += [(name, str(n), before, after) for (name, before, after), n in replaced.items()]
    return aligned(rows)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * (WEIGHT_BYTES + TRAINING_BYTES * p.requires_grad) for p in parameters)


def _size(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
