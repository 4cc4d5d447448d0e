"""Builds other libraries' models from their configs on the meta device, without any download."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dblocks.config import read_json
from dblocks.integrations.sizes import few_modules, offline, sizes_of, timm_sizes

EXTRAS = {"transformers": "hf", "diffusers": "hf", "timm": "timm"}
CONFIG = "config.json"
PIPELINE = "model_index.json"
TIMM = "timm:"
HEADS = ("MASKED_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION")
"""Where a config of transformers names no class: the first of these heads that its type has."""


class UnknownModel(ValueError):
    """There is no model of this name."""


def build(source: str) -> nn.Module:
    """A model that holds no data.

    Args:
        source: a folder with a config.json, or such a file, of transformers (which has a
            "model_type"), diffusers ("_class_name") or timm ("architecture"); "timm:" and the name
            of a model of timm; or a model type of transformers, such as "llama", with the sizes
            that are its defaults. Only sizes are taken from a config: code beside it is not run,
            and nothing that it names is loaded or fetched.

    Raises:
        ValueError: it is none of these, asks for more than sizes or for too large ones, or its
            library cannot build it.
        ImportError: its library is not installed, or cannot be imported.
    """
    if source.startswith(TIMM):
        return _of_timm(source.removeprefix(TIMM), {})
    path = Path(source)
    if path.is_dir():
        path = _config_in(path)
    if path.exists():  # also what is no regular file, which its reader refuses
        return _of_file(path)
    if path.suffix == ".json" or len(path.parts) != 1:
        raise ValueError(
            f"a model must be a folder or file that exists, got {source}; nothing is downloaded: "
            f"fetch its {CONFIG} and pass that"
        )
    return _of_transformers({"model_type": source})


def _config_in(folder: Path) -> Path:
    if (folder / CONFIG).is_file():
        return folder / CONFIG
    parts = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG}"))
    if (folder / PIPELINE).is_file() and parts:
        raise ValueError(
            f"a model must be one part of a pipeline, got all of {folder}; "
            f"pass one of {', '.join(parts)}"
        )
    raise ValueError(f"{folder} must hold a {CONFIG}, of transformers, diffusers or timm")


def _of_file(path: Path) -> nn.Module:
    config = read_json(path, infinite=True)
    try:
        config = sizes_of(config)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    makers: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
        "_class_name": _of_diffusers,
        "architecture": lambda config: _of_timm(config["architecture"], config),
        "model_type": _of_transformers,
    }
    for key, make in makers.items():
        if isinstance(config, dict) and isinstance(config.get(key), str):
            return make(config)
    raise ValueError(
        f"{path} must be a config of transformers, with a model_type, of diffusers, with a "
        "_class_name, or of timm, with an architecture; it has none of these"
    )


def _of_transformers(config: dict[str, Any]) -> nn.Module:
    transformers = _library("transformers")
    types = transformers.CONFIG_MAPPING
    name = config["model_type"]
    if name not in types:
        raise _unknown("model type", "transformers", name, types.keys())
    with _importing("transformers"):
        kind = types[name]
        made = transformers.AutoModel.from_config
        for head in HEADS:
            if kind in (mapping := getattr(transformers, f"MODEL_FOR_{head}_MAPPING")):
                made = mapping[kind]
                break
    if names := config.get("architectures"):
        name = names[0] if isinstance(names, list) else names
        made = _network(_member(transformers, name), name)
    return _made(lambda: made(kind.from_dict(config)))


def _of_diffusers(config: dict[str, Any]) -> nn.Module:
    diffusers = _library("diffusers")
    name = config["_class_name"]
    kind = _network(_member(diffusers, name), name)
    return _made(kind.from_config, config)


def _of_timm(name: str, config: dict[str, Any]) -> nn.Module:
    timm = _library("timm")
    if not timm.is_model(name):
        raise _unknown("model", "timm", name, timm.list_models())
    return _made(timm.create_model, name, **timm_sizes(config), pretrained=False)


def _library(name: str) -> Any:
    with _importing(name):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise ImportError(
        f"this model needs the package {name}, which is not installed; "
        f"`pip install 'dblocks[{EXTRAS[name]}]'`"
    )


def _member(library: Any, name: str) -> Any:
    if not isinstance(name, str):
        raise ValueError(f"a config must name a class, got {name!r}")
    with _importing(library.__name__):
        if hasattr(library, name):
            return getattr(library, name)
    raise _unknown("class", library.__name__, name, dir(library))


def _network(kind: Any, name: str) -> Any:
    """A class of networks: a library also has pipelines and functions, which a config may name."""
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"a config must name a class of networks, got {name!r}, which is none")
    return kind


@contextmanager
def _importing(library: str) -> Iterator[None]:
    """Names what does not load, such as a torchvision for another torch; parts load on use."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ImportError(
            f"{library} is installed but not all of it loads: {_line(cause)}"
        ) from error


def _made(make: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
    try:
        with torch.device("meta"), few_modules(), offline():
            model = make(*args, **kwargs)
    # A config can be wrong in as many ways as there are models.
    except Exception as error:
        raise ValueError(
            "a config must be one that its library can build a model of, without data, "
            f"got {type(error).__name__}: {_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"a config must be that of a model, got one of {type(model).__name__}")
    return model


def _unknown(what: str, library: str, name: str, names: Iterable[str]) -> UnknownModel:
    near = ", ".join(difflib.get_close_matches(name, list(names), n=3))
    return UnknownModel(
        f"a {what} must be one that this version of {library} has, got {name!r}"
        + (f"; near names: {near}" if near else "")
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
