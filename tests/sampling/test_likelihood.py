import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.models import CausalLM, CausalLMConfig
from dblocks.models.language_model import Hidden
from dblocks.sampling import denoising_bound, next_token_nll, product_nll
from dblocks.sampling.likelihood import _variance
from dblocks.schedules import NoiseSchedule
from lm_tools import SINGLE, blocks_of, lm_of, recurrent_blocks_of, recurrent_of, tokens_of
from tools import DEVICE, randomized, seeded, vit

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {**SINGLE, "depth": 3, "context": 32}


def model_of(k=1, top_share=0.6, num_blocks=3, **options):
    lm = lm_of(**{**SMALL, "tokens_per_block": k, "tokens_per_sigma": k, **options})
    return DiffusionBlocks(randomized(lm), BlocksConfig(num_blocks, top_share=top_share))


# Exact figures


def test_what_the_plain_model_pays_for_tokens():
    lm, tokens = randomized(lm_of()), tokens_of(3, 7)
    nll = next_token_nll(lm, tokens)
    assert nll.shape == (3, 6)
    torch.testing.assert_close(nll.mean(), lm.next_token_loss({"tokens": tokens}))
    assert torch.equal(nll, next_token_nll(lm, tokens, num_steps=1))
    with pytest.raises(ValueError, match=r"num_steps must be 1 or None for a plain .* got 3"):
        next_token_nll(lm, tokens, num_steps=3)


MODELS = {
    "single": lambda: model_of(),
    "published": lambda: blocks_of(),
    "blocks of tokens": lambda: model_of(4, rows="doubled"),
    "one block": lambda: model_of(4, num_blocks=1, top_share=0.0),
    "recurrent": lambda: recurrent_blocks_of(**SINGLE),
    "plain": lambda: randomized(lm_of()),
    "plain recurrent": lambda: randomized(recurrent_of()),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("price", [next_token_nll, product_nll])
def test_the_prices_of_all_tokens_make_a_distribution(name, price):
    if "plain" in name and price is product_nll:
        return
    model, tokens = MODELS[name](), tokens_of(3, 8)
    nll = price(model, tokens, generator=seeded())
    assert nll.shape == (3, 7)
    assert nll.dtype == torch.float32
    assert torch.equal(nll, price(model, tokens, generator=seeded()))
    prices = []
    for token in range(11):
        # A token's price does not depend on itself.
        other = tokens.clone()
        other[:, -1] = token
        prices.append(price(model, other, generator=seeded())[:, -1])
    torch.testing.assert_close((-torch.stack(prices)).exp().sum(0), torch.ones(3, device=DEVICE))


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_plain_recurrent_model_takes_recurrences(num_steps):
    lm, tokens = randomized(recurrent_of()), tokens_of(3, 7)
    got = next_token_nll(lm, tokens, num_steps=num_steps, generator=seeded())
    logits = lm(tokens, num_recurrences=num_steps, generator=seeded())[:, :-1]
    expected = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(got, expected)
    by_default = next_token_nll(lm, tokens, generator=seeded())
    assert torch.equal(by_default, next_token_nll(lm, tokens, num_steps=5, generator=seeded()))


@pytest.mark.parametrize("num_steps", [0, 2, 3])
@pytest.mark.parametrize("make", [model_of, blocks_of, recurrent_blocks_of])
def test_several_steps_have_no_likelihood(make, num_steps):
    with pytest.raises(ValueError, match=rf"num_steps must be 1 or None in blocks, .* {num_steps}"):
        next_token_nll(make(), tokens_of(), num_steps=num_steps)
    one = next_token_nll(make(), tokens_of(), num_steps=1, generator=seeded())
    assert torch.equal(one, next_token_nll(make(), tokens_of(), generator=seeded()))


@pytest.mark.parametrize("k", [1, 4])
def test_in_blocks_it_is_the_first_one_at_the_top(k):
    model, tokens = model_of(k), tokens_of(3, 8)
    z = 80 * torch.randn(3, 8, 16, generator=seeded()).to(DEVICE)
    logits = [model.logits(z, 80.0, block=b, tokens=tokens).double() for b in range(3)]
    labels = tokens[:, 1:, None]
    one = -logits[0].log_softmax(-1)[:, 1:].gather(-1, labels)[..., 0]
    got = next_token_nll(model, tokens, generator=seeded())
    torch.testing.assert_close(got.double(), one, rtol=1e-5, atol=1e-5)
    # The product: the mean of the blocks' log-probabilities, normalised.
    mean = torch.stack([row.log_softmax(-1) for row in logits]).mean(0)
    p = mean.exp() / mean.exp().sum(-1, keepdim=True)
    got = product_nll(model, tokens, generator=seeded())
    expected = -p.log()[:, 1:].gather(-1, labels)[..., 0]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_share", [0.0, 0.6])
def test_the_product_of_one_block_is_that_block(top_share):
    model = model_of(num_blocks=1, top_share=top_share)
    one, product = (
        f(model, tokens_of(), generator=seeded()) for f in (next_token_nll, product_nll)
    )
    torch.testing.assert_close(one, product)


# The bound


class Fixed(CausalLM):
    """Whatever the text and the noise, the prediction without the noisy embedding is one prior."""

    def run_layers(self, layers, z_in, level, condition):
        return Hidden(torch.ones_like(z_in), None)


def fixed_at(prior, k):
    torch.manual_seed(0)
    config = CausalLMConfig(
        vocab_size=11, context=128, width=32, heads=2, depth=3, tied=False, conditioning="none",
        tokens_per_block=k, tokens_per_sigma=k,
    )  # fmt: skip
    lm = Fixed(config).to(DEVICE)
    lm.output_head.weight.data = prior[:, None].expand(11, 32) / 32
    return DiffusionBlocks(lm, BlocksConfig(3))


@pytest.mark.parametrize(("spread", "k"), [(1.0, 4), (2.0, 1)])
def test_the_bound_of_a_fixed_prior_is_its_cross_entropy(spread, k):
    """Bayes' rule is the best denoiser, whose bound is no bound but the likelihood."""
    prior = (spread * torch.randn(11, generator=seeded(1))).log_softmax(0).to(DEVICE)
    # Not of the prior itself: the cross-entropy of these tokens is another number.
    tokens = torch.randint(11, (64, 128), generator=seeded(2)).to(DEVICE) % 7
    bound = denoising_bound(fixed_at(prior, k), tokens, draws=16, generator=seeded(3))
    mean, error = bound.mean()
    exact = -prior[tokens[:, 1:]].mean().item()
    assert abs(mean - exact) < min(4 * error, 0.03)
    # And so for each token, not on the average alone.
    for token in (0, 6):
        of_it = tokens[:, 1:] == token
        mean, error = bound.mean(of_it)
        assert abs(mean + prior[token].item()) < 4 * error


@pytest.mark.parametrize(("head", "k"), [("posterior", 1), ("learned", 16)])
def test_the_standard_error_is_honest(head, k):
    """Tokens of a block share their levels, which must not be counted as so many draws."""
    model, tokens = model_of(k, head=head, depth=3), tokens_of(8, 32)
    generator = seeded()
    runs = [denoising_bound(model, tokens, generator=generator).mean() for _ in range(20)]
    means, errors = torch.tensor(runs, dtype=torch.float64).unbind(1)
    assert 0.5 < errors.mean() / means.std() < 3


@settings(max_examples=20)
@given(
    draws=st.integers(2, 5),
    k=st.integers(1, 5),
    rows=st.integers(1, 12),
)
def test_variances_are_of_the_sums_over_blocks_of_tokens(draws, k, rows):
    errors = torch.randn(draws, 2, rows, generator=seeded())
    got = _variance(errors, k)
    assert got.shape == (2, rows)
    of = torch.arange(1, rows + 1) // k
    for b in of.unique():
        sums = errors[:, :, of == b].sum(-1)
        expected = sums.diff(dim=0).square().sum(0) * draws / (2 * (draws - 1))
        shares = got[:, of == b]
        torch.testing.assert_close(shares.sum(-1), expected)
        torch.testing.assert_close(shares, shares[:, :1].expand_as(shares))


@pytest.mark.parametrize("options", [{}, {"k": 4}, {"rows": "doubled"}])
def test_tokens_of_no_rule_cost_their_entropy_at_least(options):
    """No bound, and no exact figure, is below what the source of the tokens allows."""
    model = model_of(**options)
    tokens = tokens_of(32, 32)
    mean, error = denoising_bound(model, tokens, draws=4, generator=seeded()).mean()
    assert mean > math.log(11) - 4 * error
    for price in (next_token_nll, product_nll):
        nll = price(model, tokens, generator=seeded())
        assert nll.mean() > math.log(11) - 4 * nll.std() / nll.numel() ** 0.5


def test_what_the_bound_is_made_of():
    model, tokens = model_of(), tokens_of(3, 8)
    bound = denoising_bound(model, tokens, generator=seeded())
    assert bound.nll.shape == bound.variance.shape == (3, 7)
    assert bound.by_block.shape == (3, 3, 7)
    assert all(part.dtype == torch.float32 for part in bound[:3])
    assert (bound.by_block >= 0).all()
    assert (bound.variance > 0).all()
    # Embeddings of norm 1, at sigma_max = 80; at sigma_min = .002 the token is known.
    rest = torch.full((3, 7), 1 / (2 * 80**2), device=DEVICE)
    torch.testing.assert_close(bound.nll - bound.by_block.sum(0), rest, rtol=0, atol=1e-4)
    again = denoising_bound(model, tokens, generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(bound, again, strict=True))
    scored = torch.rand(3, 7, generator=seeded()).to(DEVICE) < 0.5
    mean, error = bound.mean(scored)
    assert mean == pytest.approx(bound.nll[scored].double().mean().item())
    deviation = bound.variance[scored].double().sum().sqrt().item()
    assert error == pytest.approx(deviation / scored.sum().item())


@pytest.mark.parametrize("k", [1, 4])
def test_each_level_is_called_of_the_block_that_owns_it(k):
    """Draws are stratified, tokens of a block share their level, `top_share` has no part in it."""
    model, seen = model_of(k, top_share=1.0), []
    forward = model.forward

    def recorded(z, sigma, *, block, **cond):
        seen.append((block, sigma))
        return forward(z, sigma, block=block, **cond)

    model.forward = recorded
    denoising_bound(model, tokens_of(2, 12), draws=3, generator=seeded())
    assert [block for block, _ in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    ends = NoiseSchedule().boundaries(3).log()
    for number, (block, sigma) in enumerate(seen):
        high, low = ends[block].item(), ends[block + 1].item()
        place = (sigma.double().log().cpu() - low) / (high - low) * 3 - number % 3
        assert ((place > -1e-4) & (place < 1 + 1e-4)).all()
        assert torch.equal(sigma, sigma[:, ::k].repeat_interleave(k, 1))
        assert len(sigma.unique()) == 2 * 12 // k


def test_levels_may_be_whole_numbers():
    schedule = NoiseSchedule(sigma_min=1, sigma_max=80)
    model = DiffusionBlocks(model_of().base_model, BlocksConfig(3, schedule=schedule))
    for price in (next_token_nll, product_nll):
        assert price(model, tokens_of(), generator=seeded()).isfinite().all()
    bound = denoising_bound(model, tokens_of(), generator=seeded())
    assert bound.nll.isfinite().all()


# Errors


def test_a_mean_needs_a_token():
    bound = denoising_bound(model_of(), tokens_of(2, 4), generator=seeded())
    with pytest.raises(ValueError, match="at least one scored token, got none"):
        bound.mean(torch.zeros(2, 3, dtype=torch.bool))
    alone = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]])  # of each text only the first token
    bound = denoising_bound(model_of(), tokens_of(2, 4), generator=seeded(), attention_mask=alone)
    with pytest.raises(ValueError, match="at least one scored token, got none"):
        bound.mean()


@pytest.mark.parametrize("price", [next_token_nll, product_nll, denoising_bound])
def test_only_language_models_have_tokens(price):
    tokens = tokens_of(2, 8)
    with pytest.raises(TypeError, match=r"the DiffusionBlocks of .*, got Linear; "):
        price(torch.nn.Linear(2, 2), tokens)
    with pytest.raises(
        TypeError, match=r"the DiffusionBlocks of a language model, .* of a ViT; see"
    ):
        price(DiffusionBlocks(vit(), BlocksConfig(3)), tokens)


@pytest.mark.parametrize("price", [product_nll, denoising_bound])
def test_a_plain_model_has_no_blocks(price):
    with pytest.raises(TypeError, match="got CausalLM; next_token_nll takes a plain model too"):
        price(lm_of(), tokens_of())


def test_the_product_needs_blocks_that_were_trained_at_the_top():
    with pytest.raises(
        ValueError, match=r"got BlocksConfig\.top_share = 0; train with a top_share"
    ):
        product_nll(model_of(top_share=0.0), tokens_of())


@pytest.mark.parametrize(
    ("draws", "message"),
    [(1, "at least 2, for the standard error, got 1"), (0, "draws must be a"), (2.5, "got 2.5")],
)
def test_draws_are_checked(draws, message):
    with pytest.raises(ValueError, match=message):
        denoising_bound(model_of(), tokens_of(), draws=draws)


@pytest.mark.parametrize("name", ["single", "plain", "recurrent", "plain recurrent"])
@pytest.mark.parametrize("price", [next_token_nll, product_nll, denoising_bound])
def test_a_batch_of_no_text_is_refused(name, price):
    if "plain" in name and price is not next_token_nll:
        return
    model = MODELS[name]()
    for shape in ((0, 5), (2, 0)):
        with pytest.raises(ValueError, match=r"tokens .* with at least one token, got shape"):
            price(model, tokens_of(3, 8).new_zeros(shape))
    # Of a single token none is scored.
    with pytest.raises(ValueError, match=r"must have at least 2 tokens, .* got 1; leave such"):
        price(model, tokens_of(3, 1))


@pytest.mark.parametrize("price", [next_token_nll, product_nll, denoising_bound])
def test_texts_are_a_tensor(price):
    with pytest.raises(TypeError, match=r"tokens must be an int64 tensor \[N, T\], got list; make"):
        price(model_of(), tokens_of(2, 8).tolist())
