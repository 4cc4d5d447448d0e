"""The networks for converted models, by library and task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, cast, get_args

from torch import nn

from dblocks.blocks import BlocksConfig
from dblocks.integrations.convert.denoisers import default_layers
from dblocks.integrations.convert.find import Layers, find_layers
from dblocks.integrations.convert.layers import ConditionedLayer
from dblocks.integrations.convert.network import Converted
from dblocks.integrations.convert.options import ConvertOptions
from dblocks.integrations.convert.plain import check_above
from dblocks.integrations.norms import warn_of_subclasses

Task = Literal["classes", "tokens", "images"]
LIBRARIES = ("transformers", "timm", "diffusers")

Make: TypeAlias = Callable[[Any, Mapping[str, nn.Module], BlocksConfig, ConvertOptions], Converted]


def network_of(
    model: nn.Module,
    config: BlocksConfig,
    task: Task,
    layers: Layers | None,
    options: ConvertOptions,
) -> Converted:
    """The model as a network for `DiffusionBlocks`; arguments are those of `convert`.

    Raises:
        ValueError: the layers are not found or are not transformer layers, the head is missing,
            or the model's family, the task and the schedule do not match.

    Warns:
        UserWarning: norms of the layers are subclasses of known ones; see
            `dblocks.integrations.norms`.
    """
    if task not in get_args(Task):
        raise ValueError(f"task must be one of {get_args(Task)}, got {task!r}")
    if task == "images" and options.clean_loss_weight:
        raise ValueError(
            "clean_loss_weight must be finite, not negative, and 0 for images, whose only loss is "
            f"that of denoising, got {options.clean_loss_weight}"
        )
    _check_unwrapped(model)
    library = library_of(model)
    if layers is None and (library, task) == ("diffusers", "images"):
        layers = default_layers(model)
    if layers is None and (library, task) == ("transformers", "tokens"):
        layers = _decoder(model)
    found = find_layers(model, layers)
    make = NETWORKS.get((library, task))
    if make is None:
        raise ValueError(
            f"task {task!r} must be one that a {type(model).__name__} has; see dblocks.convert for "
            "those that are known, or write a network with the members of "
            "dblocks.blocks.BlockModel"
        )
    network = make(model, found, config, options)
    if any(isinstance(layer, ConditionedLayer) for layer in network.layers):
        check_above(model, found)
    for layer in network.layers:
        if isinstance(layer, ConditionedLayer):
            warn_of_subclasses(layer.norms(), stacklevel=3)
    return network


def library_of(model: nn.Module) -> str | None:
    """The library of a model's class or of a base class; None for others.

    For a model in peft's wrapper, that of the model.
    """
    own = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    roots = [kind.__module__.partition(".")[0] for kind in type(own).__mro__]
    return next((root for root in roots if root in LIBRARIES), None)


def _check_unwrapped(model: nn.Module) -> None:
    """Raises for a model inside a wrapper of torch, whose names and calls are others."""
    inner = next((name for name in ("_orig_mod", "module") if name in model._modules), None)
    if inner is not None and type(model).__module__.startswith("torch."):
        raise ValueError(
            f"model must not be inside a wrapper of torch, got a {type(model).__name__}; convert "
            f"model.{inner}, and wrap or compile the converted model"
        )


# Each imports its library's file when it is called.


def _decoder(model: Any) -> str | None:
    from dblocks.integrations.convert.transformers import default_list

    return default_list(model)


def _transformers_classes(
    model: Any, layers: Mapping[str, nn.Module], config: BlocksConfig, options: ConvertOptions
) -> Converted:
    from dblocks.integrations.convert.transformers import classifier

    return classifier(model, layers, **_classifier_options(config, options))


def _transformers_tokens(
    model: Any, layers: Mapping[str, nn.Module], config: BlocksConfig, options: ConvertOptions
) -> Converted:
    from dblocks.integrations.convert.transformers import causal_lm, masked_lm

    if _masks(config):
        return masked_lm(model, layers, mask_token_id=options.mask_token_id)
    return causal_lm(
        model,
        layers,
        sigma_data=config.noise_schedule.sigma_data,
        embed_scale=options.embed_scale,
        tokens_per_sigma=options.tokens_per_sigma,
        rows_kind=options.rows,
        head_kind=options.head,
    )


def _timm_classes(
    model: Any, layers: Mapping[str, nn.Module], config: BlocksConfig, options: ConvertOptions
) -> Converted:
    from dblocks.integrations.convert.timm import classifier

    return classifier(model, layers, **_classifier_options(config, options))


def _diffusers_images(
    model: Any, layers: Mapping[str, nn.Module], config: BlocksConfig, options: ConvertOptions
) -> Converted:
    from dblocks.integrations.convert.diffusers import image_model

    return image_model(model, layers, config.noise_schedule)


NETWORKS: dict[tuple[str | None, Task], Make] = {
    ("transformers", "classes"): _transformers_classes,
    ("transformers", "tokens"): _transformers_tokens,
    ("timm", "classes"): _timm_classes,
    ("diffusers", "images"): _diffusers_images,
}


def _classifier_options(config: BlocksConfig, options: ConvertOptions) -> dict[str, Any]:
    # `DiffusionBlocks` refuses a classifier with masks, which have no sigma_data.
    sigma_data = 1.0 if _masks(config) else config.noise_schedule.sigma_data
    return {
        "sigma_data": sigma_data,
        "embed_scale": options.embed_scale,
        "head_kind": options.head,
    }


def _masks(config: BlocksConfig) -> bool:
    return config.schedule.corruption == "masks"
