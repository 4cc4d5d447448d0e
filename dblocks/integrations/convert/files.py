"""The files of a converted model: one per block and one for shared tensors.

    dblocks.json  block_00.safetensors  block_01.safetensors  ...  shared.safetensors  README.md

A worker that trains one block writes that block's file only. Tensors of the user's model keep the
names that they have in it, so that its `load_state_dict(..., strict=False)` takes them; names of
tensors that `convert` added begin with `dblocks.`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dblocks._version import __version__
from dblocks.checkpoint import current, load_safetensors, naming, save_safetensors, saving
from dblocks.config import json_text, read_json

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


def block_file(block: int) -> str:
    """The name of a block's file."""
    return f"block_{block:02d}.safetensors"


def save(blocks: ConvertedBlocks, folder: str | Path, block: int | None = None) -> None:
    """Writes the files of all blocks and of shared tensors, or the file of one block.

    Args:
        blocks: the converted model.
        folder: created if it does not exist; files of an earlier save are replaced.
        block: writes the file of this block, and dblocks.json.
    """
    folder = Path(folder)
    tensors, ties = _named(blocks)
    owners = _owners(blocks)
    parts: dict[str, dict[str, Tensor]] = {SHARED_FILE: {}}
    for name, tensor in tensors.items():
        owner = owners(name)
        file = SHARED_FILE if owner is None else block_file(owner)
        parts.setdefault(file, {})[_outside(name)] = tensor
    written = {
        "format": FORMAT,
        "dblocks": __version__,
        "model": type(blocks.base_model.model).__name__,
        "layers": list(blocks.base_model.names),
        "task": blocks.task,
        "options": asdict(blocks.options),
        "blocks_config": blocks.config.to_dict(),
        "ties": {_outside(name): _outside(first) for name, first in ties.items()},
    }
    with saving(folder) as place:
        for file, part in parts.items():
            if file in _held(blocks) and (block is None or file == block_file(block)):
                save_safetensors(place / file, part)
        (place / CONFIG_FILE).write_text(json_text(written, indent=2) + "\n", encoding="utf-8")
        if block is None:
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
        config = read_json(path)
        known = isinstance(config, dict) and set(config) == KEYS
        if not known or config["format"] not in (1, FORMAT):
            raise ValueError(f"it must be of format {FORMAT} or 1 with the keys {sorted(KEYS)}")
        if config["format"] == 1:
            config["options"] = FORMAT_1_OPTIONS | config["options"]
            blocks = config["blocks_config"] = FORMAT_1_BLOCKS | config["blocks_config"]
            of_noise = blocks["schedule"]["type"] == "NoiseSchedule"
            if blocks["weighting"] == "auto" and of_noise and config["task"] != "images":
                blocks["weighting"] = "batch_mean"  # the meaning of "auto" for a cross-entropy
    return config


def load(blocks: ConvertedBlocks, folder: str | Path, ties: dict[str, str]) -> None:
    """Reads these files into a model that was converted with the same options.

    Raises:
        ValueError: a file is missing or broken, or its tensors do not fit.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    for file in (*map(block_file, range(blocks.config.num_blocks)), SHARED_FILE):
        path = current(folder, file)
        if not path.exists():
            raise ValueError(
                f"{folder} must hold {file}; each block's worker writes its own by "
                "save_pretrained(folder, block=), and the rest comes with save_pretrained(folder)"
            )
        with naming(path):
            tensors |= load_safetensors(path)
    with naming(folder / CONFIG_FILE):
        if missing := sorted(set(ties.values()) - set(tensors)):
            raise ValueError(f"ties must be to tensors that the other files hold, got {missing}")
    tensors |= {name: tensors[first] for name, first in ties.items()}
    with naming(folder):
        blocks.load_state_dict({_inside(name): tensor for name, tensor in tensors.items()})


def _held(blocks: ConvertedBlocks) -> set[str]:
    """The files whose tensors are here."""
    if blocks.loaded is None:
        return {SHARED_FILE, *map(block_file, range(blocks.config.num_blocks))}
    own = block_file(blocks.loaded)
    # With private parameters, the shared ones are those of the model itself.
    return {own} if blocks.config.copied and blocks.loaded else {SHARED_FILE, own}


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
