"""Converted models of the next token in a single stream, with the exact posterior as head."""

from functools import partial

import pytest
import torch
import torch.nn.functional as nnf
from convert_tools import CAUSAL, PUBLISHED, SINGLE, WINDOWS, V, batch_of, model_of, plain_logits
from convert_tools import blocks_of as any_blocks_of
from convert_tools import shaken as all_shaken

from dblocks.sampling import denoising_bound, generate, next_token_nll, product_logits, product_nll
from dblocks.sampling.cache import Slots
from dblocks.sampling.rows import WholeRows
from dblocks.sampling.writers import ProductWriter, StepWriter
from tools import normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = ("llama", "gpt2")
blocks_of = partial(any_blocks_of, **SINGLE)
FORMS = {"single": SINGLE, "doubled": PUBLISHED, "mixed": {"rows": "doubled", "head": "posterior"}}


def shaken(blocks, noise=0.5):
    """With noise that matters: its factor starts at 0."""
    all_shaken(blocks)
    with torch.no_grad():
        blocks.base_model.noise_scale.fill_(noise)
    return blocks


def logits_of(blocks, tokens, sigma=1.0, block=1, seed=3, **batch):
    z = normal(*tokens.shape, 16, seed=seed)
    return blocks.logits(z, torch.as_tensor(sigma), block=block, tokens=tokens, **batch)


def evidence_of(blocks, z, sigma):
    return z @ blocks.base_model.target.rows().T / sigma**2


def lively(kind, **options):
    """A model whose logits differ from token to token."""
    model = model_of(kind, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model


# What it was


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("kind", CAUSAL)
def test_a_new_model_in_one_block_says_what_the_model_says(kind, windows):
    """Whatever the noise: its factor and all modulations are 0."""
    model = lively(kind, **(WINDOWS.get(kind, {}) if windows else {}))
    blocks, tokens = blocks_of(kind, 1, model=model), batch_of(kind)["tokens"]
    own = plain_logits(kind, model, {"tokens": tokens})[:, :-1]
    assert own.std() > 0.1
    z = normal(3, 8, 16)
    for sigma in (0.01, 1.0, 80.0):
        found = blocks.logits(z, torch.tensor(sigma), block=0, tokens=tokens)
        found = (found - evidence_of(blocks, z, sigma))[:, 1:]
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-4 + 1e-6 / sigma**2)


def test_the_models_own_attention_may_be_another():
    tokens = batch_of("llama")["tokens"]
    found = [
        logits_of(
            shaken(blocks_of("llama", model=model_of("llama", attn_implementation=name))), tokens
        )
        for name in ("sdpa", "eager")
    ]
    torch.testing.assert_close(found[0], found[1])


def test_the_parameters_of_a_learned_head_are_not_there():
    names = {n for n, _ in blocks_of("llama").named_parameters()}
    learned = {n for n, _ in blocks_of("llama", head="learned").named_parameters()}
    added = {n.split(".")[1] for n in learned - names}
    assert added == {"head_modulation", "log_scale"}
    assert names < learned


# What a row sees


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_token_changes_later_rows_only(kind):
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
def test_a_row_has_no_gradient_for_its_own_token(kind):
    """Given the noisy embeddings; of a clean row's number j, which holds token j."""
    blocks, batch = shaken(blocks_of(kind)), batch_of(kind, 1)
    network, z = blocks.base_model, normal(1, 8, 16)
    condition = network.embed_condition(batch)
    known = condition.noisy.detach().requires_grad_()
    level = blocks.config.schedule.level(torch.rand(1, 8, generator=seeded()) + 0.5)
    hidden = network.run_layers(network.layers, z, level, condition._replace(noisy=known))
    logits = network.target.predict(network.features(hidden), z, level)
    for i in range(1, 8):
        (grad,) = torch.autograd.grad(logits[0, i].square().sum(), known, retain_graph=True)
        assert not grad[0, i:].any()
        assert all(row.any() for row in grad[0, :i])


@pytest.mark.parametrize("kind", CAUSAL)
def test_noise_changes_its_own_row_and_later_ones(kind):
    blocks, tokens = shaken(blocks_of(kind)), batch_of(kind)["tokens"]
    z, sigma = normal(3, 8, 16, seed=3), torch.ones(3, 8)
    before = blocks.logits(z, sigma, block=1, tokens=tokens)
    for j in (1, 4, 7):
        other, levels = z.clone(), sigma.clone()
        other[:, j] += 1
        levels[:, j] = 2.0
        after = blocks.logits(other, levels, block=1, tokens=tokens)
        torch.testing.assert_close(after[:, :j], before[:, :j], rtol=0, atol=1e-6)
        changed = (after - before).abs().amax((0, 2))
        assert (changed[j:] > 1e-4).all()


@pytest.mark.parametrize("kind", CAUSAL)
def test_packed_documents_are_as_if_alone(kind):
    blocks = shaken(blocks_of(kind))
    tokens, z = batch_of(kind, 1)["tokens"], normal(1, 8, 16, seed=3)
    ends = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    packed = logits_of(blocks, tokens, cu_seqlens=ends)
    for first, last in ((0, 3), (3, 8)):
        part = slice(first, last)
        alone = blocks.logits(z[:, part], torch.tensor(1.0), block=1, tokens=tokens[:, part])
        scored = slice(first + 1, last)  # the first token of a document is given
        torch.testing.assert_close(packed[:, scored], alone[:, 1:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(packed[:, 4:], logits_of(blocks, tokens)[:, 4:], atol=1e-3)
    result = blocks.loss({"tokens": tokens, "cu_seqlens": ends}, 0)
    assert not result.losses[0, [0, 3]].any()
    result.loss.backward()
    assert all(p.grad.isfinite().all() for p in blocks.parameters() if p.grad is not None)


# Levels, losses, Bayes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("each", [1, 4, None])
def test_levels_of_tokens_and_of_sequences(form, each):
    blocks = shaken(any_blocks_of("llama", tokens_per_sigma=each, **FORMS[form]))
    batch = batch_of("llama")
    shape = {1: (3, 8), 4: (3, 2), None: (3,)}[each]
    assert blocks.loss(batch, 0).losses.shape == shape
    every = 1 + torch.arange(3.0)[:, None].expand(3, 8)
    sigma = every[:, 0] if each is None else every[:, : 8 // each]
    found = logits_of(blocks, batch["tokens"], sigma)
    torch.testing.assert_close(found, logits_of(blocks, batch["tokens"], every))


@pytest.mark.parametrize("form", ["single", "mixed"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_that_of_the_logits(form, masked):
    blocks = shaken(any_blocks_of("llama", embed_scale=2.0, **FORMS[form]))
    batch, scored = batch_of("llama"), torch.ones(3, 8, dtype=torch.bool)
    if masked:
        batch["loss_mask"] = scored = torch.arange(8) < torch.tensor([[8], [5], [1]])
    draw = blocks.draw(batch, 1, generator=seeded())
    result = blocks.loss_at(batch, 1, draw)
    network, schedule, tokens = blocks.base_model, blocks.config.schedule, batch["tokens"]
    y = network.target.rows()[tokens]
    torch.testing.assert_close(y.norm(dim=-1), torch.full((3, 8), 2.0))
    z = schedule.corrupt(y, schedule.level(draw.sigma), draw.seed).z
    logits = blocks.logits(z, draw.sigma, block=1, tokens=tokens)
    costs = nnf.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    scored = scored & (torch.arange(8) > 0)
    torch.testing.assert_close(result.losses, costs.where(scored, 0) * 24 / scored.sum())
    denoised = blocks(z, draw.sigma, block=1, tokens=tokens)
    torch.testing.assert_close(denoised, logits.softmax(-1) @ network.target.rows())


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("sigma", [0.05, 0.7, 20.0])
def test_the_posterior_is_bayes_rule(kind, sigma):
    """p(token | z, text) from the model's own p(token | text) and the density of z, in float64."""
    model = lively(kind).double()
    blocks, tokens = blocks_of(kind, 1, model=model, embed_scale=1.5), batch_of(kind)["tokens"]
    prior = plain_logits(kind, model, {"tokens": tokens})[:, :-1].log_softmax(-1)
    rows = blocks.base_model.target.rows()
    z = rows[tokens] + sigma * normal(3, 8, 16).double()
    density = -(z[:, 1:, None] - rows).square().sum(-1) / (2 * sigma**2)
    level = torch.full((3,), sigma, dtype=torch.float64)
    found = blocks.logits(z, level, block=0, tokens=tokens)[:, 1:]
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.log_softmax(-1), (prior + density).log_softmax(-1))


def test_a_text_of_one_token_is_refused():
    with pytest.raises(ValueError, match="at least one token that is scored"):
        blocks_of("llama").loss({"tokens": torch.zeros(2, 1, dtype=torch.int64)}, 0)


# Likelihoods and text


@pytest.mark.parametrize("form", FORMS)
def test_likelihoods(form):
    blocks = shaken(any_blocks_of("llama", **FORMS[form]))
    tokens = batch_of("llama")["tokens"]
    z = 80 * torch.randn(3, 8, 16, generator=seeded())
    each = [blocks.logits(z, 80.0, block=b, tokens=tokens).log_softmax(-1) for b in range(2)]
    product = ((each[0] + each[1]) / 2).log_softmax(-1)
    for found, logp in (
        (next_token_nll(blocks, tokens, generator=seeded()), each[0]),
        (product_nll(blocks, tokens, generator=seeded()), product),
    ):
        torch.testing.assert_close(found, -logp.gather(2, tokens[..., None])[:, 1:, 0])
    bound = denoising_bound(blocks, tokens, generator=seeded())
    assert bound.nll.shape == (3, 7)
    assert bound.nll.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_the_product_of_one_block_is_that_block(form):
    blocks, tokens = shaken(any_blocks_of("gpt2", 1, **FORMS[form])), batch_of("gpt2")["tokens"]
    one, product = (f(blocks, tokens, generator=seeded()) for f in (next_token_nll, product_nll))
    torch.testing.assert_close(one, product)


@pytest.mark.parametrize("shared", ["train", "private"])
@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_is_what_is_scored(form, product, shared):
    """Log-probabilities token by token, of ragged prompts, against one call over the whole text."""
    blocks = shaken(any_blocks_of("llama", config={"shared": shared}, **FORMS[form]))
    lengths, new, single = [4, 2], 3, form == "single"
    slots = Slots(lengths, 4 + new, torch.device("cpu"))
    rows = WholeRows(blocks, slots)
    writer = (
        ProductWriter(blocks, rows)
        if product
        else StepWriter(blocks, rows, torch.tensor([80.0]), [0])
    )
    tokens, noise = batch_of("llama", 2)["tokens"][:, : 4 + new], normal(2, *writer.noise_shape)
    with torch.no_grad():
        for j in range(new):
            found = writer.next_logits(tokens[:, : 4 + j], noise, j)[:, 0].log_softmax(-1)
            for n, length in enumerate(lengths):
                whole = torch.cat([tokens[n, :length], tokens[n, 4:]])[None]
                place = length + j
                z = torch.zeros(1, whole.shape[1], 16)
                if single:
                    z[0] = 80 * noise[n, : whole.shape[1]]
                else:
                    z[0, place] = 80 * noise[n, j]
                if product:
                    expected = product_logits(blocks, z, tokens=whole)
                else:
                    expected = blocks.logits(z, 80.0, block=0, tokens=whole).log_softmax(-1)
                torch.testing.assert_close(found[n], expected[0, place], rtol=1e-4, atol=1e-4)


def test_known_rows_are_at_the_top_level_of_their_block():
    """Of blocks without a top share, by Euler steps; against calls with a level for each row."""
    blocks = shaken(blocks_of("llama", config={"top_share": 0.0}))
    schedule, tokens = blocks.config.schedule, batch_of("llama", 1)["tokens"][:, :5]
    sigmas = schedule.steps(4)
    owners = schedule.block_of(sigmas, 2).tolist()
    assert owners == [0, 0, 1, 1]
    rows = WholeRows(blocks, Slots([5], 6, torch.device("cpu")))
    writer = StepWriter(blocks, rows, sigmas, owners)
    noise = normal(1, *writer.noise_shape)
    with torch.no_grad():
        found = writer.next_logits(tokens, noise, 0)[0, 0]
        z, rows = 80 * noise[:, 5:6], blocks.base_model.target.rows()
        whole = torch.cat([tokens, tokens[:, :1]], dim=1)
        for i, (sigma, block) in enumerate(zip(sigmas.tolist(), owners, strict=True)):
            top = schedule.boundaries(2)[block].item()
            held = top * noise[:, :5] + (rows[tokens] if block else 0)
            levels = torch.tensor([[top] * 5 + [sigma]])
            logits = blocks.logits(torch.cat([held, z], 1), levels, block=block, tokens=whole)
            if i < 3:
                ratio = sigmas[i + 1].item() / sigma
                z = ratio * z + (1 - ratio) * (logits.softmax(-1) @ rows)[:, -1:]
    torch.testing.assert_close(found, logits[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CAUSAL)
def test_text_is_written_without_a_cache(kind):
    blocks = shaken(blocks_of(kind))
    options = {"max_new_tokens": 3, "cache": False}
    for how in ({"num_steps": 1}, {"num_steps": 4}, {"product": True}):
        both = generate(blocks, [[5, 6, 7, 8], [9, 10]], **options, **how, generator=seeded())
        assert [len(row) for row in both] == [3, 3]
        other = generate(blocks, [[5], [9, 10]], **options, **how, generator=seeded())
        assert other[1].equal(both[1])


def test_what_is_not_written():
    blocks = blocks_of("llama", config={"top_share": 0.0})
    with pytest.raises(ValueError, match=r"the product of blocks needs .* top_share"):
        generate(blocks, [[5]], max_new_tokens=3, cache=False, product=True)
