"""Situations in which a call or a step would say nothing, and be wrong."""

import copy

import masked_tools
import pytest
import torch

from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from tools import batch, randomized, seeded, vit


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def blocks_of():
    return DiffusionBlocks(randomized(vit()), BlocksConfig(2))


def of_another_model(model):
    return make_optimizers(copy.deepcopy(model), sgd)


def assigned(model):
    optimizers = make_optimizers(model, sgd)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return optimizers


def replaced(model):
    optimizers = make_optimizers(model, sgd)
    model.base_model.layers[1] = copy.deepcopy(model.base_model.layers[1])
    return optimizers


@pytest.mark.parametrize("make", [of_another_model, assigned, replaced])
def test_optimizers_of_other_parameters_are_refused(make):
    model = blocks_of()
    optimizers = make(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for part in (model, model.block(0)):
        with pytest.raises(ValueError, match=r"parameters of this model alone, .* call make_opt"):
            train_step(part, batch(), optimizers, block=0)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    train_step(model, batch(), make_optimizers(model, sgd), block=0, generator=seeded())
    assert any(not value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_step_needs_gradients():
    model = blocks_of()
    optimizers = make_optimizers(model, sgd)
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="must not be called within no_grad"),
    ):
        train_step(model, batch(), optimizers)


@pytest.mark.parametrize("change", ["append", "delete"])
def test_layers_stay_as_many_as_they_were(change):
    model = blocks_of()
    layers = model.base_model.layers
    if change == "append":
        layers.append(copy.deepcopy(layers[0]))
    else:
        del layers[-1]
    with pytest.raises(ValueError, match=r"layers must stay 6 as they were divided .* got [57]"):
        model.loss(batch(), 1)
    with pytest.raises(ValueError, match="create the DiffusionBlocks again"):
        model.logits(torch.zeros(8, 24), 0.01, block=1, images=batch()["images"])


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_levels_are_positive_and_finite(sigma):
    model, images = blocks_of(), batch()["images"]
    z = torch.zeros(len(images), model.base_model.config.width)
    for level in (sigma, torch.tensor(sigma), torch.full((len(z),), sigma)):
        with pytest.raises(ValueError, match="sigma must be positive and finite, got"):
            model.logits(z, level, block=0, images=images)
    with pytest.raises(TypeError, match=r"z must be real, got torch\.complex64"):
        model(z.to(torch.complex64), 1.0, block=0, images=images)


@pytest.mark.parametrize("t", [-0.1, 1.5, float("nan")])
def test_times_of_masks_are_between_0_and_1(t):
    model = masked_tools.blocks_of(2)
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\], got"):
        model.logits(masked_tools.tokens_of(), t, block=0)
