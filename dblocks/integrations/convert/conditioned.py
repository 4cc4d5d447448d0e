"""Adds a modulation to each layer of a model, and checks that layers still compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dblocks.integrations.convert.choices import choosing_alike, largest_rounding
from dblocks.integrations.convert.forms import LayerForm, require_form
from dblocks.integrations.convert.layers import ConditionedLayer, context_of
from dblocks.integrations.convert.plain import check_layers_alone


def conditioned(
    layers: Mapping[str, nn.Module],
    width: int,
    context: Callable[[Tensor], Mapping[str, Any]] = lambda rows: {},
    attention: Callable[[nn.Module], nn.Module] | None = None,
    probed: Callable[[nn.Module], nn.Module | None] | None = None,
    rows_context: Callable[[Tensor], Mapping[str, Any]] | None = None,
) -> dict[str, ConditionedLayer]:
    """The layers of a model with modulations, by name.

    Args:
        layers: its layers by name.
        width: D of their rows.
        context: keyword arguments of the layers for some rows [N, T, D].
        attention: replacement of an attention; its own by default.
        probed: replacement of an attention in the trial run of a layer; None for its own.
        rows_context: keyword arguments of the replacement, if they differ.

    Raises:
        ValueError: the form of a layer is not known, or the first layer of a class computes
            something else.
    """
    check_layers_alone(layers)
    forms = {name: require_form(name, layer) for name, layer in layers.items()}
    first = {type(layer): name for name, layer in reversed(list(layers.items()))}
    instead = {
        name: None if attention is None else attention(layer.get_submodule(forms[name].attention))
        for name, layer in layers.items()
    }
    for name in first.values():
        rows = probe(layers[name], width)
        ours = None if probed is None else probed(layers[name].get_submodule(forms[name].attention))
        given = (rows_context or context)(rows)
        check_form(layers[name], forms[name], rows, context(rows), name, (ours, given))
    return {
        name: ConditionedLayer(layer, width, forms[name], instead[name])
        for name, layer in layers.items()
    }


def probe(layer: nn.Module, width: int) -> Tensor:
    """Rows [1, 4, D] for the trial run of a layer, with the dtype and device of its parameters.

    Quantised weights are of integers, but not what is around them.
    """
    like = next((p for p in layer.parameters() if p.is_floating_point()), torch.empty(0))
    rows = torch.linspace(0, 4 * width, 4 * width, device=like.device).sin()
    return rows.view(1, 4, width).to(like.dtype)


def check_form(
    layer: nn.Module,
    form: LayerForm,
    x: Tensor,
    context: Mapping[str, Any],
    name: str,
    ours: tuple[nn.Module | None, Mapping[str, Any]] | None = None,
) -> None:
    """Raises unless the form computes the layer's own function of the rows x [N, T, D].

    `ours` is the replacement of the attention, if any, and its arguments; by default those of the
    layer.

    Raises:
        ValueError: it does not; layers of this kind are not supported.
    """
    if x.is_meta:
        return
    training = [m for m in layer.modules() if m.training]
    layer.eval()
    try:
        with torch.no_grad():
            attention = layer.get_submodule(form.attention)
            instead, given = ours or (None, context)
            parts = ConditionedLayer(layer, x.shape[-1], form, instead)
            own, found = choosing_alike(
                lambda: _rows(layer(x, **context_of(layer, attention, context))),
                lambda: parts(x, None, given),
                len(x),
                largest_rounding(x.dtype),
            )
    finally:
        for module in training:
            module.training = True
    # Both are rounded at each of a few operations, and a norm of the model may compute in float32
    # whatever the dtype; a wrong form differs by far more.
    eps = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
    budget = 64 * eps * own.abs().max()
    if own.shape != found.shape or not (own - found).abs().max() <= budget:
        raise ValueError(
            f"{name} must be a pre-norm or a post-norm layer of attention and MLP, but "
            f"{type(layer).__name__} computes something else from its parts; "
            "write a network with the members of dblocks.blocks.BlockModel instead"
        )


def _rows(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]
