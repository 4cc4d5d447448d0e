"""Blocks made by shards in several processes, against blocks made whole; run by a test."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from construction_tools import NETWORKS, Own, config_of, copied_together, scaled_together, tied_own
from live_bytes import Live
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from dblocks.blocks import BlocksConfig
from dblocks.blocks.sharding import is_part, part_here
from dblocks.models import CausalLM, CausalLMConfig
from dblocks.scale import build_block, build_shards, data_parallel

WIDTH, DEPTH = 64, 16


def bits(block):
    """The tensors here, by name, and what is known of each."""
    named = [*block.named_parameters(), *block.named_buffers()]
    return {name: (part_here(t).detach(), t.requires_grad, is_part(t)) for name, t in named}


def assert_same(found, wanted):
    ours, theirs = bits(found), bits(wanted)
    assert list(ours) == list(theirs)
    for name, (tensor, *about) in theirs.items():
        assert ours[name][0].equal(tensor), name
        assert ours[name][1:] == tuple(about), name
    assert any(sharded for _, _, sharded in ours.values())


def same_bits(mesh):
    for network, make in NETWORKS.items():
        for shared, b in (("train", 0), ("private", 2), ("frozen", 1)):
            if shared == "frozen" and network != "vit":
                continue
            config = config_of(network, shared)
            torch.manual_seed(3)
            wanted = data_parallel(build_block(make, config, b), mesh, "fsdp")
            after = torch.rand(3)
            torch.manual_seed(3)
            assert_same(build_shards(make, config, b, mesh), wanted)
            assert torch.rand(3).equal(after)


def of_ones_own(mesh):
    """Initialisers that look at what they drew, buffers, and a generator that lives on."""
    drawn = torch.Generator()

    def scaled():
        layer = nn.Linear(9, 9)
        nn.init.normal_(layer.weight, generator=drawn)
        return layer

    for more in ({}, {"more": scaled}):
        for b in range(2):
            made = []
            for build in (build_block, build_shards):
                drawn.manual_seed(5)
                torch.manual_seed(0)
                config = BlocksConfig(num_blocks=2)
                given = () if build is build_block else (mesh,)
                made.append(build(lambda more=more: Own(**more), config, b, *given))
                made.append(torch.rand(3, generator=drawn))
            whole, after, found, too = made
            assert_same(found, data_parallel(whole, mesh, "fsdp"))
            assert after.equal(too)


def refused(mesh):
    config = BlocksConfig(num_blocks=1)
    for layers in (copied_together, scaled_together):
        build_block(lambda layers=layers: Own(layers), config, 0)
    with pytest.raises(RuntimeError, match=r"from another layer's, .* got layers\.3"):
        build_shards(lambda: Own(copied_together), config, 0, mesh)
    build_shards(lambda: Own(scaled_together), config, 0, mesh)

    found = build_shards(tied_own, config, 0, mesh)
    assert found.base_model.other.weight is found.base_model.head.weight
    assert_same(found, data_parallel(build_block(tied_own, config, 0), mesh, "fsdp"))
    with pytest.raises(ValueError, match=r"block must be in 0\.\.0, got 1"):
        build_shards(Own, config, 1, mesh)
    with pytest.raises(TypeError, match="make must be a function"):
        build_shards(Own(), config, 0, mesh)


class Doubled(nn.Linear):
    """One weight is computed from another one of the same module."""

    def __init__(self):
        super().__init__(9, 9)
        self.twice = nn.Parameter(self.weight.detach() * 2)


class Both(Doubled):
    """And one from two."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(self.weight.detach() + self.bias.detach())


def normed():
    return [nn.utils.parametrizations.weight_norm(nn.Linear(9, 9)) for _ in range(4)]


def computed(mesh):
    """Weights computed from others of their layer, or from one outside the layers."""
    layers = [lambda: [Doubled() for _ in range(4)], lambda: [Both() for _ in range(4)], normed]
    made = [
        *(lambda of=of: Own(of) for of in layers),
        lambda: Own(more=Doubled),
        lambda: Own(more=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(9, 9))),
    ]
    for make in made:
        for b in range(2):
            torch.manual_seed(3)
            wanted = data_parallel(build_block(make, BlocksConfig(num_blocks=2), b), mesh, "fsdp")
            torch.manual_seed(3)
            assert_same(build_shards(make, BlocksConfig(num_blocks=2), b, mesh), wanted)
    make = lambda: Own(more=Both)
    build_block(make, BlocksConfig(num_blocks=2), 0)
    with pytest.raises(RuntimeError, match=r"weights outside the layers, got more\.both; use data"):
        build_shards(make, BlocksConfig(num_blocks=2), 0, mesh)


def little_memory(mesh):
    config = BlocksConfig(num_blocks=2, shared="private")

    def make():
        return CausalLM(CausalLMConfig(vocab_size=65, width=WIDTH, depth=DEPTH, heads=4))

    with Live() as live:
        found = build_shards(make, config, 1, mesh)
    # The last shard has memory for as many rows as the others.
    rows = {p: -(-len(p) // mesh.size()) for p in found.parameters()}
    own = sum(n * p[0].numel() * p.itemsize for p, n in rows.items())
    own += sum(buffer.nbytes for buffer in found.buffers())
    layer = [p.numel() * p.itemsize for p in found.parts_at_rest(1)[1][0].parameters()]
    # Of the largest tensors: what the absent ones share, and what an initialiser works in.
    bound = own + sum(layer) + 3 * max(layer)
    with Live() as whole:
        data_parallel(build_block(make, config, 1), mesh, "fsdp")
    print("shards", own, "layer", sum(layer), "peak", live.most, "whole", whole.most)
    assert live.bytes() <= own + 4096
    assert live.most <= bound < whole.most


def main():
    torch.set_num_threads(1)
    folder, size = Path.cwd(), int(os.environ["WORLD_SIZE"])
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    mesh = init_device_mesh("cpu", (size,))
    for check in (same_bits, of_ones_own, refused, computed, little_memory):
        check(mesh)
    dist.destroy_process_group()
    print("right")


if __name__ == "__main__":
    sys.exit(main())
