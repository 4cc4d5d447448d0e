"""Creates one block as shards on several processes, without memory for the whole block.

A network draws its weights in order, so the weights of a block depend on the draws for all. The
network is created again for each layer, with all other tensors in the same memory, and each process
keeps its shard of the layer. All weights are drawn once: from then on it is known where the
generator is after each draw, and the draws of other tensors are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from dblocks.blocks import Block, BlocksConfig
from dblocks.blocks.model import BlockModel
from dblocks.blocks.sharding import part_here
from dblocks.config import check_block
from dblocks.scale.construction import (
    WHOLE,
    all_places,
    check_alike,
    check_make,
    other_generators_kept,
    outlined,
)
from dblocks.scale.gathered import part_of
from dblocks.scale.mesh import data_parallel
from dblocks.scale.outline import Course, Outline, Sharing, storage_of
from dblocks.scale.places import Place, check_complete, own_tensors


def build_shards(
    make: Callable[[], BlockModel], config: BlocksConfig, block: int, mesh: Any, device: str = "cpu"
) -> Block:
    """`data_parallel(build_block(make, config, block), mesh, "fsdp")`, created as shards.

    The weights are bitwise the same. In addition to its shards, a process holds one layer and the
    largest tensor of the network on the host. `make` is called once without memory, once for each
    layer of the block and for the parameters outside the layers; on a CPU only the first of these
    calls draws the weights of other layers.

    Args:
        make: see `build_block`.
        config: the number of blocks and the options of their training.
        block: index of the block.
        mesh: a 1-D DeviceMesh of the processes.
        device: device of the shards.

    Raises:
        TypeError: as for `build_block`.
        ValueError: as for `build_block`.
        RuntimeError: as for `build_block`; or weights of a layer are computed from another layer's,
            or weights outside the layers from several others.
    """
    outlined_block = OutlinedBlock(make, config, block)
    outlined_block.fill_(mesh, device)
    return outlined_block.block


class OutlinedBlock:
    """A block without memory, until `fill_` gives it its weights.

    Args:
        make: see `build_block`.
        config: see `build_block`.
        block: index of the block.
    """

    def __init__(self, make: Callable[[], BlockModel], config: BlocksConfig, block: int) -> None:
        check_make(make)
        self.make = make
        self.outline, whole = outlined(make, config)
        self.block = Block(whole, check_block(block, config.num_blocks))
        network = cast(nn.Module, whole.base_model)
        self._places = list(all_places(self.block))
        # The tensor at each place of the whole network: `fully_shard` replaces those of the block.
        self._of = [storage_of(place.of(network)) for place in self._places]
        owned = {storage_of(t) for m in network.modules() for _, t in own_tensors(m)}
        self._owned = {n: t for n, t in enumerate(self.outline.made) if storage_of(t) in owned}
        layers = [
            {storage_of(t) for m in layer.modules() for _, t in own_tensors(m)}
            for layer in self.block.parts_at_rest(block)[1]
        ]
        self._groups = self._grouped(layers)

    def fill_(self, mesh: Any, device: str = "cpu") -> None:
        """Creates the weights; with a mesh, as shards after `fully_shard`.

        Args:
            mesh: the processes; None for one process.
            device: device of the weights.
        """
        tied = _tied(self._places)
        if mesh is not None:
            data_parallel(self.block, mesh, "fsdp")
        self.block.to_empty(device=device)
        for place, first in zip(self._places, tied, strict=True):
            if place.tensor is not self._places[first].tensor:  # `to_empty` unties
                place.put(self._places[first].tensor)
        groups = self._groups if mesh is not None else [{*self._of}]
        made = {storage_of(tensor) for tensor in self._owned.values()}
        # Weights computed from other weights have values in the same pass as those.
        computed = [i for i, of in enumerate(self._of) if of not in made]
        course = Course()
        draws: list[int] = []
        for number, group in enumerate(groups):
            absent = {n: t for n, t in self._owned.items() if storage_of(t) not in group}
            last = number + 1 == len(groups)
            with (
                nullcontext() if last else _random_kept(self.outline),
                Sharing(absent, course) as making,
            ):
                network = cast(nn.Module, self.make())
            check_alike(self.outline, making)
            draws.append(making.draws)
            if draws[0] != draws[-1]:
                raise RuntimeError(
                    "make must do the same each time that it is called, got "
                    f"{draws[0]} draws of random numbers and then {draws[-1]}; {WHOLE}"
                )
            for place, storage in zip(self._places, self._of, strict=True):
                if storage in group & made and not _filled(place, network, making):
                    raise RuntimeError(_apart(place))
            computed = [i for i in computed if not _filled(self._places[i], network, making)]
            del network
        if computed:
            raise RuntimeError(_apart(self._places[computed[0]]))
        check_complete(self.block, WHOLE)

    def _grouped(self, layers: list[set[int]]) -> list[set[int]]:
        """Groups of tensors: each layer, and others with at most a layer's bytes, or one tensor."""
        nbytes = {storage_of(t): t.untyped_storage().nbytes() for t in self._owned.values()}
        mine = [storage for storage in dict.fromkeys(self._of) if storage in nbytes]
        inside = {storage for layer in layers for storage in layer}
        units = [layer & {*mine} for layer in layers] + [{s} for s in mine if s not in inside]
        most = max((sum(nbytes[s] for s in unit) for unit in units), default=0)
        groups: list[set[int]] = [set()]
        for unit in units:
            if sum(nbytes[s] for s in groups[-1] | unit) > most:
                groups.append(set())
            groups[-1] |= unit
        return groups


@torch.no_grad()
def _filled(place: Place, network: nn.Module, making: Sharing) -> bool:
    """Writes the values of a place, if the network has computed them."""
    found, held = place.of(network), place.tensor
    if making.is_unsound(found):
        return False
    part_here(held).copy_(part_here(part_of(found.detach(), held)))
    return True


def _apart(place: Place) -> str:
    return (
        "weights created as shards must not be computed from another layer's, or from several "
        f"weights outside the layers, got {f'{place.path}.{place.name}'.removeprefix('.')}; use "
        "data_parallel(build_block(make, config, block), mesh, 'fsdp')"
    )


def _tied(places: Iterable[Place]) -> list[int]:
    """For each place, the index of the first one with the same tensor."""
    first: dict[int, int] = {}
    return [first.setdefault(id(place.tensor), i) for i, place in enumerate(places)]


@contextmanager
def _random_kept(outline: Outline) -> Iterator[None]:
    """Restores the generators that a network draws from at the end of the `with` block."""
    before = {generator: generator.get_state() for generator in outline.generators}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), other_generators_kept():
        yield
    for generator, state in before.items():
        generator.set_state(state)
