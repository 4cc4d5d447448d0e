"""Converted classifiers and DiTs: how a target enters, what is read out, and sampling."""

import copy

import pytest
import torch
import torch.nn.functional as nnf
from convert_tools import (
    CLASSES,
    CLASSIFIERS,
    batch_of,
    blocks_of,
    model_of,
    plain_logits,
    shaken,
)

from dblocks import BlocksConfig, NoiseSchedule
from dblocks.integrations.convert import convert
from dblocks.sampling import initial_noise, product_logits, sample_euler, sample_logits
from tools import normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def given(kind, batch):
    return {k: v for k, v in batch.items() if k != ("images" if kind == "dit" else "labels")}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_at_the_highest_noise_a_new_learned_head_says_what_the_model_says(kind):
    """But for the noise, which c_in leaves small, in a model that is one block."""
    blocks, batch = blocks_of(kind, 1, head="learned"), batch_of(kind)
    with torch.no_grad():
        blocks.base_model.noise_scale.zero_()
    z = torch.zeros(3, 16)
    logits = blocks.logits(z, torch.tensor(80.0), block=0, **given(kind, batch))
    own = plain_logits(kind, blocks.base_model, batch)
    torch.testing.assert_close(logits, own, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_new_classifier_without_noise_says_what_the_model_says(kind):
    """In one block, with z = 0 at any level; with noise that does not enter, plus its evidence."""
    blocks, batch = blocks_of(kind, 1), batch_of(kind)
    own = plain_logits(kind, blocks.base_model, batch)
    z = normal(3, 16)
    for sigma in (0.1, 1.0, 80.0):
        level = torch.tensor(sigma)
        found = blocks.logits(torch.zeros(3, 16), level, block=0, **given(kind, batch))
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        blocks.base_model.noise_scale.zero_()
    found = blocks.logits(z, level, block=0, **given(kind, batch))
    evidence = z @ blocks.base_model.target.rows().T / sigma**2
    torch.testing.assert_close(found, own + evidence, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("sigma", [0.05, 0.7, 20.0])
def test_the_posterior_is_bayes_rule(kind, sigma):
    """p(class | z, image) of the model's own p(class | image) and the density of z, in float64."""
    blocks = blocks_of(kind, 1, model=model_of(kind).double(), embed_scale=1.5)
    network, batch = blocks.base_model, batch_of(kind)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        network.noise_scale.zero_()
    rows = network.target.rows().double()
    z = rows[batch["labels"]] + sigma * normal(3, 16).double()
    density = -(z[:, None] - rows).square().sum(-1) / (2 * sigma**2)
    prior = plain_logits(kind, network, batch).log_softmax(-1)
    level = torch.full((3,), sigma, dtype=torch.float64)
    found = blocks.logits(z, level, block=0, **given(kind, batch))
    assert found.dtype == torch.float64
    # All embeddings are of one norm but for float32, in which they are made.
    off = 4 * torch.finfo(torch.float32).eps * 1.5**2 / sigma**2
    torch.testing.assert_close(
        found.log_softmax(-1), (prior + density).log_softmax(-1), rtol=1e-9, atol=off
    )


def test_the_parameters_of_a_learned_head_are_not_there():
    names = {n for n, _ in blocks_of("vit").named_parameters()}
    learned = {n for n, _ in blocks_of("vit", head="learned").named_parameters()}
    added = {n.split(".")[1] for n in learned - names}
    assert added == {"head_modulation", "log_scale"}
    assert names < learned


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_product_of_blocks(kind):
    blocks, batch = shaken(blocks_of(kind)), batch_of(kind)
    z, level = torch.zeros(3, 16), torch.full((3,), 80.0)
    each = [blocks.logits(z, level, block=b, **given(kind, batch)).log_softmax(-1) for b in (0, 1)]
    found = product_logits(blocks, z, **given(kind, batch))
    torch.testing.assert_close(found, ((each[0] + each[1]) / 2).log_softmax(-1))
    untrained = blocks_of(kind, config={"top_share": 0.0})
    with pytest.raises(ValueError, match=r"the product of blocks needs .* top_share"):
        product_logits(untrained, z, **given(kind, batch))


@pytest.mark.parametrize("head", ["posterior", "learned"])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_loss_of_a_classifier_is_that_of_its_logits(kind, head):
    blocks, batch = shaken(blocks_of(kind, embed_scale=2.0, head=head)), batch_of(kind)
    draw = blocks.draw(batch, 1, generator=seeded())
    result = blocks.loss_at(batch, 1, draw)
    network, schedule = blocks.base_model, blocks.config.schedule
    y = network.target.embed(batch)
    torch.testing.assert_close(y.norm(dim=-1), torch.full((3,), 2.0))
    z = schedule.corrupt(y, schedule.level(draw.sigma), draw.seed).z
    logits = blocks.logits(z, draw.sigma, block=1, **given(kind, batch))
    costs = nnf.cross_entropy(logits, batch["labels"], reduction="none")
    torch.testing.assert_close(result.losses, costs)
    denoised = blocks(z, draw.sigma, block=1, **given(kind, batch))
    torch.testing.assert_close(denoised, logits.softmax(-1) @ network.target.rows())


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_noise_enters_by_the_class_row_or_by_all(kind):
    blocks, batch = blocks_of(kind), batch_of(kind)
    network, schedule = blocks.base_model, blocks.config.schedule
    condition = network.embed_condition(batch)
    level = schedule.level(torch.ones(3))
    rows = [network.run_layers([], z, level, condition).x for z in normal(2, 3, 16)]
    differ = (rows[0] != rows[1]).any(-1)
    assert differ[:, 0].all()
    assert differ[:, 1:].all() == (kind == "timm-pooled")
    assert (differ[:, 1:].any()) == (kind == "timm-pooled")


@pytest.mark.parametrize("kind", ["bert-classes", "roberta-classes"])
def test_padding_is_not_attended_to(kind):
    blocks, batch = shaken(blocks_of(kind)), batch_of(kind)
    keep = torch.arange(8) < torch.tensor([[8], [5], [3]])
    batch["attention_mask"] = keep.long()
    z, sigma = normal(3, 16), torch.tensor(1.0)
    first = blocks.logits(z, sigma, block=1, **given(kind, batch))
    batch["tokens"] = batch["tokens"].where(keep, 9)
    torch.testing.assert_close(blocks.logits(z, sigma, block=1, **given(kind, batch)), first)
    own = plain_logits(kind, blocks.base_model, batch)
    model = blocks.base_model(input_ids=batch["tokens"], attention_mask=batch["attention_mask"])
    expected = nnf.cross_entropy(model.logits, batch["labels"])
    torch.testing.assert_close(blocks.base_model.plain_loss(batch), expected)
    assert not torch.allclose(own, model.logits, atol=1e-4)


@pytest.mark.parametrize("kind", [*CLASSIFIERS, "dit"])
def test_they_are_sampled(kind):
    blocks, batch = shaken(blocks_of(kind)), batch_of(kind)
    shape = (3, 1, 8, 8) if kind == "dit" else (3, 16)
    z = initial_noise(shape, blocks.config.schedule, generator=seeded())
    steps = blocks.config.schedule.steps(4)
    found = sample_euler(blocks, z, steps, **given(kind, batch))
    assert found.shape == shape
    assert found.isfinite().all()
    if kind != "dit":
        logits = sample_logits(blocks, z, steps, **given(kind, batch))
        assert logits.shape == (3, CLASSES)


# DiT


def test_a_dit_is_the_preconditioned_model():
    """F is what diffusers' own forward makes of c_in*z, at its timestep, in evaluation."""
    model = model_of("dit")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=seeded(7)))
    schedule, batch = NoiseSchedule(sigma_min=0.01, sigma_max=20.0), batch_of("dit")
    blocks = convert(model, BlocksConfig(1, schedule=schedule), task="images").eval()
    z, sigma = normal(3, 1, 8, 8), torch.tensor([0.01, 1.3, 20.0])
    level = schedule.level(sigma)
    time = 1000 * (sigma / 0.01).log() / torch.tensor(2000.0).log()
    z_in = level.c_in[:, None, None, None] * z
    own = model(z_in, timestep=time, class_labels=batch["labels"]).sample
    found = blocks.logits(z, sigma, block=0, labels=batch["labels"])
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)
    learned = model_of("dit", out_channels=2)
    with torch.no_grad():
        for p in learned.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=seeded(7)))
    blocks = convert(learned, BlocksConfig(1, schedule=schedule), task="images").eval()
    own = learned(z_in, timestep=time, class_labels=batch["labels"]).sample[:, :1]
    found = blocks.logits(z, sigma, block=0, labels=batch["labels"])
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-5)


def test_a_dit_drops_labels_once_for_all_layers():
    blocks, batch = shaken(blocks_of("dit")).train(), batch_of("dit")
    draw = blocks.draw(batch, 1, generator=seeded())
    assert draw.drop is not None
    losses = [blocks.loss_at(batch, 1, draw).losses for _ in range(2)]
    assert losses[0].equal(losses[1])
    null = dict(batch, labels=torch.full((3,), CLASSES))
    with pytest.raises(ValueError, match="labels must be in 0"):
        blocks.loss(null, 1)
    assert all(m.training for m in blocks.modules())
    every = torch.ones(3, dtype=torch.bool)
    dropped = blocks.loss_at(batch, 1, draw._replace(drop=every)).losses
    other = dict(batch, labels=(batch["labels"] + 1) % CLASSES)
    assert blocks.loss_at(other, 1, draw._replace(drop=every)).losses.equal(dropped)
    z, sigma = normal(3, 1, 8, 8), torch.tensor(1.0)
    guided = blocks(z, sigma, block=1, guidance_scale=2.0, labels=batch["labels"])
    assert guided.isfinite().all()


def test_the_final_embedding_of_a_dit_is_a_copy():
    blocks = blocks_of("dit")
    first = blocks.base_model.model.transformer_blocks[0].norm1.emb
    own = {id(p) for p in first.parameters()}
    assert not own & {id(p) for p in blocks.base_model.final_embedding.parameters()}
    assert own <= {id(p) for p in blocks.block_parameters(0)}
    twin = copy.deepcopy(blocks)
    twin.loss(batch_of("dit"), 1).loss.backward()
    assert all(p.grad is None for p in twin.block_parameters(0))
