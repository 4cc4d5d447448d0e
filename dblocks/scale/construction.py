"""Creates or loads one block of a network without memory for the others."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dblocks.blocks import Block, BlocksConfig, DiffusionBlocks
from dblocks.blocks.model import BlockModel, Divisible
from dblocks.checkpoint import current, naming, unchanged
from dblocks.checkpoint.networks import (
    BLOCK_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    blocks_inside,
    named_tensors,
    network_of,
    read_config,
    renamed,
)
from dblocks.checkpoint.stored import reading
from dblocks.checkpoint.tensors import opened
from dblocks.config import check_block
from dblocks.scale.merge import check_shapes, check_weights, read_block
from dblocks.scale.outline import Outline, Sharing, Uncopied, storage_of
from dblocks.scale.places import Place, check_complete, own_tensors, reached_tensors

WHOLE = "make the whole network, DiffusionBlocks(make(), config).block(...)"


def build_block(make: Callable[[], BlockModel], config: BlocksConfig, block: int) -> Block:
    """`DiffusionBlocks(make(), config).block(block)`, without the memory of the other blocks.

    The weights are bitwise the same, and as many random numbers are drawn. The host holds the
    parameters of the block, the shared parameters once, and memory for the largest tensor of the
    other layers: all of their tensors are drawn into this memory in turn.

    Args:
        make: creates the network. It is called twice and must do the same each time; in the first
            call tensors have no memory and no random numbers are drawn.
        config: the number of blocks and the options of their training.
        block: index of the block.

    Raises:
        TypeError: as for `DiffusionBlocks`; or `make` is not a function that makes a network; or
            the network is a converted model, whose weights come from files.
        ValueError: as for `DiffusionBlocks`; or `block` is out of range.
        RuntimeError: the network cannot be made so: `make` reads values of weights, or did
            something else when it was called again, or makes weights of the block out of those of
            another one.
    """
    check_make(make)
    outline, whole = outlined(make, config)
    check_block(block, config.num_blocks)
    with Sharing(_absent(whole, outline, block)) as making:
        network = cast(nn.Module, make())
    check_alike(outline, making)
    with Uncopied():  # the block needs one copy of the shared modules: the original
        mine = Block(DiffusionBlocks(cast(BlockModel, network), config), block)
    _check_sound(mine, network, making)
    for at in all_places(mine):
        if storage_of(found := at.of(network)) != storage_of(at.tensor):
            at.put(found)
    check_complete(mine, WHOLE)
    return mine


def load_block(folder: str | Path, block: int | None = None) -> Block:
    """Loads one block of a saved network on the CPU, without reading other tensors.

    Args:
        folder: folder written by `save_model` for a network in blocks, or by `save_block`.
        block: index of the block; optional if the folder holds one block.

    Raises:
        ValueError: the folder does not hold this block, or a file is damaged; the message names it.
    """
    return unchanged(
        Path(folder), [CONFIG_FILE, BLOCK_FILE], lambda: _load_block(Path(folder), block)
    )


def _load_block(folder: Path, block: int | None) -> Block:
    alone = current(folder, BLOCK_FILE).exists() and not current(folder, CONFIG_FILE).exists()
    if (
        not alone
        and not current(folder, CONFIG_FILE).exists()
        and (inside := blocks_inside(folder))
    ):
        raise ValueError(
            f"{folder} must be the folder of one block, got the parent folder of several: "
            f"give one of {', '.join(map(str, inside))}"
        )
    about: Mapping[str, Any] = read_block(folder) if alone else read_config(folder)
    if about["blocks_config"] is None:
        raise ValueError(f"{folder} must hold a network in blocks, got one trained end to end")
    held = about["block"] if alone else block
    if held is None or block not in (None, held):
        has = f"block {held} alone" if alone else "all blocks, counted from 0"
        raise ValueError(f"block must be one that {folder} holds ({has}), got {block}")
    written = folder / (BLOCK_FILE if alone else CONFIG_FILE)
    with naming(written):
        config = BlocksConfig.from_dict(about["blocks_config"])
    if not alone:  # an error of the caller, not of the file
        check_block(held, config.num_blocks)
    with naming(written):
        _, whole = outlined(lambda: network_of(about), config)
        mine = Block(whole, held)
    here, filled = named_tensors(mine), {}
    for at in all_places(mine):
        if at.tensor.is_meta and at.saved:  # one tensor for tied weights
            at.put(filled.setdefault(id(at.tensor), torch.empty_like(at.tensor, device="cpu")))
    check_complete(mine, WHOLE)
    with naming(folder / WEIGHTS_FILE), reading(current(folder, WEIGHTS_FILE)) as source:
        if alone:
            check_weights(source.file, about)
        with opened(source.path) as file:
            source.check_named()
            names = {renamed(name): name for name in sorted(file.keys())}
            found = names if alone else {name: names[name] for name in names if name in here}
            check_shapes({n: file.shape(name) for n, name in found.items()}, here)
            for name, tensor in named_tensors(mine).items():
                tensor.copy_(file.get_tensor(names[name]))
        source.check_unchanged()
    return mine


def check_make(make: Any) -> None:
    """Raises TypeError unless this is a function that may make a network."""
    if isinstance(make, nn.Module) or not callable(make):
        raise TypeError(
            "make must be a function without arguments that makes the network, such as lambda: "
            f"ViT(config), got {type(make).__name__}"
        )


def check_alike(outline: Outline, making: Sharing) -> None:
    """Raises RuntimeError if a network was made from other tensors than its outline."""
    if making.count != len(outline.made):
        raise RuntimeError(
            "make must do the same each time that it is called, got "
            f"{len(outline.made)} tensors and then {making.count}; {WHOLE}"
        )


def all_places(block: Block) -> Iterator[Place]:
    """All places of a block, by the names of the whole network."""
    for path, module in _named_modules(block):
        yield from (Place(path, module, name) for name, _ in own_tensors(module))


def _named_modules(block: Block) -> Iterator[tuple[str, nn.Module]]:
    for view in (cast(nn.Module, block.base_model), *block.copies.children()):
        yield from view.named_modules(remove_duplicate=False)


def _check_sound(block: Block, network: nn.Module, making: Sharing) -> None:
    for path, _ in _named_modules(block):
        for name, tensor in reached_tensors(network.get_submodule(path)):
            if making.is_unsound(tensor):
                raise RuntimeError(
                    "weights of a block must not be computed from weights of another block's "
                    f"layers, got {f'{path}.{name}'.removeprefix('.')}; {WHOLE}"
                )


@contextmanager
def other_generators_kept() -> Iterator[None]:
    """Restores the global generators of Python and NumPy, which a network may draw from too."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    yield
    random.setstate(python)
    if numpy is not None:
        numpy.random.set_state(state)


def outlined(
    make: Callable[[], BlockModel], config: BlocksConfig
) -> tuple[Outline, DiffusionBlocks]:
    """The network in blocks, with all tensors on the meta device."""
    try:
        with torch.random.fork_rng(devices=[]), other_generators_kept(), Outline() as outline:
            network = make()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RuntimeError(
            f"the network cannot be created without memory: {reason}; {WHOLE}"
        ) from error
    if isinstance(network, Divisible):
        raise TypeError(
            "make must return a network with `layers`, got a converted model, whose "
            "weights come from files; use dblocks.scale.convert_block"
        )
    return outline, DiffusionBlocks(network, config)


def _absent(whole: DiffusionBlocks, outline: Outline, block: int) -> dict[int, Tensor]:
    """The tensors used only by layers of other blocks, by index of creation."""
    first, last = whole.layer_ranges[block]
    others = [layer for i, layer in enumerate(whole.base_model.layers) if not first <= i < last]
    inside = {id(module): module for layer in others for module in layer.modules()}
    network = cast(nn.Module, whole.base_model)
    outside = [module for module in network.modules() if id(module) not in inside]
    kept = {storage_of(tensor) for module in outside for _, tensor in own_tensors(module)}
    gone = {storage_of(tensor) for module in inside.values() for _, tensor in own_tensors(module)}
    numbered = enumerate(outline.made)
    return {number: made for number, made in numbered if storage_of(made) in gone - kept}
