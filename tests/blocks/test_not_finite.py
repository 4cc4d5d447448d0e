"""Losses and gradients that are not finite: a step is refused or left out, nothing is poisoned."""

import math

import pytest
import torch
from torch import nn

from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.models.vit import ViT, ViTConfig

SIZES = {"image_size": 8, "channels": 1, "patch_size": 4, "width": 12, "depth": 3, "heads": 2}


def make():
    torch.manual_seed(0)
    model = DiffusionBlocks(ViT(ViTConfig(**SIZES)), BlocksConfig(num_blocks=3))
    return model, make_optimizers(model, lambda params: torch.optim.AdamW(params, lr=1e-3))


def batch(value=0.5):
    return {"images": torch.full((2, 1, 8, 8), value), "labels": torch.tensor([0, 1])}


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_weights(value, clip):
    model, optimizers = make()
    before = state(model)
    with pytest.raises(FloatingPointError, match="loss and gradients of block 1 must be finite"):
        train_step(model, batch(value), optimizers, block=1, clip_grad_norm=clip)
    assert same(model, before)
    assert all(p.grad is None for p in model.parameters())
    assert not any(o.state for o in optimizers)


def test_a_gradient_that_is_not_finite_stops_too():
    model, optimizers = make()
    before = state(model)
    weight = next(model.block_parameters(2))
    weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), math.nan))
    with pytest.raises(FloatingPointError, match="of block 2 must be finite, got a gradient"):
        train_step(model, batch(), optimizers, block=2)
    assert same(model, before)


def test_skip_leaves_the_step_out_and_goes_on():
    model, optimizers = make()
    before = state(model)
    result = train_step(model, batch(math.nan), optimizers, block=0, nonfinite="skip")
    assert result.skipped
    assert result.loss.isnan()
    assert same(model, before)
    result = train_step(model, batch(), optimizers, block=0, nonfinite="skip")
    assert not result.skipped
    assert not same(model, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_grad_norm": -1}, "clip_grad_norm must be a number above 0, got -1"),
        ({"clip_grad_norm": math.nan}, "clip_grad_norm must be a number above 0, got nan"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm must be a number above 0, got 0.0"),
        ({"nonfinite": "ignore"}, r"nonfinite must be one of \('raise', 'skip'\), got 'ignore'"),
    ],
)
def test_options_of_a_step_are_checked(options, message):
    model, optimizers = make()
    with pytest.raises(ValueError, match=message):
        train_step(model, batch(), optimizers, **options)


def test_clipping_at_infinity_only_measures():
    model, optimizers = make()
    result = train_step(model, batch(), optimizers, block=0, clip_grad_norm=math.inf)
    assert result.grad_norm.isfinite()
    assert result.grad_norm > 0


@pytest.mark.parametrize("scale", [math.nan, math.inf, "2"])
def test_guidance_must_be_finite(scale):
    model, _ = make()
    with pytest.raises(ValueError, match="guidance_scale must be a finite number"):
        model.bind(images=batch()["images"], guidance_scale=scale)


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_only_blocks_are_trained():
    model, optimizers = make()
    with pytest.raises(TypeError, match="got one inside a Wrapped, which would not see the step"):
        train_step(Wrapped(model), batch(), optimizers)
    with pytest.raises(TypeError, match="model must be a DiffusionBlocks, got ViT"):
        train_step(model.base_model, batch(), optimizers)
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None, got 5"):
        train_step(model, batch(), optimizers, generator=5)


@pytest.mark.parametrize("made", ["adam", 3, [nn.Linear(1, 1)]])
def test_a_factory_makes_optimizers(made):
    model, _ = make()
    with pytest.raises(TypeError, match="factory must return an optimizer"):
        make_optimizers(model, lambda params: made)


@pytest.mark.parametrize("nonfinite", [None, "raise"])
def test_another_way_is_told_to_who_has_not_chosen(nonfinite):
    model, optimizers = make()
    with pytest.raises(FloatingPointError) as error:
        train_step(model, batch(math.nan), optimizers, block=1, nonfinite=nonfinite)
    assert ('give nonfinite="skip"' in str(error.value)) == (nonfinite is None)
    assert "Lower the learning rate" in str(error.value)
