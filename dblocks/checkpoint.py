"""Saving a trained network: `model.safetensors` beside a `config.json` that rebuilds it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from dblocks._version import __version__
from dblocks.blocks import BlocksConfig
from dblocks.models.vit import ViT, ViTConfig

FORMAT = 1
KEYS = {"format", "dblocks", "model", "model_config", "blocks_config"}
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def save_model(folder: Path, model: ViT, config: BlocksConfig | None) -> None:
    """Write a network and how it is cut into blocks; the folder is made if it is not there.

    Args:
        folder: where to write; files of an earlier save there are replaced.
        model: the network.
        config: its blocks; None for a network trained end to end.

    Raises:
        ValueError: the blocks have private copies of the shared parameters, which this single
            file does not hold.
    """
    if config is not None and config.shared == "private":
        raise ValueError(
            "save_model keeps one copy of the shared parameters, got shared='private'; "
            "save each block's state_dict instead"
        )
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        "format": FORMAT,
        "dblocks": __version__,
        "model": "vit",
        "model_config": model.config.to_dict(),
        "blocks_config": None if config is None else config.to_dict(),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    _safetensors().save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_model(folder: Path) -> tuple[ViT, BlocksConfig | None]:
    """The network that `save_model` wrote, on the CPU, and how it is cut into blocks.

    Raises:
        ValueError: the folder holds no such network, or its config has unknown keys.
    """
    config = _read_config(folder)
    model = ViT(ViTConfig.from_dict(config["model_config"]))
    model.load_state_dict(_safetensors().load_file(folder / WEIGHTS_FILE))
    blocks = config["blocks_config"]
    return model, None if blocks is None else BlocksConfig.from_dict(blocks)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"{folder} must hold a {CONFIG_FILE} written by `dblocks train`")
    config = json.loads(path.read_text(encoding="utf-8"))
    if unknown := sorted(set(config) - KEYS):
        raise ValueError(f"{path} has unknown keys {unknown}; known are {sorted(KEYS)}")
    if missing := sorted(KEYS - set(config)):
        raise ValueError(f"{path} lacks the keys {missing}")
    if config["format"] != FORMAT or config["model"] != "vit":
        raise ValueError(
            f"{path} must be of format {FORMAT} and model 'vit', "
            f"got {config['format']!r} and {config['model']!r}"
        )
    return config


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(
            "checkpoints need the package safetensors, which is not installed; "
            "`pip install 'dblocks[train]'`"
        ) from error
