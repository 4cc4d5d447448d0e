"""Each process makes its shards of a block only, with the bits of one that is made whole."""

import pytest
import torch
from construction_tools import tied_own
from process_tools import in_processes

from dblocks.blocks import BlocksConfig
from dblocks.models import ViT, ViTConfig
from dblocks.scale import build_block, shards
from dblocks.scale.outline import Sharing
from dblocks.scale.shards import OutlinedBlock
from tools import ROOT, SIZES


def test_shards_are_those_of_the_whole_in_little_memory(tmp_path):
    """By three processes, which do not divide the sizes."""
    codes, written = in_processes(3, [ROOT / "tests/scale/sharded_blocks.py"], tmp_path)
    assert codes == [0] * 3, "\n".join(written)
    assert all(text.endswith("right\n") for text in written)


@pytest.mark.parametrize("shared", ["train", "private"])
def test_without_other_processes_it_is_the_block(shared):
    config = BlocksConfig(num_blocks=2, shared=shared)

    def make():
        torch.manual_seed(0)
        return ViT(ViTConfig(**SIZES))

    outlined = OutlinedBlock(make, config, 1)
    assert sum(not p.is_meta for p in outlined.block.parameters()) <= 1  # a number
    outlined.fill_(None)
    found, wanted = outlined.block.state_dict(), build_block(make, config, 1).state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def by_default():
    return ViT(ViTConfig(**{**SIZES, "depth": 8}))


def by_ones_own():
    """With a generator of its own, an odd number of normals, and draws that values reject."""
    generator = torch.Generator().manual_seed(3)
    network = by_default()
    for n, p in enumerate(network.parameters()):
        low, high = ((-2, 2), (1, 1.5))[n % 2]  # rejected from normals, and from uniform numbers
        torch.nn.init.trunc_normal_(p.data, a=low, b=high, generator=generator)
        p.data.mul_(0.1)
    for layer in network.layers:
        layer.register_buffer("odd", torch.randn(5))
        layer.odd += torch.randn(3)[0]
    return network


@pytest.mark.parametrize("shared", ["train", "private"])
@pytest.mark.parametrize("made", [by_default, by_ones_own])
def test_weights_are_drawn_once_and_those_of_the_block_again(monkeypatch, made, shared):
    """Layer by layer, as with other processes."""
    monkeypatch.setattr(shards, "data_parallel", lambda *given: None)
    config = BlocksConfig(num_blocks=2, shared=shared)
    drawn = []

    class Counted(Sharing):
        def _drawn(self, func, args, kwargs, device, absent):
            known = absent is not None and self.draws in self.course.states
            result = super()._drawn(func, args, kwargs, device, absent)
            drawn.append(0 if known else result.numel())
            return result

    monkeypatch.setattr(shards, "Sharing", Counted)
    torch.manual_seed(0)
    wanted = build_block(made, config, 1).state_dict()
    after = torch.get_rng_state()
    outlined = OutlinedBlock(made, config, 1)
    assert len(outlined._groups) >= 4
    torch.manual_seed(0)
    outlined.fill_("a mesh")
    assert torch.get_rng_state().equal(after)
    found = outlined.block.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    every = len(drawn) // len(outlined._groups)
    once, again = sum(drawn[:every]), sum(drawn[every:])
    assert 0 < again < once


def test_a_network_that_draws_otherwise_the_next_time_is_refused(monkeypatch):
    monkeypatch.setattr(shards, "data_parallel", lambda *given: None)
    calls = []

    def make():
        calls.append(1)
        network = by_default()
        if len(calls) == 3:
            network.norm.weight.data.normal_()
        return network

    with pytest.raises(RuntimeError, match=r"the same each time .* draws of random numbers"):
        OutlinedBlock(make, BlocksConfig(num_blocks=2), 1).fill_("a mesh")


def test_what_is_tied_stays_so_without_other_processes():
    outlined = OutlinedBlock(tied_own, BlocksConfig(num_blocks=2), 1)
    outlined.fill_(None)
    found = outlined.block.base_model
    assert found.other.weight is found.head.weight
    assert found.other.weight.equal(tied_own().head.weight)
