"""Residency with converted models, compiled layers, saves and generation."""

import copy

import pytest
import torch
from convert_tools import blocks_of as converted_of
from convert_tools import shaken
from hub_tools import library

from dblocks import load_model, save_model
from dblocks.blocks import make_optimizers, train_step
from dblocks.scale import resident
from lm_tools import adamw, blocks_of, tokens_of
from tools import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def steps(model, optimizers, batch, count=4):
    generator = seeded(3)
    return [train_step(model, batch, optimizers, generator=generator).loss for _ in range(count)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_converted_models_train_to_the_same_bits(kind):
    library("transformers")
    batch = {"tokens": torch.randint(5, 11, (2, 8), generator=seeded(1))}
    given, results = shaken(converted_of(kind)), []
    for use in (False, True):
        model = copy.deepcopy(given)
        optimizers = make_optimizers(model, adamw)
        if use:
            resident(model, optimizers, "cpu", prefetch="all")
        results.append((steps(model, optimizers, batch), model.state_dict()))
    (losses, expected), (found, state) = results
    assert found == losses
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_clean_loss_is_refused():
    library("transformers")
    model = converted_of("llama", rows="doubled", clean_loss_weight=0.5)
    with pytest.raises(ValueError, match="must not have a clean loss"):
        resident(model, make_optimizers(model, adamw), "cpu")


def test_compiled_layers_and_losses_see_the_block_that_came():
    results = []
    for use in (False, True):
        model = blocks_of(depth=3)
        optimizers = make_optimizers(model, adamw)
        if use:
            resident(model, optimizers, "cpu", prefetch="all")
        for layer in model.base_model.layers:
            layer.compile(backend="aot_eager")
        losses = steps(model, optimizers, {"tokens": tokens_of()}, 5)
        whole = torch.compile(model.loss_at, backend="aot_eager")
        for block in (0, 1, 2, 0):
            batch = {"tokens": tokens_of()}
            draw = model.draw(batch, block, generator=seeded(block))
            losses.append(whole(batch, block, draw).loss.detach())
        results.append(losses)
    assert results[0] == results[1]


def test_saves_and_predictions_are_those_without(tmp_path):
    pytest.importorskip("safetensors")
    model = blocks_of(depth=3)
    optimizers = make_optimizers(model, adamw)
    residency = resident(model, optimizers, "cpu", host="file", folder=tmp_path)
    steps(model, optimizers, {"tokens": tokens_of()})
    save_model(tmp_path / "saved", model)
    loaded = load_model(tmp_path / "saved")
    z = torch.randn(2, 8, model.base_model.width, generator=seeded(2))
    with torch.no_grad():
        for block in range(3):
            found = model.logits(z, 1.0, block=block, tokens=tokens_of())
            assert torch.equal(found, loaded.logits(z, 1.0, block=block, tokens=tokens_of()))
    view = model.block(1)
    loss = view.loss({"tokens": tokens_of()}, generator=seeded(1)).loss
    assert residency.block == 1
    assert torch.equal(loss, model.loss({"tokens": tokens_of()}, 1, generator=seeded(1)).loss)
