"""Likelihoods of padded texts, and texts filled in, are those of each text alone."""

import pytest
import torch
from masked_tools import blocks_of as masked_of

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.models import RecurrentLM
from dblocks.sampling import (
    bound_terms,
    denoising_bound,
    masked_likelihood,
    next_token_nll,
    product_nll,
    unmask,
)
from dblocks.schedules import MASKED
from lm_tools import SINGLE, lm_of, recurrent_of
from tools import DEVICE, randomized, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

T = 8
RANGES = ((0, 8), (4, 8), (0, 4), (2, 6))
MASK = torch.tensor([[int(a <= j < b) for j in range(T)] for a, b in RANGES], device=DEVICE)
TOKENS = torch.randint(11, (4, T), generator=seeded()).to(DEVICE)
HOLES = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]], device=DEVICE).expand(4, T)


def blocks_of(lm):
    return DiffusionBlocks(randomized(lm), BlocksConfig(2, top_share=0.6))


MODELS = {
    "single": lambda: blocks_of(lm_of(**SINGLE)),
    "doubled": lambda: blocks_of(lm_of()),
    "four at once": lambda: blocks_of(lm_of(tokens_per_block=4, tokens_per_sigma=4)),
    "recurrent": lambda: blocks_of(recurrent_of(**SINGLE)),
    "plain": lambda: randomized(lm_of()),
    "plain recurrent": lambda: randomized(recurrent_of()),
}


def alike(monkeypatch):
    """Random numbers that depend on a token's place in its row alone, from now on."""
    uniform, normal = torch.rand(T, generator=seeded()), torch.randn(T, 64, generator=seeded())

    def rand(*shape, **options):
        return uniform[: shape[-1]].expand(shape)

    def randn(*shape, **options):
        shape = shape[0] if len(shape) == 1 else shape
        return normal[: shape[-2], : shape[-1]].expand(shape)

    monkeypatch.setattr(torch, "rand", rand)
    monkeypatch.setattr(torch, "randn", randn)
    monkeypatch.setattr(RecurrentLM, "_drawn", lambda lm, t, _: randn(*t.shape, lm.config.width))


def check_alone(found, of):
    """Values [N, T - 1] of padded texts are those of each; and 0 elsewhere."""
    for n, (a, b) in enumerate(RANGES):
        torch.testing.assert_close(found[n, a : b - 1], of(n, a, b), rtol=1e-4, atol=1e-4)
        rest = found[n].clone()
        rest[a : b - 1] = 0
        assert not rest.any()


@pytest.mark.parametrize("name", MODELS)
def test_likelihoods_are_those_of_texts_alone(name, monkeypatch):
    model = MODELS[name]()
    alike(monkeypatch)
    prices = [next_token_nll]
    if "plain" not in name:
        prices += [product_nll, lambda *a, **k: denoising_bound(*a, **k).nll]
    for price in prices:
        for mask in (MASK, MASK.bool(), MASK.float()) if name == "plain" else (MASK,):
            found = price(model, TOKENS, attention_mask=mask)
            check_alone(found, lambda n, a, b, p=price: p(model, TOKENS[n : n + 1, a:b])[0])
        # Whatever stands at padding.
        other = torch.where(MASK == 1, TOKENS, 10 - TOKENS)
        torch.testing.assert_close(price(model, other, attention_mask=MASK), found)


def test_parts_and_means_of_a_bound(monkeypatch):
    model = MODELS["four at once"]()
    alike(monkeypatch)
    bound = denoising_bound(model, TOKENS, attention_mask=MASK)
    alone = [denoising_bound(model, TOKENS[n : n + 1, a:b]) for n, (a, b) in enumerate(RANGES)]
    check_alone(bound.variance, lambda n, a, b: alone[n].variance[0])
    for block in range(2):
        check_alone(bound.by_block[block], lambda n, a, b, i=block: alone[n].by_block[i, 0])
    assert bound.scored.sum() == sum(b - a - 1 for a, b in RANGES)
    mean = sum(part.nll.sum() for part in alone) / bound.scored.sum()
    assert bound.mean()[0] == pytest.approx(mean.item(), rel=1e-4)
    # Padding is in no mean, even where it is asked for.
    assert bound.mean(torch.ones_like(bound.scored)) == bound.mean()
    whole = denoising_bound(model, TOKENS)
    assert whole.scored.all()
    assert whole.mean()[0] == pytest.approx(whole.nll.mean().item(), rel=1e-5)


def masks_like(starts, base, monkeypatch):
    """Uniform numbers of masks that depend on a token's place in its text alone."""

    def uniforms(shape, seed, device, offset):
        N, length = shape
        rows = [base.roll(int(s))[:length] for s in starts[:N]]
        return torch.stack(rows).to(device)

    monkeypatch.setattr(masked_likelihood, "uniforms", uniforms)


@pytest.mark.parametrize("options", [{}, {"conditioning": "none", "tied": False}])
def test_bounds_of_masked_texts_are_those_of_texts_alone(options, monkeypatch):
    model, base = masked_of(3, **options), torch.rand(T, generator=seeded())
    masks_like([a for a, _ in RANGES], base, monkeypatch)
    scored = torch.rand(4, T, generator=seeded(5)).to(DEVICE) < 0.8
    for kept in (None, scored):
        found = bound_terms(model, TOKENS, scored=kept, batch_size=4, attention_mask=MASK)
        assert found.nats.shape == (4, 12)
        for n, (a, b) in enumerate(RANGES):
            masks_like([0], base, monkeypatch)
            part = None if kept is None else kept[n : n + 1, a:b]
            alone = bound_terms(model, TOKENS[n : n + 1, a:b], scored=part)
            torch.testing.assert_close(found.nats[n], alone.nats[0], rtol=1e-4, atol=1e-4)
        masks_like([a for a, _ in RANGES], base, monkeypatch)


def test_parts_of_a_batch_have_their_own_padding():
    model = masked_of(3)
    found = bound_terms(model, TOKENS, batch_size=1, attention_mask=MASK).nats
    whole = bound_terms(model, TOKENS, batch_size=4, attention_mask=MASK).nats
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share_of", ["tokens", "gaps"])
def test_what_is_unmasked_is_that_of_texts_alone(share_of):
    model = masked_of(3)
    gaps = torch.rand(4, T, generator=seeded(3)).to(DEVICE) < 0.7
    tokens = TOKENS.masked_fill(gaps, MASKED)
    options = {"num_steps": 5, "share_of": share_of}
    for mask in (MASK, MASK.bool()):
        found = unmask(model, tokens, **options, attention_mask=mask, generator=seeded()).tokens
        assert torch.equal(found[MASK == 0], tokens[MASK == 0])
        assert not (found[MASK == 1] == MASKED).any()
        for n, (a, b) in enumerate(RANGES):
            # In the same row, as what is drawn depends on it.
            text = tokens[n : n + 1, a:b].expand(4, -1)
            alone = unmask(model, text, **options, generator=seeded()).tokens
            assert torch.equal(found[n, a:b], alone[n])
    # By default, as many steps as the longest text is long.
    masked = torch.full((2, T), MASKED, device=DEVICE)
    steps = []
    unmask(model, masked, attention_mask=MASK[1:3], callback=steps.append, generator=seeded())
    assert len(steps) == 4


def test_padding_in_training_changes_nothing():
    model = masked_of(2)
    z = torch.where(torch.rand(4, T, generator=seeded(3)).to(DEVICE) < 0.5, MASKED, TOKENS)
    for n, (a, b) in enumerate(RANGES):
        padded = model.logits(z, 0.5, block=0, attention_mask=MASK)[n, a:b]
        alone = model.logits(z[n : n + 1, a:b], 0.5, block=0)[0]
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)
    batch = {"tokens": TOKENS, "attention_mask": MASK}
    found = model.loss(batch, 0, generator=seeded())
    other = {**batch, "tokens": torch.where(MASK == 1, TOKENS, 10 - TOKENS)}
    torch.testing.assert_close(model.loss(other, 0, generator=seeded()).loss, found.loss)
    scored = model.loss({"tokens": TOKENS, "loss_mask": MASK.bool()}, 0, generator=seeded())
    assert not torch.allclose(scored.loss, found.loss)


@pytest.mark.parametrize(
    ("mask", "message"),
    [(HOLES, "no holes"), (MASK[:, None, None] * MASK[:, None, :, None], "each text a row of its"),
     (0 * MASK, "no row of padding"), (MASK[:, :5], "the shape of the tokens"),
     (MASK[0], r"got \[8\]; give each text a row"), ((1 - MASK.float()) * -1e9, "0 or 1")],
)  # fmt: skip
def test_masks_are_checked(mask, message):
    lm, masked = MODELS["single"](), masked_of(2)
    calls = [lambda call=call: call(lm, TOKENS, attention_mask=mask)
             for call in (next_token_nll, product_nll, denoising_bound)]  # fmt: skip
    calls += [lambda call=call: call(masked, TOKENS, attention_mask=mask)
              for call in (bound_terms, unmask)]  # fmt: skip
    calls += [lambda: masked.logits(TOKENS, 0.5, block=0, attention_mask=mask)]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_blocks_of_tokens_end_with_texts():
    model, mask = MODELS["four at once"](), MASK.clone()
    mask[3, 5] = 0
    with pytest.raises(
        ValueError, match=r"must be multiples of tokens_per_block=4, got \[8, 4, 4, 3\]"
    ):
        next_token_nll(model, TOKENS, attention_mask=mask)
