"""The model's own loss beside that of denoising: its gradients go to one block's layers."""

import pytest
import torch
from convert_tools import (
    CLASSIFIERS,
    MASK,
    MASKED,
    adamw,
    batch_of,
    blocks_of,
    model_of,
    shaken,
    switch_on_checkpoints,
    without_dropout,
)
from family_models import V, causal_model

from dblocks import BlocksConfig, convert, make_optimizers, train_step
from dblocks.schedules.mask import MASKED as HIDDEN
from tools import seeded

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("llama", "gpt2", "bert", *CLASSIFIERS)


def own_loss(kind, blocks, batch, draw):
    """The loss that the library itself returns for its model, where it has one."""
    model = blocks.base_model.model
    if kind.startswith("timm"):
        return torch.nn.functional.cross_entropy(model(batch["images"]), batch["labels"])
    if kind == "vit":
        return model(pixel_values=batch["images"], labels=batch["labels"]).loss
    tokens = batch["tokens"]
    if kind in MASKED:
        schedule = blocks.config.schedule
        z = schedule.corrupt(tokens, schedule.level(draw.sigma), draw.seed).z
        labels = tokens.where(z == HIDDEN, -100)
        return model(input_ids=tokens.where(z != HIDDEN, MASK), labels=labels).loss
    return model(input_ids=tokens, labels=batch.get("labels", tokens)).loss


@pytest.mark.parametrize("kind", KINDS)
def test_its_gradients_are_those_of_the_models_own_loss(kind):
    blocks, batch = shaken(blocks_of(kind, clean_loss_weight=0.5)), batch_of(kind)
    for b in range(2):
        draw = blocks.draw(batch, b, generator=seeded())
        blocks.zero_grad()
        own = own_loss(kind, blocks, batch, draw)
        own.backward()
        layers = {id(p) for p in blocks.block_parameters(b)}
        expected = {n: p.grad for n, p in blocks.named_parameters() if id(p) in layers}
        blocks.zero_grad()
        clean = blocks.clean_loss(batch, b, draw)
        torch.testing.assert_close(clean, own.detach())
        (3 * clean).backward()
        for name, p in blocks.named_parameters():
            if name in expected and expected[name] is not None:
                torch.testing.assert_close(p.grad, 3 * expected[name])
            else:
                assert p.grad is None
        assert any(grad is not None for grad in expected.values())


@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_it_is_added_to_the_loss(kind):
    batch, losses, gradients = batch_of(kind), [], []
    for weight in (0.0, 0.5):
        blocks = shaken(blocks_of(kind, clean_loss_weight=weight))
        draw = blocks.draw(batch, 1, generator=seeded())
        result = blocks.loss_at(batch, 1, draw)
        losses.append(result.loss)
        gradients.append(torch.autograd.grad(result.loss, list(blocks.block_parameters(1))))
    clean = blocks.clean_loss(batch, 1, draw)
    torch.testing.assert_close(losses[1], losses[0] + 0.5 * clean)
    added = torch.autograd.grad(clean, list(blocks.block_parameters(1)), allow_unused=True)
    for alone, both, extra in zip(*gradients, added, strict=True):
        expected = alone if extra is None else alone + 0.5 * extra
        torch.testing.assert_close(both, expected)
    with torch.no_grad():
        assert blocks.loss_at(batch, 1, draw).loss.equal(losses[1])


@pytest.mark.parametrize("shared", ["train", "frozen", "private"])
def test_no_flag_is_left_changed(shared, monkeypatch):
    blocks = blocks_of("llama", clean_loss_weight=1.0, config={"shared": shared})
    flags = [p.requires_grad for p in blocks.parameters()]
    blocks.loss(batch_of("llama"), 0)
    assert [p.requires_grad for p in blocks.parameters()] == flags

    def fail(*args, **kwargs):
        assert sum(p.requires_grad for p in blocks.base_model.model.parameters()) < 20
        raise RuntimeError("no loss")

    monkeypatch.setattr(type(blocks.base_model), "plain_loss", fail)
    with pytest.raises(RuntimeError, match="no loss"):
        blocks.loss(batch_of("llama"), 0)
    assert [p.requires_grad for p in blocks.parameters()] == flags


def test_only_one_block_holds_gradients_and_moves():
    blocks, batch = shaken(blocks_of("llama", clean_loss_weight=1.0)), batch_of("llama")
    before = [p.clone() for p in blocks.block_parameters(0)]
    optimizers = make_optimizers(blocks, adamw)
    train_step(blocks, batch, optimizers, block=1, generator=seeded())
    assert all(a.equal(b) for a, b in zip(before, blocks.block_parameters(0), strict=True))
    blocks.loss(batch, 1).loss.backward()
    assert all(p.grad is None for p in blocks.block_parameters(0))


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "timm"])
def test_checkpointed_layers_give_the_same_gradients(kind):
    gradients = []
    for checkpointed in (False, True):
        model = model_of(kind)
        blocks = shaken(blocks_of(kind, model=model, clean_loss_weight=1.0)).train()
        without_dropout(blocks)
        if checkpointed:
            switch_on_checkpoints(model)
        blocks.loss(batch_of(kind), 0, generator=seeded()).loss.backward()
        gradients.append([p.grad for p in blocks.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-6)


def test_a_block_alone_has_no_model_to_run():
    with pytest.raises(ValueError, match="a block alone must not have a clean loss"):
        blocks_of("llama", clean_loss_weight=1.0).block(0)


def test_a_loss_with_another_term_is_refused():
    model = causal_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    blocks = convert(model, BlocksConfig(2), task="tokens", clean_loss_weight=0.5)
    with pytest.raises(ValueError, match=r"got output_router_logits=True \(a loss of the experts'"):
        blocks.loss({"tokens": torch.randint(3, V, (2, 8), generator=seeded())}, 0)
    quiet = convert(model, BlocksConfig(2), task="tokens")
    assert quiet.loss(
        {"tokens": torch.randint(3, V, (2, 8), generator=seeded())}, 0
    ).loss.isfinite()
