"""Entries of a model's config that are set after its conversion are honoured, or refused."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from family_models import V, causal_model, encoder_model

from dblocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.integrations.convert import convert
from tools import batch, seeded, vit

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
TOKENS = torch.arange(12).view(2, 6) % V
BATCH = {"tokens": TOKENS}


def converted(kind, num_blocks=1, **options):
    return convert(causal_model(kind), BlocksConfig(num_blocks, **options), task="tokens").eval()


def logits(blocks):
    return blocks.logits(torch.zeros(*TOKENS.shape, blocks.base_model.width), 1.0, tokens=TOKENS)


@pytest.mark.parametrize("bound", [0.2, None])
def test_a_bound_of_logits_is_honoured(bound):
    blocks = converted("gemma2")
    model = blocks.base_model.model
    with torch.no_grad():
        before = logits(blocks)
        model.config.final_logit_softcapping = bound
        own, ours = model(TOKENS).logits, logits(blocks)
    assert (ours - before).abs().max() > 1e-2 * before.abs().max()
    torch.testing.assert_close(ours[:, 1:], own[:, :-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "entry", "value"),
    [("llama", "num_hidden_layers", 2), ("gemma2", "num_hidden_layers", 1)],
)
@pytest.mark.parametrize("shared", ["train", "frozen", "private"])
def test_fewer_layers_are_refused_before_a_step(kind, entry, value, shared):
    blocks = converted(kind, 2, shared=shared)
    optimizers = make_optimizers(blocks, lambda p: torch.optim.SGD(p, lr=0.1))
    train_step(blocks, BATCH, optimizers, generator=seeded())
    before = {name: p.clone() for name, p in blocks.state_dict().items()}
    config = blocks.base_model.model.config
    right = getattr(config, entry)
    setattr(config, entry, value)
    for _ in range(2):
        with pytest.raises(ValueError, match="must compute what its embedding, layers and head"):
            train_step(blocks, BATCH, optimizers, generator=seeded())
    assert all(torch.equal(p, before[name]) for name, p in blocks.state_dict().items())
    setattr(config, entry, right)
    assert train_step(blocks, BATCH, optimizers, generator=seeded()).loss.isfinite()


def test_a_block_that_was_taken_refuses_a_changed_config():
    blocks = converted("gemma2", 2)
    block = blocks.block(1)
    block.loss(BATCH, generator=seeded())
    blocks.base_model.model.config.final_logit_softcapping = 3.0
    with pytest.raises(ValueError, match=r"^final_logit_softcapping of the model's config.*anew"):
        block.loss(BATCH, generator=seeded())
    assert blocks.block(1).loss(BATCH, generator=seeded()).loss.isfinite()


def test_what_a_call_returns_and_keeps_is_no_change():
    blocks = converted("llama", 2)
    blocks.loss(BATCH, 0, generator=seeded())
    before = blocks.changes
    blocks.base_model.model.config.use_cache = False
    blocks.base_model.model.config.output_hidden_states = True
    blocks.loss(BATCH, 0, generator=seeded())
    assert blocks.changes == before


def test_a_list_in_a_config_that_changes_in_place_is_noticed():
    blocks = converted("gemma2")
    before, config = logits(blocks), blocks.base_model.model.config
    right, config.layer_types[0] = config.layer_types[0], "full_attention"  # as no layer has it
    with pytest.raises(ValueError, match="must compute what its embedding, layers and head"):
        logits(blocks)
    config.layer_types[0] = right
    assert torch.equal(logits(blocks), before)


@pytest.mark.parametrize("shared", ["train", "private"])
def test_what_a_call_with_labels_or_a_save_sets_is_no_change(tmp_path, shared):
    blocks = convert(
        encoder_model("bert", "classes"), BlocksConfig(2, shared=shared), task="classes"
    )
    block, model = blocks.block(1), blocks.base_model.model
    given = {"tokens": TOKENS, "labels": torch.tensor([0, 1])}
    block.loss(given, generator=seeded())
    model(input_ids=TOKENS, labels=given["labels"])  # sets problem_type
    model.save_pretrained(tmp_path)  # sets architectures and dtype
    assert block.loss(given, generator=seeded()).loss.isfinite()


@pytest.mark.parametrize("shared", ["private", "reduce"])
def test_another_config_of_what_is_copied_is_refused(shared):
    blocks = converted("gemma2", 2, shared=shared)
    blocks.loss(BATCH, 1, generator=seeded())
    model = blocks.base_model.model
    other = copy.deepcopy(model.config)
    other.final_logit_softcapping = 0.5
    for module in model.modules():
        if "config" in vars(module):
            module.config = other
    with pytest.raises(ValueError, match=r"config must stay the object .* got another Gemma2Con"):
        blocks.loss(BATCH, 1, generator=seeded())
    assert copy.deepcopy(converted("gemma2", 2, shared=shared)).loss(BATCH, 1).loss.isfinite()


@pytest.mark.parametrize("value", [torch.ones(3), np.ones(3)], ids=["tensor", "array"])
def test_entries_that_are_no_numbers_are_not_compared(value):
    blocks = converted("llama", 2)
    config = blocks.base_model.model.config
    config.kept = value
    blocks.loss(BATCH, 0, generator=seeded())
    config.kept = copy.copy(value)
    assert blocks.loss(BATCH, 0, generator=seeded()).loss.isfinite()


def test_a_networks_own_config_may_count():
    network = vit()
    dm = DiffusionBlocks(network, BlocksConfig(2))
    loss = dm.loss(batch(), 0, generator=seeded())
    before = dm.changes
    network.config = SimpleNamespace(**vars(network.config), step=1)
    for _ in range(2):
        network.config.step += 1
        assert torch.equal(dm.loss(batch(), 0, generator=seeded()).loss, loss.loss)
    assert dm.changes == before
