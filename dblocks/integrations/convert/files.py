"""The files of a converted model: one per block and one for shared tensors.

    dblocks.json  block_00.safetensors  block_01.safetensors  ...  shared.safetensors  README.md

A worker that trains one block writes that block's file, and what all blocks share unless it is
there already: then its bits must be the same, and so must the options in dblocks.json. Tensors of
the user's model keep the names that they have in it, so that its `load_state_dict(...,
strict=False)` takes them; names of tensors that `convert` added begin with `dblocks.`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dblocks._version import __version__
from dblocks.blocks import BlocksConfig
from dblocks.checkpoint import (
    current,
    load_safetensors,
    naming,
    save_safetensors,
    saving,
    unchanged,
)
from dblocks.checkpoint.sealed import SHA256, check_beside, read_sealed, sealed
from dblocks.checkpoint.tensors import opened
from dblocks.config import json_text
from dblocks.integrations.convert.model_config import config_of, differences
from dblocks.integrations.convert.plain import quantised

if TYPE_CHECKING:
    from dblocks.integrations.convert.blocks import ConvertedBlocks

FORMAT = 2
# Options that format 1 did not store, and the values that it implied.
FORMAT_1_OPTIONS = {"rows": "doubled", "head": "learned"}
FORMAT_1_BLOCKS = {"top_share": 0.0}
CONFIG_FILE = "dblocks.json"
SHARED_FILE = "shared.safetensors"
CARD_FILE = "README.md"
MODEL, NETWORK, COPIES = "base_model.model.", "base_model.", "copies."  # of a state_dict's names
ADDED = "dblocks."
KEYS = {"format", "dblocks", "model", "layers", "task", "options", "blocks_config", "ties"}
MODEL_CONFIG = "model_config"  # a key that earlier versions did not write
UNCOMPARED = ("format", "dblocks", MODEL_CONFIG)  # of jobs of one model


def block_file(block: int) -> str:
    """The name of a block's file."""
    return f"block_{block:02d}.safetensors"


def save(blocks: ConvertedBlocks, folder: str | Path, block: int | None = None) -> None:
    """Writes the files of all blocks and of shared tensors, or what the job of one block has.

    Args:
        blocks: the converted model. If one block only is loaded, that is the job's.
        folder: created if it does not exist; files of an earlier save are replaced.
        block: the block of the job.

    Raises:
        ValueError: the folder has files of other jobs that do not fit those of this job; or weights
            are quantised.
    """
    folder = Path(folder)
    _check_plain(blocks)
    tensors, ties = _named(blocks)
    owners = _owners(blocks)
    parts: dict[str, dict[str, Tensor]] = {SHARED_FILE: {}}
    for name, tensor in tensors.items():
        owner = owners(name)
        file = SHARED_FILE if owner is None else block_file(owner)
        parts.setdefault(file, {})[_outside(name)] = tensor
    config = _described(blocks, ties)
    job = blocks.loaded if block is None else block
    if job is not None:
        parts = _parts_of_job(blocks, parts, job)
        unchanged(folder, [CONFIG_FILE], lambda: _check_job(folder, config, parts))

    def check_again() -> None:  # another job may have written while this one did
        if job is not None:
            _check_job(folder, config, parts)

    with saving(folder, check_again) as place:
        for file, part in parts.items():
            if job is None or file != SHARED_FILE or not current(folder, file).exists():
                save_safetensors(place / file, part)
        (place / CONFIG_FILE).write_text(sealed(CONFIG_FILE, config), encoding="utf-8")
        if block is None or not current(folder, CARD_FILE).exists():
            (place / CARD_FILE).write_text(_card(blocks), encoding="utf-8")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The contents of dblocks.json.

    Raises:
        ValueError: it does not exist, or is not valid.
    """
    path = current(Path(folder), CONFIG_FILE)
    if not path.exists():
        raise ValueError(f"{folder} must hold a {CONFIG_FILE} written by save_pretrained()")
    with naming(path):
        config = read_sealed(path)
        digests = config.pop(SHA256, None) if isinstance(config, dict) else None
        if digests is not None:
            check_beside(path, digests)
        known = isinstance(config, dict) and set(config) - {MODEL_CONFIG} == KEYS
        if not known or config["format"] not in (1, FORMAT):
            raise ValueError(f"it must be of format {FORMAT} or 1 with the keys {sorted(KEYS)}")
        if config["format"] == 1:
            config["options"] = FORMAT_1_OPTIONS | config["options"]
            blocks = config["blocks_config"] = FORMAT_1_BLOCKS | config["blocks_config"]
            of_noise = blocks["schedule"]["type"] == "NoiseSchedule"
            if blocks["weighting"] == "auto" and of_noise and config["task"] != "images":
                blocks["weighting"] = "batch_mean"  # the meaning of "auto" for a cross-entropy
    return {MODEL_CONFIG: None, **config}


def check_model(folder: str | Path, config: Mapping[str, Any], model: nn.Module) -> None:
    """Raises ValueError unless a model is as the one whose blocks a folder holds.

    Args:
        folder: the folder.
        config: as of `read_config`.
        model: the model.
    """
    if type(model).__name__ != config["model"]:
        raise ValueError(
            f"model must be a {config['model']}, as in {folder}, got a {type(model).__name__}"
        )
    if differ := _config_differences(config, config_of(model)):
        raise ValueError(
            f"model must compute what the one saved in {folder} does, got other values of "
            f"{'; '.join(differ)}; build it with the config of the saved one"
        )


def read(folder: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What dblocks.json holds, and the tensors of the other files by name, all of one save.

    Args:
        folder: the folder.
        model: the model to load them into.

    Raises:
        ValueError: a file is missing or broken, or of another model; or files of the folder change
            all the time.
    """

    held: dict[str, tuple[Any, dict[str, Tensor]]] = {}

    def read_all() -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = read_config(folder)
        check_model(folder, config, model)
        with naming(folder / CONFIG_FILE):
            count = BlocksConfig.from_dict(config["blocks_config"]).num_blocks
        files = [*map(block_file, range(count)), SHARED_FILE]
        for file in files:  # jobs of other blocks may save theirs meanwhile
            held[file] = _read_file(folder, file, held.get(file))
        return config, {n: tensor for file in files for n, tensor in held[file][1].items()}

    return unchanged(folder, [CONFIG_FILE], read_all)


def _read_file(folder: Path, file: str, before: Any) -> tuple[Any, dict[str, Tensor]]:
    """Which file it is, and its tensors; `before`, what was read before, if it is the same file."""
    path = current(folder, file)
    if not path.exists():
        raise ValueError(
            f"{folder} must hold {file}; each block's worker writes its own by "
            "save_pretrained(folder, block=), and with shared='train' the rest comes with "
            "save_pretrained(folder)"
        )
    with naming(path):
        about = path.stat()
        which = about.st_ino, about.st_size, about.st_mtime_ns
        return before if before and before[0] == which else (which, load_safetensors(path))


def fill(
    blocks: ConvertedBlocks, folder: Path, tensors: dict[str, Tensor], ties: dict[str, str]
) -> None:
    """Puts tensors of `read` into a model that was converted with the same options.

    Raises:
        ValueError: the tensors do not fit.
    """
    with naming(folder / CONFIG_FILE):
        if missing := sorted(set(ties.values()) - set(tensors)):
            raise ValueError(f"ties must be to tensors that the other files hold, got {missing}")
    tensors = tensors | {name: tensors[first] for name, first in ties.items()}
    state = {_inside(name): tensor for name, tensor in tensors.items()}
    _check_tensors(folder, state, blocks.state_dict())
    with naming(folder):
        blocks.load_state_dict(state)


def _check_tensors(folder: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises if the saved model has other modules, such as adapters, than the one to load into."""
    odd = [
        f"{len(names)} only {where}, such as {_outside(min(names))}"
        for names, where in (
            (saved.keys() - own.keys(), "there"),
            (own.keys() - saved.keys(), "here"),
        )
        if names
    ] or [
        f"{_outside(name)} of shape {list(saved[name].shape)} for {list(tensor.shape)}"
        for name, tensor in own.items()
        if saved[name].shape != tensor.shape
    ][:1]
    if odd:
        raise ValueError(
            f"model must have the tensors of the one saved in {folder}, got {'; '.join(odd)}; "
            "make the same changes to it first, such as adding adapters or merging them"
        )


def _check_plain(blocks: ConvertedBlocks) -> None:
    packed = {name: p for name, p in blocks.named_parameters() if quantised(p)}
    if packed:
        name, p = next(iter(packed.items()))
        raise ValueError(
            f"weights must be plain to be saved, got {len(packed)} quantised ones, such as "
            f"{_outside(name)}, a {type(p).__name__} of {p.dtype}; save an adapter by its own "
            "save_pretrained, or the model's state_dict() by torch.save"
        )


def _described(blocks: ConvertedBlocks, ties: dict[str, str]) -> dict[str, Any]:
    """What dblocks.json holds."""
    return {
        "format": FORMAT,
        "dblocks": __version__,
        "model": type(blocks.base_model.model).__name__,
        MODEL_CONFIG: config_of(blocks.base_model.model),
        "layers": list(blocks.base_model.names),
        "task": blocks.task,
        "options": asdict(blocks.options),
        "blocks_config": blocks.config.to_dict(),
        "ties": {_outside(name): _outside(first) for name, first in ties.items()},
    }


def _parts_of_job(
    blocks: ConvertedBlocks, parts: dict[str, dict[str, Tensor]], job: int
) -> dict[str, dict[str, Tensor]]:
    """The tensors by file that the job of one block has."""
    own = {block_file(job): parts[block_file(job)]}
    if blocks.config.shared == "train":
        return own  # no job alone knows what all blocks have trained
    shared = parts[SHARED_FILE]
    if blocks.config.copied and job:  # the model's own may be elsewhere, those of a copy are here
        state, copy = blocks.state_dict(), f"{COPIES}{job - 1}."
        shared = {name: state[copy + _inside(name).removeprefix(NETWORK)] for name in shared}
    return own | {SHARED_FILE: shared}


def _check_job(folder: Path, config: dict[str, Any], parts: dict[str, dict[str, Tensor]]) -> None:
    """Refuses a folder with files of other jobs that would not make one model with these."""
    if current(folder, CONFIG_FILE).exists():
        there, mine = read_config(folder), json.loads(json_text(config))
        differ = _config_differences(there, mine[MODEL_CONFIG])
        there |= {key: mine[key] for key in UNCOMPARED}
        if differ := [*_differences(there, mine), *differ]:
            raise ValueError(
                f"{folder} must be of the same conversion as the block, since all its blocks make "
                f"one model, got other values of {'; '.join(differ)}; convert with the same "
                "options in every job, or save in another folder"
            )
    path = current(folder, SHARED_FILE)
    if SHARED_FILE not in parts or not path.exists():
        return
    shared = parts[SHARED_FILE]
    with naming(path), opened(path) as held:
        names = {_outside(_inside(name)): name for name in held.keys()}  # noqa: SIM118
        other = sorted(names.keys() ^ shared.keys()) or [
            name
            for name, own in shared.items()
            if not _same_bits(own, held.get_tensor(names[name]))
        ]
    if other:
        raise ValueError(
            f"{path} must hold, bit for bit, what this block shares with the others, got another "
            f"{other[0]} ({len(other)} differ); call the same torch.manual_seed before "
            "convert_block in every job, or save in another folder"
        )


def _config_differences(config: Mapping[str, Any], mine: dict[str, Any] | None) -> list[str]:
    """Where the config of the model in a folder differs from another one, if both are known."""
    there = config[MODEL_CONFIG]
    return [] if there is None or mine is None else list(differences(there, mine))


def _differences(there: Any, mine: Any, place: str = "") -> Iterator[str]:
    """The places where two values of JSON differ, and what is there."""
    if isinstance(there, dict) and isinstance(mine, dict):
        for key in sorted({**there, **mine}):
            inner = f"{place}.{key}".removeprefix(".")
            yield from _differences(there.get(key), mine.get(key), inner)
    elif there != mine:
        yield f"{place}: {there!r} there, {mine!r} here"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    bits = [t.detach().cpu().contiguous().flatten().view(torch.uint8) for t in (one, other)]
    return bits[0].equal(bits[1])


def _named(blocks: ConvertedBlocks) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by their first names, and further names of tied ones."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in blocks.state_dict().items():
        memory = tensor.untyped_storage()._cdata if tensor.is_meta else tensor.data_ptr()
        key = (memory, tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            ties[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor
    return tensors, ties


def _owners(blocks: ConvertedBlocks) -> Callable[[str], int | None]:
    """A function from a name in the state_dict to the tensor's block; None if it is shared."""
    names = blocks.base_model.names
    layers = {
        prefix: block
        for block, (first, last) in enumerate(blocks.layer_ranges)
        for i in range(first, last)
        for prefix in (f"{MODEL}{names[i]}.", f"{NETWORK}modulations.{i}.")
    }
    common = {id(p) for p in blocks.shared_parameters()}
    shared = {n for n, p in blocks.named_parameters(remove_duplicate=False) if id(p) in common}
    # With private parameters, those of the model itself belong to block 0.
    rest = 0 if blocks.config.copied else None

    def owner(name: str) -> int | None:
        if name.startswith(COPIES):
            return int(name.split(".")[1]) + 1
        found = next((block for prefix, block in layers.items() if name.startswith(prefix)), rest)
        return None if name in shared else found

    return owner


def _outside(name: str) -> str:
    """The name in files."""
    if name.startswith(MODEL):
        return name.removeprefix(MODEL)
    return ADDED + name.removeprefix(NETWORK)


def _inside(name: str) -> str:
    """The name in the state_dict."""
    if not name.startswith(ADDED):
        return MODEL + name
    name = name.removeprefix(ADDED).replace("readout_modulation.", "head_modulation.")  # of 0.1
    return name if name.startswith(COPIES) else NETWORK + name


def _card(blocks: ConvertedBlocks) -> str:
    config, kind = blocks.config, type(blocks.base_model.model).__name__
    lines = [
        "---",
        "library_name: dblocks",
        "---",
        f"# {kind} in {config.num_blocks} blocks",
        "",
        f"A `{kind}` converted by dblocks {__version__} for task `{blocks.task}` and trained block "
        "by block (DiffusionBlocks, arXiv 2506.14202).",
        "",
        "```python",
        "from dblocks import ConvertedBlocks",
        "",
        f"dm = ConvertedBlocks.from_pretrained(folder, model)  # a {kind} of the same sizes",
        "```",
        "",
        f"| block | layers | {config.schedule.symbol} |",
        "|---|---|---|",
    ]
    for block, (first, last) in enumerate(blocks.layer_ranges):
        low, high = config.schedule.range_of(block, config.num_blocks)
        lines.append(f"| {block} | {first} to {last - 1} | {high:.4g} to {low:.4g} |")
    return "\n".join(lines) + "\n"
