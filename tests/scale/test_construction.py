"""One block is made, and loaded, without the memory of the others, with the bits of the whole."""

import copy
import random

import numpy as np
import pytest
import torch
from construction_tools import NETWORKS, Layer, Own, config_of, copied_together, scaled_together
from live_bytes import Live
from torch import nn

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import save_model
from dblocks.scale import build_block, load_block, save_block
from dblocks.scale.outline import Memories
from dblocks.scale.shards import OutlinedBlock
from tools import seeded


def whole_of(network, config, seed=3):
    torch.manual_seed(seed)
    return DiffusionBlocks(NETWORKS[network](), config)


def assert_same(found, wanted):
    for kind in ("named_parameters", "named_buffers"):
        ours = dict(getattr(found, kind)(remove_duplicate=False))
        theirs = dict(getattr(wanted, kind)(remove_duplicate=False))
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert ours[name].equal(tensor), name
            assert ours[name].requires_grad == tensor.requires_grad, name
            assert type(ours[name]) is type(tensor)


def shards_of(make, config, block):
    outlined = OutlinedBlock(make, config, block)
    outlined.fill_(None)
    return outlined.block


def size_of(tensors):
    return sum({id(t): t.nbytes for t in tensors}.values())


CASES = [(network, shared) for network in NETWORKS for shared in ("train", "private")]


@pytest.mark.parametrize(("network", "shared"), [*CASES, ("vit", "frozen"), ("vit", "reduce")])
def test_a_block_is_that_of_the_whole_bit_for_bit(network, shared):
    config = config_of(network, shared)
    whole = whole_of(network, config)
    after = torch.rand(3)
    for b in range(3):
        torch.manual_seed(3)
        found = build_block(NETWORKS[network], config, b)
        assert torch.rand(3).equal(after)
        assert_same(found, whole.block(b))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("block", [0, 2])
def test_only_the_block_has_memory(network, block):
    config = config_of(network, "private", blocks=5)
    with Live() as live:
        found = build_block(NETWORKS[network], config, block)
    own = size_of([*found.parameters(), *found.buffers()])
    layer = next(iter(found.parts(block)[1]))
    largest = max(t.nbytes for t in layer.parameters())
    assert live.bytes() == own
    # What is not parameters: the scratch of an initialiser for one tensor.
    assert own <= live.most <= own + 2 * largest + 4096
    with Live() as live:
        whole_of(network, config)
    assert live.most > own + 4 * size_of(layer.parameters())


@pytest.mark.parametrize("shared", ["train", "private"])
def test_initialisers_that_read_what_they_drew(shared):
    config = BlocksConfig(num_blocks=2, shared=shared)
    torch.manual_seed(0)
    whole = DiffusionBlocks(Own(), config)
    for b in range(2):
        torch.manual_seed(0)
        found = build_block(Own, config, b)
        assert_same(found, whole.block(b))
        network, layers = found.parts(b)
        assert network.tied is network.head
        assert [layer.rate for layer in layers] == [
            layer.rate for layer in whole.base_model.layers[2 * b : 2 * b + 2]
        ]


def test_a_generator_of_ones_own():
    def make():
        def layer():
            linear = nn.Linear(9, 9)
            nn.init.normal_(linear.weight, generator=generator)
            linear.bias = nn.Parameter(torch.randn(9, generator=generator))
            linear.order = torch.randperm(5, generator=generator).tolist()
            return linear

        return Own(lambda: [layer() for _ in range(4)])

    config = BlocksConfig(num_blocks=2)
    generator, whole = seeded(5), None
    torch.manual_seed(0)
    whole = DiffusionBlocks(make(), config)
    for b in range(2):
        generator = seeded(5)
        torch.manual_seed(0)
        found = build_block(make, config, b)
        assert_same(found, whole.block(b))
        orders = [layer.order for layer in whole.base_model.layers]
        assert [layer.order for layer in found.parts(b)[1]] == orders[2 * b : 2 * b + 2]


@pytest.mark.parametrize("alone", [build_block, shards_of])
def test_generators_of_python_and_numpy(alone):
    def layer():
        linear = nn.Linear(9, 9)
        linear.weight = nn.Parameter(torch.from_numpy(np.random.randn(9, 9)).float())
        linear.rate = random.random()
        return linear

    def seeded_make():
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        return lambda: Own(lambda: [layer() for _ in range(4)])

    config = BlocksConfig(num_blocks=2)
    whole = DiffusionBlocks(seeded_make()(), config)
    drawn = random.random(), np.random.rand()
    for b in range(2):
        found = alone(seeded_make(), config, b)
        assert (random.random(), np.random.rand()) == drawn
        assert_same(found, whole.block(b))
        rates = [layer.rate for layer in whole.base_model.layers]
        assert [layer.rate for layer in found.parts(b)[1]] == rates[2 * b : 2 * b + 2]


@pytest.mark.parametrize("shared", ["train", "private"])
def test_tensors_that_are_no_parameters_are_there(shared):
    config = BlocksConfig(num_blocks=2, shared=shared)
    found = build_block(lambda: Own(plain=lambda: torch.ones(3)), config, 1)
    assert found.parts(1)[0].plain.tolist() == [1, 1, 1]


class Scalar(nn.Module):
    """Its number is made after the memory of an initialiser of another layer was freed."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(9, 9)
        self.scale = nn.Parameter(torch.tensor([0.1]))
        nn.init.orthogonal_(self.linear.weight)


class Halved(Scalar):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.linear.weight.copy_(self.linear.weight * 0.5)


@pytest.mark.parametrize("layer", [Scalar, Halved])
def test_memory_that_is_used_again_is_that_of_another_tensor(layer):
    config = BlocksConfig(num_blocks=3)
    for n in range(20):
        torch.manual_seed(n)
        whole = DiffusionBlocks(Own(lambda: [layer() for _ in range(6)]), config)
        for b in range(3):
            torch.manual_seed(n)
            found = build_block(lambda: Own(lambda: [layer() for _ in range(6)]), config, b)
            assert_same(found, whole.block(b))


def test_a_set_of_memories_frees_them_and_knows_them_from_later_ones():
    held = Memories()
    for _ in range(50):  # which get one address otherwise
        tensor = torch.ones(3)
        assert tensor not in held
        assert tensor[1:] not in held
        held.add(tensor)
        assert tensor[1:] in held
    with Live() as live:
        held.add(torch.ones(1000))
    assert live.bytes() == 0


def copied():
    first = nn.Linear(9, 9)
    return [first, *(copy.deepcopy(first) for _ in range(3))]


def test_what_cannot_be_made_alone_is_refused_by_name():
    config = BlocksConfig(num_blocks=2)
    assert build_block(lambda: Own(copied), config, 0)
    with pytest.raises(RuntimeError, match=r"not be computed from weights of .* got layers\.2"):
        build_block(lambda: Own(copied), config, 1)
    with pytest.raises(RuntimeError, match="cannot be created without memory"):
        build_block(lambda: Own(constant=lambda: torch.randn(3).max().item()), config, 1)
    calls = iter([4, 5])
    with pytest.raises(RuntimeError, match="make must do the same each time"):
        build_block(lambda: Own(lambda: map(Layer, range(next(calls)))), config, 1)
    with pytest.raises(ValueError, match="block must be in"):
        build_block(Own, config, 2)
    for made in (Own(), config):
        with pytest.raises(
            TypeError, match=f"make must be a function .* got {type(made).__name__}"
        ):
            build_block(made, config, 1)


@pytest.mark.parametrize("network", ["vit", "recurrent"])
@pytest.mark.parametrize("shared", ["train", "private"])
def test_a_block_is_loaded_alone(tmp_path, network, shared):
    whole = whole_of(network, config_of(network, shared))
    save_model(tmp_path / "whole", whole)
    before = torch.get_rng_state()
    for b in range(3):
        save_block(tmp_path / f"{b}", whole.block(b))
        with Live() as live:
            found = load_block(tmp_path / "whole", b)
        assert_same(found, whole.block(b))
        assert live.bytes() == size_of([*found.parameters(), *found.buffers()])
        assert_same(load_block(tmp_path / f"{b}"), whole.block(b))
    assert torch.get_rng_state().equal(before)


def test_what_cannot_be_loaded_is_refused_by_name(tmp_path):
    whole = whole_of("vit", config_of("vit", "private"))
    save_model(tmp_path / "whole", whole)
    save_block(tmp_path / "1", whole.block(1))
    with pytest.raises(
        ValueError, match=r"block must be one .*all blocks, counted from 0.*, got None"
    ):
        load_block(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"block must be one .*block 1 alone.*, got 2"):
        load_block(tmp_path / "1", 2)
    with pytest.raises(ValueError, match=r"^block must be in 0\.\.2, got 3"):
        load_block(tmp_path / "whole", 3)
    save_model(tmp_path / "plain", whole.base_model)
    with pytest.raises(ValueError, match="must hold a network in blocks"):
        load_block(tmp_path / "plain", 0)
    weights = tmp_path / "1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be used: it is not what was"):
        load_block(tmp_path / "1")


class Listed(nn.Module):
    """Parameters that are in lists too, as those of an LSTM are."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 4)
        self.own = nn.Parameter(torch.randn(3))
        self.all = [self.own]


@pytest.mark.parametrize("block", [0, 1])
def test_lists_of_parameters_hold_those_of_the_block(block):
    config = BlocksConfig(num_blocks=2, shared="private")
    found = build_block(lambda: Own(more=Listed), config, block).parts(block)[0].more
    assert found.all[0] is found.own
    held = zip(found.rnn._flat_weights, found.rnn.parameters(), strict=True)
    assert all(one is other for one, other in held)
    assert found.rnn(torch.ones(2, 4))[0].isfinite().all()


def attributed():
    layers = [nn.Linear(9, 9) for _ in range(4)]
    layers[3].other = [2 * layers[0].weight.detach()]
    return layers


@pytest.mark.parametrize("layers", [copied_together, attributed])
def test_no_values_of_other_blocks_come_in_by_lists(layers):
    config = BlocksConfig(num_blocks=2)
    torch.manual_seed(0)
    whole = DiffusionBlocks(Own(scaled_together), config)
    for b in range(2):
        torch.manual_seed(0)
        assert_same(build_block(lambda: Own(scaled_together), config, b), whole.block(b))
    assert build_block(lambda: Own(layers), config, 0)
    with pytest.raises(RuntimeError, match=r"not be computed from weights of .* got layers\.3\."):
        build_block(lambda: Own(layers), config, 1)


def test_the_folder_of_folders_is_told_which_to_give(tmp_path):
    whole = whole_of("vit", config_of("vit", "private"))
    for b in range(3):
        save_block(tmp_path / f"block-{b}", whole.block(b))
    with pytest.raises(ValueError, match=r"folder of one block, .* give one of .*block-0, .*k-2"):
        load_block(tmp_path, 1)
    with pytest.raises(ValueError, match=r"must hold a config\.json"):
        load_block(tmp_path / "none", 1)
