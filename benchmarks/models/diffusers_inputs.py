"""Small instances of diffusers' transformers, and inputs for them, from diffusers_models.json.

The file has for each class the arguments of its constructor and, for each argument of its forward,
a number, a text, or a tensor: `{"shape": [2, 4], "fill": 1.0, "dtype": "int64"}` (normal noise
without "fill"), or `{"list": [...], "dtype": ...}`; "items", "tuple" and "dict" hold several.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

MODELS = Path(__file__).with_name("diffusers_models.json")


def names() -> list[str]:
    """The classes, in order."""
    return sorted(json.loads(MODELS.read_text()))


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model without zero weights, and its inputs."""
    spec = json.loads(MODELS.read_text())[name]
    found = importlib.import_module("diffusers.models.transformers." + spec["module"])
    torch.manual_seed(0)
    model = getattr(found, name)(**spec["config"]).float().eval()
    for key, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.1)
        if parameter.ndim == 1 and key.endswith("weight"):
            parameter.data.add_(1)
    return model, {key: _given(value) for key, value in spec["inputs"].items()}


def _given(spec: Any) -> Any:
    if not isinstance(spec, dict):
        return spec
    if "dict" in spec:
        given = {key: _given(value) for key, value in spec["dict"].items()}
        return {int(key) if key.isdigit() else key: value for key, value in given.items()}
    if "items" in spec:
        return [_given(value) for value in spec["items"]]
    if "tuple" in spec:
        return tuple(_given(value) for value in spec["tuple"])
    dtype = getattr(torch, spec.get("dtype", "float32"))
    if "list" in spec:
        return torch.tensor(spec["list"], dtype=dtype)
    if "fill" in spec:
        return torch.full(spec["shape"], spec["fill"], dtype=dtype)
    return torch.randn(spec["shape"], dtype=dtype)
