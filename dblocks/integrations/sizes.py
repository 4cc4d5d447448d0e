"""Reads only the sizes of a network from another library's config, within limits.

A config may name files and addresses that libraries would load while they build a model; such
entries are refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.nn.modules import module as hooks

# Of a count, such as that of layers; and of modules, of which the largest models have 100,000.
LARGEST_COUNT = 10_000
MOST_MODULES = 200_000
COUNTS = re.compile(r"layer|depth|block|stage|expert|head|group|repeat")
NO_COUNTS = re.compile(r"size|dim|width|channels|_id|token|len|window|index|idx|eps|vocab")
# What makes a library load or fetch, wherever it stands in a config.
LOADS = re.compile(
    r"^(use_)?pretrained(_backbone|_strict|_cfg.*|_model.*|_path)?$|^checkpoint_path$|^cache_dir$|"
    r"^hf_hub_id$|_url$"
)
# What decides no size, and may be fetched as code.
DROPPED = re.compile(r"^_?attn_implementation|^auto_map$|^quantization_config$")
# Of timm's `model_args`: what says how large a network is and of which parts it is made.
TIMM_SIZES = frozenset(
    {
        "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim",
        "embed_dims", "depth", "depths", "num_heads", "head_dim", "num_kv_heads", "mlp_ratio",
        "mlp_ratios", "qkv_bias", "qk_norm", "proj_bias", "init_values", "layer_scale_init_value",
        "class_token", "reg_tokens", "num_register_tokens", "no_embed_class", "pos_embed",
        "pre_norm", "final_norm", "fc_norm", "attn_norm", "scale_mlp_norm", "dynamic_img_size",
        "dynamic_img_pad", "use_rope", "rope_type", "rope_theta", "rope_temperature",
        "rope_mixed_mode", "rope_grid_offset", "rope_grid_indexing", "use_abs_pos_emb",
        "use_rel_pos_bias", "use_shared_rel_pos_bias", "use_post_norm", "use_rot_pos_emb",
        "ref_feat_shape", "swiglu_mlp", "window_size", "pretrained_window_size", "dims",
        "channels", "width", "base_width", "stem_width", "stem_type", "stem_size", "stem_chs",
        "layers", "cardinality", "block_size", "output_stride", "drop_rate", "drop_path_rate",
        "kernel_sizes", "conv_mlp", "use_grn", "conv_bias", "head_init_scale", "act_layer",
        "norm_layer", "mlp_layer", "dilations", "num_blocks", "expand_ratio",
    }
)  # fmt: skip


def sizes_of(config: Any, place: str = "") -> Any:
    """A config without what decides no size.

    Raises:
        ValueError: it asks to load something, or for too many of something.
    """
    if isinstance(config, list):
        return [sizes_of(value, place) for value in config]
    if not isinstance(config, Mapping):
        return config
    kept = {}
    for key, value in config.items():
        # Of timm's own files: where their weights came from.
        if DROPPED.search(key) or (not place and key == "pretrained_cfg"):
            continue
        where = f"{place}.{key}" if place else key
        _check_entry(key, value, where)
        kept[key] = sizes_of(value, where)
    return kept


def timm_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `timm.create_model` is told of a config: sizes only, by name.

    Raises:
        ValueError: `model_args` has another name, or a value that is no size.
    """
    given = config.get("model_args", {})
    if not isinstance(given, Mapping):
        raise ValueError(f"model_args of a config must be an object, got {given!r}")
    if unknown := sorted(set(given) - TIMM_SIZES):
        raise ValueError(
            f"model_args of a config must be sizes, got {unknown}; nothing is loaded or fetched "
            f"here, so leave out all but {', '.join(sorted(TIMM_SIZES))}"
        )
    options = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
    options = {**options, **given}
    for name, value in options.items():
        if isinstance(value, Mapping):
            raise ValueError(f"{name} of a config must be a size, got an object")
    return options


@contextmanager
def offline() -> Iterator[None]:
    """Refuses what Hugging Face's libraries fetch meanwhile, such as a backbone by its name."""
    try:
        constants: Any = importlib.import_module("huggingface_hub.constants")
    except ImportError:
        yield
        return
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def few_modules() -> Iterator[None]:
    """Stops a model from being built that has more modules than any real one."""
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > MOST_MODULES:
            raise ValueError(f"a model must have at most {MOST_MODULES:,} modules, got more")

    handle = hooks.register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check_entry(key: str, value: Any, where: str) -> None:
    if LOADS.search(key) and value not in (None, False, ""):
        raise ValueError(
            f"a config must give sizes only, got {where} = {value!r}; nothing is loaded or fetched "
            "here, so leave it out"
        )
    if COUNTS.search(key) and not NO_COUNTS.search(key):
        _check_counts(value, where)


def _check_counts(value: Any, where: str) -> None:
    for count in value if isinstance(value, list) else [value]:
        if isinstance(count, list):
            _check_counts(count, where)
        elif isinstance(count, (int, float)) and abs(count) > LARGEST_COUNT:
            raise ValueError(f"{where} must be at most {LARGEST_COUNT:,}, got {count}")
