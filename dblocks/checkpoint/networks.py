"""Saves and loads networks: weights, config and further files as one unit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dblocks._version import __version__
from dblocks.blocks import Block, BlocksConfig, DiffusionBlocks, unwrapped
from dblocks.checkpoint.files import (
    current,
    make_folder,
    naming,
    safetensors,
    saving,
    unchanged,
)
from dblocks.checkpoint.sealed import SHA256, check_beside, read_sealed, sealed, text_digest
from dblocks.checkpoint.tensors import load_safetensors, save_safetensors
from dblocks.config import JsonConfig
from dblocks.models.causal_lm import CausalLM, CausalLMConfig
from dblocks.models.dit import DiT, DiTConfig
from dblocks.models.masked_lm import MaskedLM, MaskedLMConfig
from dblocks.models.recurrent import RecurrentConfig, RecurrentLM
from dblocks.models.vit import ViT, ViTConfig

Network = nn.Module
NETWORKS: dict[str, tuple[type[nn.Module], type[JsonConfig]]] = {
    "vit": (ViT, ViTConfig),
    "causal_lm": (CausalLM, CausalLMConfig),
    "dit": (DiT, DiTConfig),
    "masked_lm": (MaskedLM, MaskedLMConfig),
    "recurrent": (RecurrentLM, RecurrentConfig),
}
FORMAT = 2
# Values of fields that did not exist in format 1.
FORMAT_1: dict[str, dict[str, Any]] = {
    "causal_lm": {"rows": "doubled", "head": "learned"},
    "recurrent": {"rows": "doubled", "head": "learned"},
    "vit": {"head": "learned", "noise_scale": None},
}
FORMAT_1_BLOCKS = {"top_share": 0.0}
KEYS = {"format", "dblocks", "model", "model_config", "blocks_config"}
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
RECORD_FILE = "run.json"  # record of a training run; load_model does not need it
BLOCK_FILE = "block.json"  # instead of config.json, for the weights of one block
RENAMED = {"readout": "output_head"}  # names of modules in files of version 0.1
COPIES = "copies."  # prefix of private copies, as in DiffusionBlocks.copies


def prepare(folder: str | Path) -> None:
    """Checks, before a long training, that `save_model` can write to this folder.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the folder cannot be created or written to.
    """
    safetensors()
    make_folder(folder)


def save_model(
    folder: str | Path,
    model: Network | DiffusionBlocks,
    *,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes a network, with its division into blocks, to a folder, which is created if needed.

    Weights keep their dtypes and have the names of the network itself, in blocks or not; private
    copies of shared modules are stored as `copies.0.` and so on, for the blocks after the first.
    The files are saved as one unit: if writing fails, the folder still holds the earlier save.

    Args:
        folder: where to write; files of an earlier save there are replaced.
        model: one of `NETWORKS` trained end to end, or the `DiffusionBlocks` of one; possibly
            inside the wrapper of torch.compile or AveragedModel.
        texts: contents of further files by name, such as a tokenizer.json.

    Raises:
        TypeError: `model` is neither.
        ValueError: it has other tensors than its config describes, such as those of an adapter.
        OSError: a file cannot be written; the earlier save is kept.
    """
    if isinstance(folder, nn.Module):
        raise TypeError("save_model takes the folder first, got a model; swap the two")
    model = unwrapped(model)
    network = _network(model)
    safetensors()
    config = model.config if isinstance(model, DiffusionBlocks) else None
    contents = described(network, config)
    _check_loadable(model, contents)
    texts = with_config(contents, texts or {})
    with saving(Path(folder)) as part:
        save_safetensors(part / WEIGHTS_FILE, _tensors(model))
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")


def with_config(config: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, str]:
    """The text files of a network, by name: those given, and last `config.json`."""
    beside = {name: text_digest(text) for name, text in texts.items() if name != RECORD_FILE}
    return {**texts, CONFIG_FILE: sealed(CONFIG_FILE, config, beside)}


def described(network: Network, config: BlocksConfig | None) -> dict[str, Any]:
    """The contents of `config.json` for a network, as JSON values.

    Raises:
        TypeError: it is not one of `NETWORKS`.
    """
    names = [name for name, (kind, _) in NETWORKS.items() if isinstance(network, kind)]
    if not names:
        raise TypeError(
            f"model must be one of {[kind.__name__ for kind, _ in NETWORKS.values()]} "
            "or the DiffusionBlocks of one, "
            f"got {type(network).__name__}; save its state_dict yourself"
        )
    return {
        "format": FORMAT,
        "dblocks": __version__,
        "model": names[0],
        "model_config": cast(Any, network).config.to_dict(),
        "blocks_config": None if config is None else config.to_dict(),
    }


def load_model(folder: str | Path) -> Network | DiffusionBlocks:
    """Loads a network saved by `save_model`: one of `NETWORKS`, or the `DiffusionBlocks` of one.

    It is on the CPU; weights have the dtypes that they were saved in.

    Raises:
        ValueError: the folder holds no such network, or a file is damaged; the message names it.
    """
    folder, _ = Path(folder), safetensors()

    def load() -> Network | DiffusionBlocks:
        config = read_config(folder)
        with naming(folder / CONFIG_FILE):
            model = rebuilt(config)
        load_weights_(model, folder, keep_dtypes=True)
        return model

    return unchanged(folder, [CONFIG_FILE], load)


def load_weights_(
    model: Network | DiffusionBlocks, folder: Path, *, keep_dtypes: bool = False
) -> None:
    """Loads the weights of a folder into a network of the same config, tensor by tensor.

    Args:
        model: the network.
        folder: holds the file of weights.
        keep_dtypes: whether the network takes the dtypes of the file; otherwise values are
            converted to its own.

    Raises:
        ValueError: the file of weights is damaged, or belongs to another network.
    """
    with naming(folder / WEIGHTS_FILE):
        found = load_safetensors(current(folder, WEIGHTS_FILE))
        tensors = {renamed(name): tensor for name, tensor in found.items()}
        _check_kinds(model, tensors)
        if keep_dtypes:
            _take_dtypes(model, tensors)
        if isinstance(model, DiffusionBlocks):
            copies = [name for name in tensors if name.startswith(COPIES)]
            model.copies.load_state_dict({n.removeprefix(COPIES): tensors.pop(n) for n in copies})
        _network(model).load_state_dict(tensors)


def _check_kinds(model: Network | DiffusionBlocks, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a tensor would lose values in that of its name."""
    for name, own in _tensors(model).items():
        found = tensors.get(name, own).dtype
        if found != own.dtype and not (found.is_floating_point and own.is_floating_point()):
            raise ValueError(f"{name} must be {own.dtype}, or of another float dtype, got {found}")


def _take_dtypes(model: Network | DiffusionBlocks, tensors: Mapping[str, Tensor]) -> None:
    """Converts the network's tensors to the dtypes of those of the same names."""
    for name, own in _tensors(model, keep_vars=True).items():
        if name in tensors and tensors[name].dtype != own.dtype:
            own.data = own.data.to(tensors[name].dtype)


def _check_loadable(model: Network | DiffusionBlocks, config: Mapping[str, Any]) -> None:
    """Raises ValueError unless the network that is built from the config has the same tensors."""
    with torch.device("meta"):
        built = rebuilt(config)
    shapes = [{name: t.shape for name, t in _tensors(m).items()} for m in (built, model)]
    others = sorted(n for n in {*shapes[0], *shapes[1]} if shapes[0].get(n) != shapes[1].get(n))
    if others:
        raise ValueError(
            "model must have the tensors that its config describes, or it could not be loaded, "
            f"got others as {', '.join(others[:3])} ({len(others)} in all); remove what was added, "
            "or save its state_dict yourself"
        )


def renamed(name: str) -> str:
    """The current name of a tensor in a file, which an earlier version may have written."""
    return ".".join(RENAMED.get(part, part) for part in name.split("."))


def rebuilt(config: Mapping[str, Any]) -> Any:
    """The network of a config from `described`, in blocks if it was, with new weights."""
    model = network_of(config)
    if config["blocks_config"] is None:
        return model
    return DiffusionBlocks(model, BlocksConfig.from_dict(config["blocks_config"]))


def network_of(config: Mapping[str, Any]) -> Any:
    """As `rebuilt`, but never in blocks."""
    kind, of_config = NETWORKS[config["model"]]
    return kind(cast(Any, of_config.from_dict(config["model_config"])))


def _network(model: Network | DiffusionBlocks) -> Network:
    return cast(Network, model.base_model) if isinstance(model, DiffusionBlocks) else model


def _tensors(model: Any, keep_vars: bool = False) -> dict[str, Tensor]:
    if isinstance(model, DiffusionBlocks):
        return named_tensors(model, keep_vars)
    return model.state_dict(keep_vars=keep_vars)


def named_tensors(model: DiffusionBlocks | Block, keep_vars: bool = False) -> dict[str, Tensor]:
    """The tensors of a network in blocks, or of one block, by their names in saved files.

    Args:
        model: the network, or the block.
        keep_vars: as of `state_dict`, whether they are the parameters and buffers themselves.
    """
    tensors = cast(nn.Module, model.base_model).state_dict(keep_vars=keep_vars)
    if len(model.copies):
        tensors.update(model.copies.state_dict(prefix=COPIES, keep_vars=keep_vars))
    return tensors


def blocks_inside(folder: Path) -> list[Path]:
    """The subfolders that hold a block."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in inside if path.is_dir() and current(path, BLOCK_FILE).exists()]


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of a config.json written by `save_model`, in the newest format.

    Raises:
        ValueError: the file has other contents.
    """
    path = current(folder, CONFIG_FILE)
    if not path.exists() and current(folder, BLOCK_FILE).exists():
        raise ValueError(
            f"{folder} must hold a whole network, got one block; `dblocks merge` merges the "
            "folders of all blocks into one"
        )
    if not path.exists() and (inside := blocks_inside(folder)):
        raise ValueError(
            f"{folder} must hold a whole network, got folders of blocks: "
            f"{', '.join(p.name for p in inside)}; `dblocks merge {folder} {folder}` merges "
            "them, if all are there"
        )
    if not path.exists():
        raise ValueError(f"{folder} must hold a {CONFIG_FILE} written by `dblocks train`")
    config = read_sealed(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a JSON object, got {config!r}")
    digests = config.pop(SHA256, None)
    if unknown := sorted(set(config) - KEYS):
        raise ValueError(f"{path} has unknown keys {unknown}; known keys are {sorted(KEYS)}")
    if missing := sorted(KEYS - set(config)):
        raise ValueError(f"{path} lacks the keys {missing}")
    if digests is not None:
        check_beside(folder / CONFIG_FILE, digests)
    if config["format"] not in (1, FORMAT) or config["model"] not in list(NETWORKS):
        raise ValueError(
            f"{path} must have format {FORMAT} or 1 and a model of {list(NETWORKS)}, "
            f"got {config['format']!r} and {config['model']!r}"
        )
    if config["format"] == 1:
        added = {
            "model_config": FORMAT_1.get(config["model"], {}),
            "blocks_config": FORMAT_1_BLOCKS,
        }
        # Values that are not objects raise an error where they are read.
        config |= {k: v | config[k] for k, v in added.items() if isinstance(config[k], dict)}
        blocks = config["blocks_config"]
        if config["model"] in FORMAT_1 and isinstance(blocks, dict):
            # The meaning of "auto" for a cross-entropy loss in format 1.
            old = blocks.get("weighting", "auto")
            blocks["weighting"] = "batch_mean" if old == "auto" else old
    return config
