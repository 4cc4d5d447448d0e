"""Merges blocks that were trained separately, each in its own folder, into one network."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from dblocks.blocks import Block, DiffusionBlocks
from dblocks.blocks.sharding import replicas_of
from dblocks.checkpoint import current, naming, save_safetensors, saving
from dblocks.checkpoint.networks import (
    BLOCK_FILE,
    COPIES,
    RECORD_FILE,
    WEIGHTS_FILE,
    blocks_inside,
    described,
    named_tensors,
    rebuilt,
    with_config,
)
from dblocks.checkpoint.sealed import LONGEST_TEXT, SHA256, read_sealed, sealed, text_digest
from dblocks.checkpoint.stored import Stored, copy_stored, reading, stored_in
from dblocks.config import json_text, read_text
from dblocks.integrations.convert.files import CONFIG_FILE as CONVERTED_FILE
from dblocks.scale.checksums import sha256_from, sha256_of
from dblocks.scale.gathered import gathered

KEYS = {"format", "dblocks", "model", "model_config", "blocks_config", "block", "texts", "about"}
KEYS |= {SHA256}  # the digests of the other files, and of this one
COMPARED = ("format", "model", "model_config", "blocks_config")
NOT_SAVED = f"it is not what was saved, by the sha256 in {BLOCK_FILE}"


def save_block(
    folder: str | Path,
    block: Block,
    *,
    texts: Mapping[str, str] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes one block of a network, for `merge_blocks`; weights keep their names.

    After `fully_shard`, all processes of the block must call it; the first one writes.

    Args:
        folder: where to write; as with `save_model`, the files are saved as one unit.
        block: a block of one of the networks in `dblocks.checkpoint.NETWORKS`.
        texts: contents of further files by name, such as tokenizer.json; they must be the same for
            every block.
        about: JSON values about the training; "run", if present, holds its settings.

    Raises:
        TypeError: `block` is not a `Block`, or not of one of these networks.
        OSError: a file cannot be written; the earlier save is kept.
    """
    if not isinstance(block, Block):
        raise TypeError(f"block must be a Block, got {type(block).__name__}; see save_model")
    index = cast(int, block.index)
    network, _ = block.parts(index)
    texts = dict(texts or {})
    about_block = {"block": index, "texts": sorted(texts), "about": dict(about or {})}
    written = described(cast(nn.Module, network), block.config) | about_block
    replicas = replicas_of(block)
    writes = replicas is None or not replicas.rank
    tensors = gathered(named_tensors(block), here=writes)
    if not writes:
        return
    with saving(Path(folder)) as part:
        save_safetensors(part / WEIGHTS_FILE, tensors)
        for name, text in texts.items():
            (part / name).write_text(text, encoding="utf-8")
        digests = {name: text_digest(text) for name, text in texts.items()}
        digests = {WEIGHTS_FILE: sha256_of(part / WEIGHTS_FILE), **digests}
        text = sealed(BLOCK_FILE, written, digests)
        (part / BLOCK_FILE).write_text(text, encoding="utf-8")


def merge_blocks(out: str | Path, folders: Sequence[str | Path]) -> None:
    """Merges all blocks into one network, for `load_model`.

    Everything is checked before anything is written. Weights are copied from file to file, so the
    network may be larger than the host's memory. If a block is saved again meanwhile, the weights
    that were checked are merged.

    Args:
        out: where to write; it may be the parent folder of the blocks, but not the folder of a
            block.
        folders: the folders written by `save_block` for each block, in any order; or folders that
            contain them.

    Raises:
        ValueError: a block is missing or given twice, the blocks do not have the same
            configuration, target embedding and tokenizer, or a file of weights has changed since it
            was saved. The message names the folders. Or `out` is the folder of a block.
        OSError: a file cannot be written, or a file of weights changed while it was copied; an
            earlier save in `out` is kept.

    Warns:
        UserWarning: blocks were trained with different settings, such as numbers of steps; the
            result then differs from a network trained in one run.
    """
    if current(Path(out), BLOCK_FILE).exists():  # the network would replace the block's weights
        raise ValueError(
            f"out must not be the folder of a block, whose weights would be replaced, got {out}; "
            "give a new folder, or the one that contains the folders of the blocks"
        )
    found = {folder: read_block(folder) for given in folders for folder in _blocks_in(Path(given))}
    first, config = next(iter(found.items()), (None, {}))
    if first is None:
        raise ValueError("folders must name at least one block's folder, got none")
    for folder, other in found.items():
        _check_alike(first, config, folder, other)
    with naming(first / BLOCK_FILE), torch.device("meta"):
        whole: DiffusionBlocks = rebuilt(config)
    places = _in_order(found, whole.config.num_blocks)
    with ExitStack() as files:
        tensors = _merged(places, found, whole, files)
        texts = _texts(places, found)
        _warn_of_other_settings(places, found)
        about = [{"folder": str(f), "block": b, **found[f]["about"]} for b, f in enumerate(places)]
        written = {key: config[key] for key in (*COMPARED, "dblocks")}
        texts |= {RECORD_FILE: json_text({"merged": about}) + "\n"}
        texts = with_config(written, texts)
        with saving(Path(out)) as part:
            copy_stored(part / WEIGHTS_FILE, tensors)
            for name, text in texts.items():
                (part / name).write_text(text, encoding="utf-8")


def _blocks_in(folder: Path) -> list[Path]:
    """The folder itself, or its subfolders that hold a block."""
    if current(folder, BLOCK_FILE).exists():
        return [folder]
    if current(folder, CONVERTED_FILE).exists():
        raise ValueError(
            f"{folder} must hold a {BLOCK_FILE}, got a converted model's {CONVERTED_FILE}, whose "
            "blocks need no merge; load it with ConvertedBlocks.from_pretrained(folder, model)"
        )
    if not (blocks := blocks_inside(folder)):
        raise ValueError(
            f"{folder} must hold a {BLOCK_FILE}, or folders that do; `dblocks train ... --block N` "
            "writes one at the end of its training"
        )
    return blocks


def read_block(folder: Path) -> dict[str, Any]:
    """The contents of a block.json, written by `save_block`.

    Raises:
        ValueError: the file has other contents.
    """
    path = current(folder, BLOCK_FILE)
    found = read_sealed(path, f'delete "{BLOCK_FILE}" of "{SHA256}"')
    if not isinstance(found, dict) or set(found) != KEYS:
        raise ValueError(f"{path} must be a JSON object with the keys {sorted(KEYS)}")
    if isinstance(found["sha256"], str):  # written before text files had digests
        found["sha256"] = {WEIGHTS_FILE: found["sha256"]}
    elif not isinstance(found["sha256"], dict):
        raise ValueError(f"{path} must hold the sha256 of files by name, got {found['sha256']!r}")
    elif missing := {WEIGHTS_FILE, *found["texts"]} - set(found["sha256"]):
        raise ValueError(f"{path} must hold the sha256 of {', '.join(sorted(missing))}")
    elif extra := set(found["sha256"]) - {BLOCK_FILE, WEIGHTS_FILE, *found["texts"]}:
        raise ValueError(f"{path} must hold no sha256 of {', '.join(sorted(extra))}")
    return found


def _check_alike(first: Path, config: Any, folder: Path, other: Any) -> None:
    for key in COMPARED:
        mine, its = config[key], other[key]
        if mine == its:
            continue
        if isinstance(mine, dict) and isinstance(its, dict):
            name = next(k for k in {**mine, **its} if mine.get(k) != its.get(k))
            key, mine, its = f"{key}.{name}", mine.get(name), its.get(name)
        raise ValueError(
            f"all blocks must be of one configuration, got {key} of {mine!r} in {first} and "
            f"{its!r} in {folder}"
        )


def _in_order(found: Mapping[Path, Any], num_blocks: int) -> list[Path]:
    """The folders by the number of their block."""
    places: dict[int, Path] = {}
    for folder, config in found.items():
        block = config["block"]
        if block in places:
            raise ValueError(f"block {block} must be given once, got {places[block]} and {folder}")
        places[block] = folder
    if missing := sorted(set(range(num_blocks)) - set(places)):
        raise ValueError(
            f"all {num_blocks} blocks must be given, got none of block "
            f"{', '.join(map(str, missing))}; train it with --block, or name its folder"
        )
    return [places[block] for block in range(num_blocks)]


def _warn_of_other_settings(places: Sequence[Path], found: Mapping[Path, Any]) -> None:
    runs = {folder: dict(found[folder]["about"].get("run", {})) for folder in places}
    first, *others = runs
    for other in others:
        mine, its = runs[first], runs[other]
        names = sorted(k for k in {*mine, *its} - {"block"} if mine.get(k) != its.get(k))
        if names:
            listed = ", ".join(f"{k} {mine.get(k)!r} and {its.get(k)!r}" for k in names)
            warnings.warn(
                f"{first} and {other} were trained with different settings: {listed}; the "
                "result differs from a network trained in one run",
                UserWarning,
                stacklevel=3,
            )


def _merged(
    places: Sequence[Path], found: Mapping[Path, Any], whole: DiffusionBlocks, files: ExitStack
) -> dict[str, Stored]:
    """The tensors of all blocks, which must be all of the network's; shared ones must be equal.

    Their files stay open until `files` is closed.
    """
    merged: dict[str, Stored] = {}
    owners: dict[str, Path] = {}
    for block, folder in enumerate(places):
        path = folder / WEIGHTS_FILE
        expected = named_tensors(whole.block(block))
        with naming(path):
            source = files.enter_context(reading(current(folder, WEIGHTS_FILE)))
            check_weights(source.file, found[folder])
            held = stored_in(source)
            check_shapes({name: stored.shape for name, stored in held.items()}, expected)
        for name, stored in held.items():
            if name in merged and not merged[name].equal(stored):
                raise ValueError(_differs("what all blocks share", name, owners[name], folder))
            merged[name], owners[name] = stored, folder
    _check_copies(merged, owners, whole)
    return merged


def check_weights(file: BinaryIO, about: Mapping[str, Any]) -> None:
    """Raises ValueError if the opened weights of a block are not those that were saved."""
    if sha256_from(file) != about["sha256"][WEIGHTS_FILE]:
        raise ValueError(NOT_SAVED)


def check_shapes(held: Mapping[str, Sequence[int]], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless a file holds the expected names and shapes."""
    if wrong := sorted(set(held) ^ set(expected)):
        where = "lacks" if wrong[0] in expected else "must not hold"
        raise ValueError(f"it {where} {wrong[0]}; {len(wrong)} names of tensors differ")
    for name, tensor in expected.items():
        if list(held[name]) != list(tensor.shape):
            raise ValueError(f"{name} must have shape {list(tensor.shape)}, got {list(held[name])}")


def _check_copies(
    merged: Mapping[str, Stored], owners: Mapping[str, Path], whole: DiffusionBlocks
) -> None:
    """Checks that all copies of the target embedding, or of what is averaged, are equal."""
    target = {id(p) for p in whole.base_model.target.parameters()}
    inside = {id(p) for p in whole.base_model.layers.parameters()}
    network = cast(nn.Module, whole.base_model)
    averaged = whole.config.shared == "reduce"
    for name, parameter in network.named_parameters():
        common = id(parameter) in target
        if not common and (not averaged or id(parameter) in inside):
            continue
        what = "the target embedding" if common else "the average of the shared parameters"
        for copy in range(len(whole.copies)):
            other = f"{COPIES}{copy}.{name}"
            if not merged[name].equal(merged[other]):
                raise ValueError(_differs(what, name, owners[name], owners[other]))


def _differs(what: str, name: str, first: Path, second: Path) -> str:
    return (
        f"{what} must be the same in all blocks, got another {name} in {first} than in {second}; "
        "train all blocks with one --seed and one --data"
    )


def _texts(places: Sequence[Path], found: Mapping[Path, Any]) -> dict[str, str]:
    """The text files next to the weights, which must be the same in all folders."""
    texts: dict[str, str] = {}
    first = places[0]
    for folder in places:
        about = found[folder]
        if about["texts"] != found[first]["texts"]:
            raise ValueError(
                f"all blocks must have the same text files, got {about['texts']} in {folder} "
                f"and {found[first]['texts']} in {first}"
            )
        for name in about["texts"]:
            if Path(name).name != name:
                raise ValueError(f"{folder / BLOCK_FILE} must name files beside it, got {name!r}")
            path = current(folder, name)
            text = read_text(path, longest=LONGEST_TEXT)
            digest = text_digest(text)
            if about["sha256"].get(name, digest) != digest:
                raise ValueError(f"{path} cannot be used: {NOT_SAVED}")
            if texts.setdefault(name, text) != text:
                raise ValueError(
                    f"{name} must be the same for all blocks, got another one in {folder} than in "
                    f"{first}; train all blocks on one text with one tokenizer"
                )
    return texts
