"""Divides a residual network into blocks that are trained one at a time.

A block is a run of layers with a range of noise levels: block b denoises the levels that it owns,
so a training step of it runs its own layers only, forward and backward.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any, cast

from torch import nn

from dblocks.blocks.changes import (
    Seen,
    changed,
    check_called,
    children_of,
    remember,
    remembered,
    replaced_child,
    seen_of,
)
from dblocks.blocks.config import BlocksConfig, check_config
from dblocks.blocks.denoiser import Denoiser
from dblocks.blocks.model import BlockModel, Divisible, check_model
from dblocks.blocks.parameters import check_apart
from dblocks.config import check_block


class DiffusionBlocks(Denoiser):
    """A residual network as `num_blocks` denoisers, each of its own layers and noise levels.

    Called as k-diffusion calls a model, `model(z, sigma, **cond) -> denoised`; each call runs the
    layers of one block.

    Shared parameters (all outside `layers`) follow `config.shared`: "train" trains them with every
    block's step; "frozen" does not train them, which suits pretrained networks only; "private"
    gives every block its own copy, except of the target embedding, which is shared and frozen,
    since all blocks must have the same target; "reduce" is "private" for use with
    `dblocks.scale.average_shared`, which averages the copies every k steps. Freezing sets
    `requires_grad_(False)` on the network itself: for a second configuration pass a `copy.deepcopy`
    of it, or call `requires_grad_(True)` first.

    Args:
        model: a network with the members of `BlockModel`; its parameters are used, not copied.
        config: the number of blocks and the options of their training.

    Raises:
        TypeError: `model` lacks members of `BlockModel`, or `config` is not a `BlocksConfig`.
        ValueError: two blocks share a parameter of their layers, or a layer shares one with modules
            outside the layers.

    Warns:
        UserWarning: an earlier `DiffusionBlocks` froze parameters that this configuration would
            train.

    Source: Shing, Koyama and Akiba 2026, arXiv 2506.14202.
    """

    def __init__(self, model: BlockModel, config: BlocksConfig) -> None:
        super().__init__()
        check_model(model)
        check_config(config)
        _check_loss_kind(model, config)
        self.config = config
        self.layer_ranges = config.layer_ranges(len(model.layers))
        check_apart(model, self.layer_ranges)
        self.held = {b: slice(*layers) for b, layers in enumerate(self.layer_ranges)}
        self.base_model = model
        self.copies = nn.ModuleList()
        if config.shared != "train":
            for parameter in self.shared_parameters():
                parameter.requires_grad_(False)
        _check_frozen(model, config, {id(p) for p in self.shared_parameters()})
        if config.copied:
            self.copies.extend(_without_layers(model) for _ in range(1, config.num_blocks))
        _check_called(self)
        remember(self, seen_of(*self.watched()))

    def take_changes(self, before: Seen | None, now: Seen) -> None:
        """See `Denoiser.take_changes`; a network in place of another is used at once.

        Raises:
            ValueError: what is changed is not called, has a copy in each block, or makes blocks
                share a parameter.
        """
        _check_called(self)
        check_apart(self.base_model, self.layer_ranges)
        if not self.config.copied or before is None:
            return
        for name, module in changed(
            cast(nn.Module, self.base_model), before.modules, now.modules
        ).items():
            if name and name.partition(".")[0] != "layers":
                raise ValueError(
                    f"{name} ({type(module).__name__}) must not be changed after the network was "
                    f"divided with shared={self.config.shared!r}, since each block has a copy of "
                    "it; change it before"
                )

    def block(self, block: int) -> Block:
        """The view of one block, for a worker that trains and saves it."""
        return Block(self, block)

    def block_parameters(self, block: int) -> Iterator[nn.Parameter]:
        """The parameters that belong to one block alone."""
        return _parameters_of(self, block)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that all blocks use."""
        if self.config.copied:
            yield from self.base_model.target.parameters()
        else:
            yield from _outside_layers(self.base_model)

    def print_blocks(self) -> None:
        """Prints each block's layers, levels (sigma, or t for masks) and number of parameters."""
        symbol = self.config.schedule.symbol
        print(f"{'block':>5} {'layers':>8} {symbol:>20} {'parameters':>12}")
        for b, (first, last) in enumerate(self.layer_ranges):
            lo, hi = self.config.schedule.range_of(b, self.config.num_blocks)
            count = sum(p.numel() for p in self.block_parameters(b))
            print(f"{b:>5} {f'{first}-{last - 1}':>8} {f'{hi:.4g} to {lo:.4g}':>20} {count:>12,}")
        print(
            f"{'all':>5} {'':>8} {'':>20} {sum(p.numel() for p in self.shared_parameters()):>12,}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.residency is not None:
            raise RuntimeError(
                "a resident model must not be moved or converted, since its blocks travel by "
                "themselves; call close() on what resident() returned first"
            )
        return super()._apply(fn, recurse)


class Block(Denoiser):
    """One block of a `DiffusionBlocks`: the same tensors, without the other blocks' layers.

    Its state_dict keys are those of the whole network, so that a worker's checkpoint loads there
    with `strict=False`.

    Args:
        whole: the network.
        block: which of its blocks.
    """

    def __init__(self, whole: DiffusionBlocks, block: int) -> None:
        super().__init__()
        self.config = whole.config
        self.index = block = check_block(block, whole.config.num_blocks)
        self.residency = whole.residency
        model, layers = whole.parts_at_rest(block)
        first = whole.layer_ranges[block][0]
        named = {str(first + k): layer for k, layer in enumerate(layers)}
        self.held = {block: slice(len(layers))}
        shared = model is whole.base_model
        self.base_model = cast(BlockModel, _with_layers(whole.base_model, named, shared=shared))
        self.copies = nn.ModuleDict()
        if model is not whole.base_model:
            self.copies[str(block - 1)] = cast(nn.Module, model)
        remember(self, seen_of(*self.watched()))
        if not isinstance(whole.base_model, Divisible):
            paths = [f"layers.{i}" for i in range(len(whole.base_model.layers))]
            others = [path for path in paths if path.partition(".")[2] not in named]
            children = children_of(cast(nn.Module, whole.base_model), paths, others)
            remember(self.base_model, children)  # pyright: ignore[reportArgumentType]

    def follow_changes_(self) -> None:
        """See `Denoiser.follow_changes_`; also looks at the network that the block is part of."""
        children = remembered(cast(nn.Module, self.base_model))
        replaced = replaced_child(children) if isinstance(children, list) else None
        if replaced is not None:
            raise ValueError(
                f"{replaced} must stay the module that it was when the block was taken, which the "
                "block still holds, got another or none; take the block anew: dm.block(i)"
            )
        super().follow_changes_()

    def take_changes(self, before: Seen | None, now: Seen) -> None:
        """See `Denoiser.take_changes`.

        Raises:
            ValueError: what is changed is not called.
        """
        _check_called(self)

    def block_parameters(self, block: int) -> Iterator[nn.Parameter]:
        """The parameters that belong to this block alone."""
        return _parameters_of(self, block) if block in self.held else iter(())

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that all blocks use, as held here."""
        model, _ = self.parts_at_rest(cast(int, self.index))
        if self.config.copied:
            return iter(model.target.parameters())
        return _outside_layers(model)


def _parameters_of(held: Denoiser, block: int) -> Iterator[nn.Parameter]:
    model, layers = held.parts_at_rest(block)
    yield from (p for layer in layers for p in layer.parameters())
    if held.config.copied:
        frozen = {id(p) for p in model.target.parameters()}
        yield from (p for p in _outside_layers(model) if id(p) not in frozen)


def _check_called(held: Denoiser) -> None:
    """Raises for hooks that would not run in a network's blocks; conversion has its own checks."""
    if isinstance(held.base_model, Divisible):
        return
    for block in held.held:
        model, layers = held.parts_at_rest(block)
        check_called(model, [layers])


def _check_loss_kind(model: BlockModel, config: BlocksConfig) -> None:
    schedule = config.schedule
    if model.target.loss_kind not in schedule.loss_kinds:
        raise ValueError(
            f"loss_kind of {type(model).__name__} must be one of {schedule.loss_kinds} with a "
            f"{type(schedule).__name__}, got {model.target.loss_kind!r}; "
            "tokens that are masked need a MaskSchedule, all else a NoiseSchedule"
        )


def _check_frozen(model: BlockModel, config: BlocksConfig, shared_ids: set[int]) -> None:
    """Warns about parameters that an earlier configuration froze and this one would train."""
    if config.shared != "frozen" and getattr(model, "_frozen_by_blocks", False):
        kept = shared_ids if config.copied else set()
        outside = (p for p in _outside_layers(model) if id(p) not in kept)
        count = sum(not p.requires_grad for p in outside)
        if count:
            warnings.warn(
                f"shared={config.shared!r} trains all parameters, got {count} outside the layers "
                "that an earlier DiffusionBlocks of this network froze; call requires_grad_(True) "
                "on it first, or give each configuration a copy.deepcopy of it",
                UserWarning,
                stacklevel=3,
            )
    if config.shared != "train":
        model._frozen_by_blocks = True  # pyright: ignore[reportAttributeAccessIssue]


def _without_layers(model: BlockModel) -> nn.Module:
    if isinstance(model, Divisible):
        return model.without_layers()
    return copy.deepcopy(cast(nn.Module, model), {id(model.layers): nn.ModuleList()})


def _with_layers(model: BlockModel, layers: dict[str, nn.Module], *, shared: bool) -> nn.Module:
    """A view of `model` that holds these layers only, and the same other tensors or none."""
    if isinstance(model, Divisible):
        return model.with_layers(layers, shared=shared)
    view = copy.copy(cast(nn.Module, model)) if shared else nn.Module()
    view._modules = dict(view._modules)
    view.layers = nn.ModuleDict(layers)
    return view


def _outside_layers(model: BlockModel) -> Iterator[nn.Parameter]:
    inside = {id(p) for p in model.layers.parameters()}
    yield from (p for p in cast(nn.Module, model).parameters() if id(p) not in inside)
