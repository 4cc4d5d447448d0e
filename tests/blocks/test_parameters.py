"""Parameters that two blocks would train, and weights that keep all others from training."""

import copy
import warnings

import pytest
import torch
from convert_tools import blocks_of, model_of
from torch import nn

from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.models import DiT, DiTConfig
from tools import SIZES, batch, randomized, seeded, vit

FROZEN = BlocksConfig(2, shared="frozen")


def test_layers_of_two_blocks_that_share_a_module():
    network = vit()
    network.layers[5].mlp = network.layers[1].mlp
    flags = [p.requires_grad for p in network.parameters()]
    message = r"one tensor as layers\.1\.mlp\..* in block 0 and layers\.5\.mlp\..* in block 1"
    with pytest.raises(ValueError, match=message):
        DiffusionBlocks(network, FROZEN)
    assert flags == [p.requires_grad for p in network.parameters()]
    DiffusionBlocks(network, BlocksConfig(1))
    apart = vit()
    apart.layers[1].mlp = apart.layers[0].mlp
    DiffusionBlocks(apart, BlocksConfig(2))


def test_layers_that_share_a_tensor():
    network = vit()
    network.layers[3].norm1.weight = nn.Parameter(torch.ones(24))
    network.layers[0].norm1.weight = network.layers[3].norm1.weight
    with pytest.raises(ValueError, match=r"layers\.0\.norm1\.weight .* layers\.3\.norm1\.weight"):
        DiffusionBlocks(network, BlocksConfig(3))


@pytest.mark.parametrize("shared", ["train", "frozen", "private"])
def test_a_layer_that_shares_with_what_all_blocks_use(shared):
    network = vit()
    network.layers[2].extra = nn.Linear(24, 5)
    network.layers[2].extra.weight = network.classifier.weight
    message = r"layers\.2\.extra\.weight in block 0 and classifier\.weight outside the layers"
    with pytest.raises(ValueError, match=message):
        DiffusionBlocks(network, BlocksConfig(2, shared=shared))


@pytest.mark.parametrize(("kind", "part"), [("llama", "mlp"), ("bert", "intermediate.dense")])
def test_tied_layers_of_a_converted_model(kind, part):
    model = model_of(kind)
    layers = model.model.layers if kind == "llama" else model.bert.encoder.layer
    path, _, name = part.rpartition(".")
    setattr(layers[3].get_submodule(path), name, layers[0].get_submodule(part))
    stem = "model.layers" if kind == "llama" else "bert.encoder.layer"
    with pytest.raises(ValueError, match=rf"{stem}\.0\.{part}.* and {stem}\.3\.{part}"):
        blocks_of(kind, model=model)
    blocks_of(kind, 1, model=model)


def test_a_frozen_output_head_of_zeros():
    model = DiffusionBlocks(vit(gate_init=1.0), FROZEN)
    with pytest.warns(UserWarning, match=r"weights that are all zero: classifier; .* nothing tr"):
        result = model.loss(batch(), 0)
    result.loss.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    optimizers = make_optimizers(model, lambda p: torch.optim.SGD(p, lr=1.0))
    train_step(model, batch(), optimizers)  # said once
    view = DiffusionBlocks(vit(), FROZEN).block(1)
    with pytest.warns(UserWarning, match="all zero: classifier;"):
        view.loss(batch())


def test_a_frozen_denoiser_of_zeros():
    torch.manual_seed(0)
    network = DiT(DiTConfig(**SIZES, channels=3))
    model = DiffusionBlocks(network, FROZEN)
    with pytest.warns(UserWarning, match="all zero: output_head;"):
        model.loss(batch(), 0, generator=seeded())


def test_what_trains_is_not_warned_of():
    trained = randomized(vit())
    nn.init.zeros_(trained.layers[0].modulation.linear.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Weights that are loaded after they were frozen; modulations may be zero.
        frozen = DiffusionBlocks(vit(head="learned"), FROZEN)
        nn.init.ones_(frozen.base_model.classifier.weight)
        frozen.loss(batch(), 0)
        for model in (trained, copy.deepcopy(trained)):
            DiffusionBlocks(model, FROZEN).loss(batch(), 1)
        DiffusionBlocks(vit(), BlocksConfig(2)).loss(batch(), 0)
