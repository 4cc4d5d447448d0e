"""Example inputs on the meta device for models of known libraries."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TEXT_TOKENS = 7
"""Length of the text that images are conditioned on; any length works."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


def example_inputs(model: nn.Module) -> Call | None:
    """Arguments of one small forward, without data (on the meta device); None if none are known.

    Known are transformers' models of tokens (`dummy_inputs`) and of images (the config's
    `image_size`), timm's (the patch embedding's `img_size`, or `pretrained_cfg`), and diffusers'
    transformers of images of `sample_size`, with the text that their forward asks for.
    """
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)  # of transformers
    tokens: Any = getattr(model, "dummy_inputs", None)
    if main == "input_ids" and tokens is not None:
        return (), {name: tensor.to("meta") for name, tensor in tokens.items()}
    if main == "pixel_values" and hasattr(config, "image_size"):
        return (), {main: _image(model, config.num_channels, config.image_size)}
    data = getattr(model, "pretrained_cfg", None)  # of timm
    if isinstance(data, Mapping) and "input_size" in data:
        channels, *size = data["input_size"]
        # A patch embedding takes no other size; pretrained_cfg keeps that of the weights.
        sizes = (s for m in model.modules() if (s := getattr(m, "img_size", None)) is not None)
        return (_image(model, channels, next(sizes, size)),), {}
    if isinstance(config, Mapping) and {"sample_size", "in_channels"} <= config.keys():
        return _of_diffusers(model, config)
    return None


def _of_diffusers(model: nn.Module, config: Mapping[str, Any]) -> Call | None:
    taken = inspect.signature(model.forward).parameters
    if "hidden_states" not in taken:
        return None
    texts = ("joint_attention_dim", "caption_channels", "cross_attention_dim")
    text = next((config[key] for key in texts if config.get(key)), None)
    made = {
        "hidden_states": _image(model, config["in_channels"], config["sample_size"]),
        "timestep": torch.empty(1, dtype=torch.long, device="meta"),
        "class_labels": torch.empty(1, dtype=torch.long, device="meta"),
        "added_cond_kwargs": {
            "resolution": _values(model, 1, 2),
            "aspect_ratio": _values(model, 1, 1),
        },
    }
    if text is not None:
        made["encoder_hidden_states"] = _values(model, 1, TEXT_TOKENS, text)
    if pooled := config.get("pooled_projection_dim"):
        made["pooled_projections"] = _values(model, 1, pooled)
    return (), {name: value for name, value in made.items() if name in taken}


def _image(model: nn.Module, channels: int, size: Any) -> Tensor:
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return _values(model, 1, channels, height, width)


def _values(model: nn.Module, *shape: int) -> Tensor:
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.empty(shape, dtype=next(dtypes, torch.float32), device="meta")
