"""Gradients, bfloat16 and the clean loss of every family of language models, by the plain model."""

import copy

import pytest
import torch
import torch.nn.functional as nnf
from convert_tools import shaken
from family_models import CAUSAL, TEXT, T, V, causal_model, clean_logits, encoder_model

from dblocks import BlocksConfig, MaskSchedule
from dblocks.integrations.convert import convert
from dblocks.schedules import MASKED
from dblocks.testing import assert_within_budget
from tools import seeded

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:not fused"),  # norms of a class of their own
]
TOKENS = torch.randint(3, V, (2, T), generator=seeded(2))
Z = torch.where(torch.rand(2, T, generator=seeded(3)) < 0.5, MASKED, TOKENS)
# The largest of the plain model's roundings, which a budget is made of, needs more than a few.
MANY = torch.randint(3, V, (12, T), generator=seeded(4))
MASK_TOKEN = 2
# A bias, sinks and experts, bounds and windows; the others take minutes.
QUICK = ("bloom", "gpt_oss", "gemma2")


def kinds(names, quick):
    return [k if k in quick else pytest.param(k, marks=pytest.mark.long) for k in names]


def own_logits(model, tokens=TOKENS):
    return model(input_ids=tokens, use_cache=False).logits


def cost(logits):
    return nnf.cross_entropy(logits[:, : T - 1].float().flatten(0, 1), TOKENS[:, 1:].flatten())


def gradients(model, loss):
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names, parameters = zip(*trained, strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return dict(zip(names, found, strict=True))


def check_gradients(found, expected):
    """As exact as a few hundred float32 operations are, whatever their order."""
    largest = max(g.abs().max() for g in expected.values() if g is not None)
    for name, right in expected.items():
        got = found[name]
        if right is None:
            assert got is None or not got.any(), name
            continue
        assert got is not None, name
        assert (got - right).abs().max() <= 2e-4 * right.abs().max() + 2e-6 * largest, name
    assert largest > 0


def check_clean_loss(blocks, model, batch, draw, expected):
    """The plain model's loss, whose gradients reach the layers of one block alone."""
    loss = blocks.clean_loss(batch, 1, draw)
    right, gradient = expected
    torch.testing.assert_close(loss, right, rtol=1e-5, atol=1e-6)
    first, last = blocks.layer_ranges[1]
    trained = tuple(name + "." for name in blocks.base_model.names[first:last])
    found = gradients(model, loss)
    ours = {name: g if name.startswith(trained) else None for name, g in gradient.items()}
    check_gradients(found, ours)


@pytest.mark.parametrize("kind", kinds(CAUSAL, QUICK))
def test_gradients_of_models_of_the_next_token(kind):
    model = causal_model(kind)
    expected = gradients(model, cost(own_logits(model)))
    for rows in ("single", "doubled"):
        ours = copy.deepcopy(model)
        check_gradients(gradients(ours, cost(clean_logits(ours, TOKENS, rows))), expected)


@pytest.mark.parametrize("kind", kinds(CAUSAL, QUICK))
def test_clean_loss_of_models_of_the_next_token(kind):
    model = causal_model(kind)
    own = cost(own_logits(model))
    expected = own.detach(), gradients(model, own)
    blocks = convert(model, BlocksConfig(2), task="tokens", clean_loss_weight=1.0)
    batch = {"tokens": TOKENS}
    draw = blocks.draw(batch, 1, generator=seeded())
    check_clean_loss(blocks, model, batch, draw, expected)


@pytest.mark.parametrize("kind", kinds(CAUSAL, QUICK))
def test_bfloat16_of_models_of_the_next_token(kind):
    model = causal_model(kind, **every_expert(kind)).bfloat16()
    with torch.no_grad():
        exact = own_logits(copy.deepcopy(model).float(), MANY).double()
        eager = own_logits(model, MANY)
        for rows in ("single", "doubled"):
            found = clean_logits(copy.deepcopy(model), MANY, rows)
            last = found.shape[1]
            found = found.bfloat16()
            assert_within_budget(found, exact[:, :last], eager[:, :last].contiguous(), rows)
    for rows in ("single", "doubled"):
        options = {"rows": rows, "clean_loss_weight": 1.0}
        blocks = convert(copy.deepcopy(model), BlocksConfig(2), task="tokens", **options)
        check_finite(shaken(blocks), {"tokens": TOKENS})


def every_expert(kind):
    """Options with which all experts are chosen: between few, rounding would choose others."""
    given = CAUSAL[kind]
    if kind == "phimoe":
        return {"num_local_experts": 2, "router_jitter_noise": 10.0}
    names = ("num_experts_per_tok", "moe_k", "moe_topk")
    options = {name: 4 for name in names if name in given}
    return options | ({"topk_group": given["n_group"]} if "n_group" in given else {})


def check_finite(blocks, batch):
    loss = blocks.loss(batch, 1, generator=seeded()).loss
    assert loss.isfinite()
    loss.backward()
    grads = [p.grad for p in blocks.block_parameters(1) if p.grad is not None]
    assert grads
    assert all(g.isfinite().all() for g in grads)


# Masked tokens


def masked_blocks(model, **options):
    config = BlocksConfig(2, schedule=MaskSchedule())
    return convert(model, config, task="tokens", mask_token_id=MASK_TOKEN, **options)


def masked_cost(logits):
    labels = torch.where(Z == MASKED, TOKENS, -100)
    return nnf.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def seen():
    return TOKENS.masked_fill(Z == MASKED, MASK_TOKEN)


def rows_of(model):
    """Logits of all layers, where nothing is modulated."""
    blocks = masked_blocks(model)
    network, level = blocks.base_model, blocks.config.schedule.level(torch.full((2,), 0.5))
    hidden = network.run_layers(network.layers, seen(), level, network.embed_condition({}))
    return network.family.head(network.model, hidden.x)


def masked_model(kind):
    return encoder_model(kind, "masks")


@pytest.mark.parametrize("kind", kinds(TEXT, ("deberta-v2",)))
def test_gradients_of_models_of_masked_tokens(kind):
    model = masked_model(kind)
    own = masked_cost(model(input_ids=seen()).logits)
    expected = gradients(model, own)
    ours = copy.deepcopy(model)
    check_gradients(gradients(ours, masked_cost(rows_of(ours))), expected)

    blocks = masked_blocks(model, clean_loss_weight=1.0)
    loss = blocks.base_model.plain_loss({"tokens": TOKENS}, Z)
    torch.testing.assert_close(loss, own)
    batch = {"tokens": TOKENS}
    draw = blocks.draw(batch, 1, generator=seeded())
    schedule = blocks.config.schedule
    y = blocks.base_model.target.embed(blocks.base_model.target.check(batch))
    z = schedule.corrupt(y, schedule.level(draw.sigma), draw.seed).z
    shown = TOKENS.masked_fill(z == MASKED, MASK_TOKEN)
    labels = torch.where(z == MASKED, TOKENS, -100).flatten()
    loss = nnf.cross_entropy(model(input_ids=shown).logits.flatten(0, 1), labels)
    check_clean_loss(blocks, model, batch, draw, (loss.detach(), gradients(model, loss)))


@pytest.mark.parametrize("kind", kinds(TEXT, ("deberta-v2",)))
def test_bfloat16_of_models_of_masked_tokens(kind):
    model = masked_model(kind).bfloat16()
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(input_ids=seen()).logits.double()
        eager = model(input_ids=seen()).logits
        assert_within_budget(rows_of(copy.deepcopy(model)), exact, eager)
    check_finite(shaken(masked_blocks(model, clean_loss_weight=1.0)), {"tokens": TOKENS})
