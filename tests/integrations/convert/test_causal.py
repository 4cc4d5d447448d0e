"""Converted models of the next token in doubled rows, as published: what a row sees, what text
they score and write."""

from functools import partial

import pytest
import torch
import torch.nn.functional as nnf
from convert_tools import CAUSAL, PUBLISHED, V, batch_of, model_of, plain_logits, shaken
from convert_tools import blocks_of as any_blocks_of

from dblocks.kernels.reference import doubled_mask
from dblocks.sampling import generate, next_token_nll
from tools import normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = ("llama", "gpt2")
blocks_of = partial(any_blocks_of, **PUBLISHED)


def logits_of(blocks, tokens, sigma=1.0, block=1, seed=3, **batch):
    z = normal(*tokens.shape, 16, seed=seed)
    return blocks.logits(z, torch.as_tensor(sigma), block=block, tokens=tokens, **batch)


def run(blocks, condition, sigma, z):
    """Clean and noisy rows after all layers."""
    network = blocks.base_model
    level = blocks.config.schedule.level(sigma)
    noisy = condition.noisy + network.noise_scale * z
    x = torch.cat([condition.clean, noisy], dim=1)
    cond = network.noise_embedding(level.c_noise)
    for layer in network.layers:
        x = layer(x, cond, condition.attention, clean=cond.shape[1])
    return x.chunk(2, dim=1)


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_noisy_row_depends_on_earlier_clean_rows_only(kind):
    blocks, tokens = shaken(blocks_of(kind)), batch_of(kind, 1)["tokens"][:, :6]
    network, sigma = blocks.base_model, torch.ones(1, 6)
    condition = network.embed_condition({"tokens": tokens})
    clean = condition.clean.detach().requires_grad_()
    _, noisy = run(blocks, condition._replace(clean=clean), sigma, normal(1, 6, 16))
    for i in range(6):
        (grad,) = torch.autograd.grad(noisy[0, i].square().sum(), clean, retain_graph=True)
        assert not grad[0, i:].any()
        assert all(row.any() for row in grad[0, :i])


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_prediction_does_not_see_its_token_nor_later_ones(kind):
    blocks, tokens = shaken(blocks_of(kind)), batch_of(kind)["tokens"]
    for b in range(2):
        before = logits_of(blocks, tokens, block=b)
        for j in (0, 3, 7):
            other = tokens.clone()
            other[:, j] = (other[:, j] + 1) % V
            after = logits_of(blocks, other, block=b)
            torch.testing.assert_close(after[:, : j + 1], before[:, : j + 1], rtol=0, atol=1e-6)
            assert j == 7 or (after[:, j + 1] - before[:, j + 1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", CAUSAL)
def test_clean_rows_do_not_depend_on_the_noise(kind):
    blocks, tokens = shaken(blocks_of(kind)), batch_of(kind)["tokens"]
    condition = blocks.base_model.embed_condition({"tokens": tokens})
    first, noisy = run(blocks, condition, torch.full((3, 8), 80.0), normal(3, 8, 16))
    second, other = run(blocks, condition, torch.full((3, 8), 0.002), normal(3, 8, 16, seed=1))
    assert first.equal(second)
    assert not noisy.equal(other)


@pytest.mark.parametrize("kind", CAUSAL)
def test_packed_documents_are_as_if_alone(kind):
    blocks = shaken(blocks_of(kind))
    tokens, z = batch_of(kind, 1)["tokens"], normal(1, 8, 16, seed=3)
    ends = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    packed = logits_of(blocks, tokens, cu_seqlens=ends)
    for first, last in ((0, 3), (3, 8)):
        part = slice(first, last)
        alone = blocks.logits(z[:, part], torch.tensor(1.0), block=1, tokens=tokens[:, part])
        torch.testing.assert_close(packed[:, part], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(packed[:, 3:], logits_of(blocks, tokens)[:, 3:], atol=1e-3)
    batch = {"tokens": tokens, "cu_seqlens": ends}
    blocks.loss(batch, 0).loss.backward()
    with pytest.raises(ValueError, match="the model's own loss does not keep packed documents"):
        blocks.base_model.plain_loss(batch)


@pytest.mark.parametrize("kind", CAUSAL)
def test_dropout_in_attention_goes_through_a_mask(kind, monkeypatch):
    name = "attn_pdrop" if kind == "gpt2" else "attention_dropout"
    fused = shaken(blocks_of(kind, model=model_of(kind, **{name: 0.0})).train())
    dropping = shaken(blocks_of(kind, model=model_of(kind, **{name: 1e-12})).train())
    half = shaken(blocks_of(kind, model=model_of(kind, **{name: 0.5})).train())
    for blocks in (fused, dropping):
        for module in blocks.modules():
            if isinstance(module, torch.nn.Dropout) and module.p > 1e-9:
                module.p = 0.0
    batch = batch_of(kind)
    expected = fused.loss(batch, 1, generator=seeded()).loss
    monkeypatch.setattr("dblocks.functional.doubled_attention", None)
    torch.testing.assert_close(dropping.loss(batch, 1, generator=seeded()).loss, expected)
    with pytest.raises(TypeError):
        fused.loss(batch, 1)
    losses = [half.loss(batch, 1, generator=seeded()).loss for _ in range(2)]
    assert losses[0] != losses[1]
    assert doubled_mask(8).sum() == 8 * 9


@pytest.mark.parametrize("options", [{}, {"scale_attn_weights": False}], ids=["scaled", "not"])
def test_gpt2_scales_as_it_is_told(options):
    options["scale_attn_by_inverse_layer_idx"] = not options
    model = model_of("gpt2", **options)
    tokens = batch_of("gpt2")["tokens"]
    blocks = blocks_of("gpt2", model=model)
    condition = blocks.base_model.embed_condition({"tokens": tokens})
    clean, _ = run(blocks, condition, torch.ones(3, 8), torch.zeros(3, 8, 16))
    own = model.lm_head(model.transformer.ln_f(clean))
    torch.testing.assert_close(own, plain_logits("gpt2", model, {"tokens": tokens}))


# Levels, losses and text


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("each", [1, 4, None])
def test_levels_of_tokens_and_of_sequences(kind, each):
    blocks, batch = shaken(blocks_of(kind, tokens_per_sigma=each)), batch_of(kind)
    shape = {1: (3, 8), 4: (3, 2), None: (3,)}[each]
    assert blocks.base_model.target.sigma_shape(batch) == shape
    assert blocks.loss(batch, 0).losses.shape == shape
    sigma = 1 + torch.arange(3.0)[:, None].expand(3, 8)
    sigma = sigma if each == 1 else sigma[:, : 8 // (each or 8)]
    each_token = logits_of(blocks, batch["tokens"], 1 + torch.arange(3.0)[:, None].expand(3, 8))
    found = logits_of(blocks, batch["tokens"], sigma[:, 0] if each is None else sigma)
    torch.testing.assert_close(found, each_token, rtol=1e-5, atol=1e-5)
    if each == 4:
        with pytest.raises(
            ValueError, match="must be a multiple of tokens_per_sigma=4 long, got 6"
        ):
            blocks.loss({"tokens": batch["tokens"][:, :6]}, 0)


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_that_of_the_logits(kind, masked):
    blocks, batch = shaken(blocks_of(kind)), batch_of(kind)
    tokens, scored = batch["tokens"], torch.ones(3, 8, dtype=torch.bool)
    if masked:
        scored = torch.arange(8) < torch.tensor([[8], [5], [1]])
        batch["loss_mask"] = scored
    draw = blocks.draw(batch, 1, generator=seeded())
    result = blocks.loss_at(batch, 1, draw)
    network, schedule = blocks.base_model, blocks.config.schedule
    y = nnf.normalize(network.family.embedding(network.model).weight, dim=-1)[tokens]
    z = schedule.corrupt(y, schedule.level(draw.sigma), draw.seed).z
    logits = blocks.logits(z, draw.sigma, block=1, tokens=tokens)
    costs = nnf.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    scored = scored & (torch.arange(8) > 0)
    expected = costs.where(scored, 0) * 24 / scored.sum()
    torch.testing.assert_close(result.losses, expected)
    denoised = blocks(z, draw.sigma, block=1, tokens=tokens)
    rows = nnf.normalize(network.family.embedding(network.model).weight, dim=-1)
    torch.testing.assert_close(denoised, logits.softmax(-1) @ rows)


@pytest.mark.parametrize("kind", CAUSAL)
def test_next_tokens_are_scored(kind):
    blocks, tokens = shaken(blocks_of(kind)), batch_of(kind)["tokens"]
    one = next_token_nll(blocks, tokens, generator=seeded())
    z = 80 * torch.randn(3, 8, 16, generator=seeded())
    logits = blocks.logits(z, torch.tensor(80.0), block=0, tokens=tokens)
    costs = nnf.cross_entropy(logits[:, 1:].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(one, costs)
    with pytest.raises(ValueError, match="num_steps must be 1 or None in blocks"):
        next_token_nll(blocks, tokens, num_steps=4)


def test_a_new_model_at_the_highest_noise_knows_what_it_knew():
    """Were all layers one block, its logits there would be the model's own, but for the noise."""
    model = model_of("llama")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    blocks, tokens = blocks_of("llama", 1, model=model), batch_of("llama")["tokens"]
    with torch.no_grad():
        blocks.base_model.noise_scale.zero_()
    own = plain_logits("llama", model, {"tokens": tokens}).log_softmax(-1)[:, 0]
    found = logits_of(blocks, tokens, 80.0, 0, seed=1).log_softmax(-1)
    # The noisy row of a position stands where the model predicts it, but sees it twice.
    assert torch.corrcoef(torch.stack([own.flatten(), found[:, 1].flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("kind", CAUSAL)
def test_text_is_written_without_a_cache(kind):
    blocks = shaken(blocks_of(kind))
    options = {"max_new_tokens": 3, "cache": False}
    for num_steps in (1, 4):
        options["num_steps"] = num_steps
        both = generate(blocks, [[5, 6, 7, 8], [9, 10]], **options, generator=seeded())
        assert [len(row) for row in both] == [3, 3]
        other = generate(blocks, [[5], [9, 10]], **options, generator=seeded())
        assert other[1].equal(both[1])


@pytest.mark.parametrize("kind", SOME)
def test_what_is_written_is_what_the_logits_say(kind, monkeypatch):
    monkeypatch.setattr(
        "dblocks.sampling.text._noise",
        lambda N, rows, _, width, *others: torch.zeros(N, rows, width),
    )
    blocks, prompts = shaken(blocks_of(kind)), [[5, 6, 7, 8], [9, 10]]
    options = {"max_new_tokens": 3, "num_steps": 1, "temperature": 0}
    texts = [generate(blocks, prompts, cache=cache, **options) for cache in (True, False)]
    for prompt, written in zip(2 * prompts, [*texts[0], *texts[1]], strict=True):
        tokens = torch.tensor([[*prompt, *written.tolist()]])
        z = torch.zeros(*tokens.shape, 16)
        logits = blocks.logits(z, torch.tensor(80.0), block=0, tokens=tokens)
        assert logits[0, len(prompt) :].argmax(-1).equal(written)
    with pytest.raises(TypeError, match=r"model must be a CausalLM, .* got ConvertedCausalLM"):
        generate(blocks.base_model, prompts, max_new_tokens=3)
