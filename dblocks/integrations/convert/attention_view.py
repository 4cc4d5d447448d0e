"""Views of the attention modules of transformers that attend by another function."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import nn

from dblocks.blocks.changes import replacement


def with_attention(attention: nn.Module, name: str) -> nn.Module:
    """A view of an attention module, with the same parameters, that calls the named function.

    transformers reads the name from the module's config, which all modules of a model share; the
    view has its own copy of the config.
    """
    if getattr(attention, "config", None) is None:
        raise ValueError(
            "an attention must be one of transformers whose config names the function that "
            f"attends, got a {type(attention).__module__.partition('.')[0]} "
            f"{type(attention).__name__} without a config; remove what took its place"
        )
    view = copy.copy(attention)
    if replacement(attention) is None:
        vars(view).pop("forward", None)  # it would run the attention itself
    config = copy.copy(cast(Any, attention).config)
    config._attn_implementation = name
    cast(Any, view).config = config
    cast(Any, view).dblocks_window = _window(view)
    return view


def follow_(view: nn.Module, attention: nn.Module) -> None:
    """Gives a view `with_attention` the attributes that its attention has by now."""
    if getattr(view, "dblocks_window", view) is view:
        return  # it is no view, and reads them itself
    config, name = cast(Any, view).config, cast(Any, view).config._attn_implementation
    vars(config).update(vars(cast(Any, attention).config))
    config._attn_implementation = name
    state = {**vars(attention), "config": config}
    if replacement(attention) is None:
        state.pop("forward", None)
    vars(view).update(state)
    cast(Any, view).dblocks_window = _window(view)


def _window(attention: Any) -> int | None:
    """The window of this attention's layer in its model's config, in positions.

    Most models pass it to the attention function; some have it in their masks only.
    """
    types = getattr(attention.config, "layer_types", None)
    number = getattr(attention, "layer_idx", None)
    if not types or number is None or types[number] != "sliding_attention":
        return None
    return attention.config.sliding_window
