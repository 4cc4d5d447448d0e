"""Each process makes its shards of a block only, with the bits of one that is made whole."""

import pytest
import torch
from construction_tools import tied_own
from process_tools import in_processes

from dblocks.blocks import BlocksConfig
from dblocks.models import ViT, ViTConfig
from dblocks.scale import build_block
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


def test_what_is_tied_stays_so_without_other_processes():
    outlined = OutlinedBlock(tied_own, BlocksConfig(num_blocks=2), 1)
    outlined.fill_(None)
    found = outlined.block.base_model
    assert found.other.weight is found.head.weight
    assert found.other.weight.equal(tied_own().head.weight)
