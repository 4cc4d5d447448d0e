"""Checks that layers keep the shape of the hidden state, by one forward on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dblocks.integrations.example_inputs import example_inputs

Call: TypeAlias = tuple[torch.Size, list[torch.Size]]
"""The shape of the hidden state that a layer was given, and those of the tensors it returned."""


def check_residual(
    model: nn.Module, layers: Mapping[str, nn.Module], *args: Any, **kwargs: Any
) -> str:
    """Raises unless every layer returns a tensor of the shape of its hidden state.

    The hidden state is a layer's first argument, or its keyword argument `hidden_states`; all
    layers must get the same shape. A copy of the model runs once, in eval mode and on the meta
    device: nothing is computed, no weight is copied, and the model is not changed.

    Args:
        model: the model that calls the layers.
        layers: its layers by name, as `find_layers` returns them.
        args: positional arguments of the model; `example_inputs(model)` by default.
        kwargs: keyword arguments of the model.

    Returns:
        An empty string, or why the shapes are not known: the model has no example inputs, its
        forward does not run on the meta device (as where control flow depends on data), or it does
        not call a layer with a tensor.

    Raises:
        ValueError: a layer changes the shape.
    """
    example = (args, kwargs) if args or kwargs else example_inputs(model)
    if example is None:
        return f"no example inputs are known for {type(model).__name__}"
    calls: dict[str, Call] = {}
    try:
        _run_on_meta(model, layers, *example, calls)
    # A model may raise anything on tensors without data.
    except Exception as error:
        message = " ".join(str(error).split())
        return f"the forward on the meta device raised {type(error).__name__}: {message}"
    for name in layers:
        if name not in calls:
            return f"the forward did not call {name} with a tensor first or as hidden_states"
    first = next(iter(layers))
    for name, (given, returned) in calls.items():
        if given not in returned:
            shapes = " and ".join(str(list(shape)) for shape in returned)
            raise ValueError(
                "layers must return hidden states of the shape that they are given, "
                f"got {list(given)} into {name} and {shapes or 'no tensor'} out of it; "
                "pass layers= with layers that keep the shape"
            )
        if given != calls[first][0]:
            raise ValueError(
                "all layers must be given hidden states of one shape, "
                f"got {list(calls[first][0])} at {first} and {list(given)} at {name}; "
                "pass layers= with layers between which the shape stays"
            )
    return ""


def _run_on_meta(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calls: dict[str, Call],
) -> None:
    # A deep copy takes what its memo holds in place of copying.
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(t): _to_meta(t) for t in tensors}).eval()

    def record(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
            hidden = given[0] if given else named.get("hidden_states")
            if isinstance(hidden, Tensor):
                values = out if isinstance(out, tuple) else (out,)
                calls[name] = hidden.shape, [v.shape for v in values if isinstance(v, Tensor)]

        return hook

    for name in layers:
        twin.get_submodule(name).register_forward_hook(record(name), with_kwargs=True)
    with torch.no_grad():
        twin(*map(_to_meta, args), **{key: _to_meta(value) for key, value in kwargs.items()})


def _to_meta(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, Mapping):
        return {key: _to_meta(inner) for key, inner in value.items()}
    return value
