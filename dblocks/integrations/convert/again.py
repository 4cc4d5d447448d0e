"""Converts a model that was changed since, so that the change is honoured, or refused by name.

What `convert` does is done again, with the parameters that it added kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dblocks.blocks.changes import UNCOUNTED, Row, Seen, changed, is_sharded
from dblocks.blocks.parameters import check_apart
from dblocks.integrations.convert.layers import ConditionedLayer
from dblocks.integrations.convert.network import Converted
from dblocks.integrations.convert.plain import check_layers_alone, check_weights
from dblocks.integrations.convert.tasks import network_of
from dblocks.integrations.convert.whole import check_whole

if TYPE_CHECKING:
    from dblocks.integrations.convert.blocks import ConvertedBlocks

STATE = ("family", "reads", "call_reads")  # what a network knows of its model


def convert_again(blocks: ConvertedBlocks, before: Seen | None, now: Seen) -> None:
    """Takes over what was changed in the model; nothing is changed if that is refused.

    Args:
        blocks: the converted model.
        before: what was seen of the model when it was converted or last verified; None if it
            never was.
        now: what is seen of it.

    Raises:
        ValueError: it could not be converted as it is now, or needs other added parameters.
    """
    network = blocks.base_model
    _check_layers(network)
    elsewhere = _elsewhere(blocks)
    if before is None:
        check_layers_alone(_layers(network), UNCOUNTED)
        before = now if elsewhere else Seen([], [])
        names, of_own_calls = {}, True
    else:
        names = changed(network.model, before.modules, now.modules)
        of_own_calls = _only_root_hooks(before.modules, now.modules)
    if before.modules != now.modules and not (of_own_calls and elsewhere):
        if not of_own_calls:
            _check_takes_changes(blocks, names)
        # Random numbers only initialise what is not kept.
        with torch.random.fork_rng(devices=[]):
            fresh = network_of(
                network.model, blocks.config, blocks.task, list(network.names), blocks.options
            )
        _check_added(network, fresh, names)
        if network.compared:
            network.whole_checked = check_whole(fresh)
        check_apart(cast(Any, network), blocks.layer_ranges)
        _take_over(network, fresh)
    else:
        for module in network.read_as_weights():
            check_weights(network.model, module)
        check_apart(cast(Any, network), blocks.layer_ranges)
    if blocks.config.shared == "frozen" and now.parameters:  # none are told while sharded
        old = set(before.parameters)
        for parameter in blocks.shared_parameters():
            if id(parameter) not in old:
                parameter.requires_grad_(False)


def check_copies(blocks: ConvertedBlocks) -> None:
    """Raises if a parameter of what blocks have copies of has another shape than in a copy.

    Tied embeddings are resized in place, by which no module is changed. Copies read the config of
    the model, which must stay the same object.
    """
    if not blocks.config.copied:
        return
    read = vars(blocks.base_model.model).get("config")
    for copied in blocks.copies.children():
        held = vars(copied.model).get("config") if isinstance(copied, Converted) else read
        if held is not read:
            raise ValueError(
                f"the model's config must stay the object that it was at convert with "
                f"shared={blocks.config.shared!r}, since each block's copy reads it, got another "
                f"{type(read).__name__}; set its entries, or convert the model anew"
            )
    own = dict(blocks.base_model.named_parameters(remove_duplicate=False))
    for copied in blocks.copies.children():
        for name, parameter in copied.named_parameters():
            shape = own[name].shape if name in own else parameter.shape
            if shape != parameter.shape:
                raise ValueError(
                    f"{name.removeprefix('model.')} must not be changed after convert with "
                    f"shared={blocks.config.shared!r}, since each block has a copy of it, got "
                    f"shape {list(shape)} and {list(parameter.shape)} in a copy; change it before, "
                    "or convert the model anew"
                )


def _layers(network: Converted) -> dict[str, nn.Module]:
    return dict(zip(network.names, network.own_layers(), strict=True))


def _elsewhere(blocks: ConvertedBlocks) -> bool:
    """Whether this process or device does not hold all weights."""
    sharded = any(map(is_sharded, blocks.modules()))
    return sharded or blocks.residency is not None


def _check_layers(network: Converted) -> None:
    """Raises unless each layer is still the module that was converted."""
    for name, layer in _layers(network).items():
        try:
            there = network.model.get_submodule(name)
        except AttributeError:
            there = None
        if there is not layer:
            raise ValueError(
                f"{name} must stay the module that was converted, a {type(layer).__name__}, whose "
                f"parameters its block trains, got "
                f"{'none' if there is None else f'another {type(there).__name__}'}; "
                "convert the model anew"
            )


def _only_root_hooks(before: list[Row], now: list[Row]) -> bool:
    """Whether only hooks of the model itself differ, which run in its own calls alone."""
    *root, _ = before[0]
    *other, _ = now[0]
    return before[1:] == now[1:] and root == other


def _check_takes_changes(blocks: ConvertedBlocks, names: dict[str, nn.Module]) -> None:
    if _elsewhere(blocks):
        raise ValueError(
            f"{_first(names)} must not be changed while the model is sharded or resident; change "
            "the model before"
        )
    if blocks.config.copied:
        layers = tuple(f"{name}." for name in blocks.base_model.names)
        # The root is not copied to be called: its hooks are of its own calls.
        outside = {n: m for n, m in names.items() if n and not f"{n}.".startswith(layers)}
        if outside:
            raise ValueError(
                f"{_first(outside)} must not be changed after convert with "
                f"shared={blocks.config.shared!r}, since each block has a copy of it; change it "
                "before, or convert the model anew"
            )


def _check_added(network: Converted, fresh: Converted, names: dict[str, nn.Module]) -> None:
    """Raises unless the added parameters would have the same shapes."""
    shapes, others = (
        {name: p.shape for name, p in n.named_parameters() if not name.startswith("model.")}
        for n in (network, fresh)
    )
    if shapes != others:
        differ = sorted(n for n in {**shapes, **others} if shapes.get(n) != others.get(n))
        raise ValueError(
            f"{_first(names)} must not be changed so that convert would add other parameters, got "
            f"others of {', '.join(differ[:3])}; convert the model anew"
        )


def _take_over(network: Converted, fresh: Converted) -> None:
    for name in STATE:
        if name in vars(network):
            vars(network)[name] = vars(fresh)[name]
    for layer, other in zip(network.layers, fresh.layers, strict=True):
        if isinstance(layer, ConditionedLayer) and isinstance(other, ConditionedLayer):
            layer.form, layer.instead = other.form, other.instead


def _first(names: dict[str, nn.Module]) -> str:
    """The innermost module that was changed, and its class."""
    if not names:
        return "the model"
    name = max(names, key=lambda n: n.count(".") + bool(n))
    return f"{name or 'the model'} ({type(names[name]).__name__})"
