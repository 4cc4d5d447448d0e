"""What a converted model's own config says of the function that it computes.

Tensors of one shape fit models with another activation, another epsilon or other positions; only
the config of transformers or diffusers tells them apart. Models of timm have none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from dblocks.blocks.changes import is_ignored


def config_of(model: nn.Module) -> dict[str, Any] | None:
    """The config of a model as JSON values, without paths and versions; None if it has none."""
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    if not isinstance(values, Mapping):
        return None
    return _json(values)


def differences(there: Any, here: Any, place: str = "") -> Iterator[str]:
    """The keys that both configs have with different values, and these.

    Versions of a library add keys and take others away, which says nothing about a model.
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() & here.keys()):
            yield from differences(there[key], here[key], f"{place}.{key}".removeprefix("."))
    elif there != here:
        yield f"{place}: {there!r} there, {here!r} here"


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items() if not _ignored(str(k))}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return type(value).__name__


def _ignored(key: str) -> bool:
    return key.startswith("_") or is_ignored(key)
