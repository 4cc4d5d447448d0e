"""Likelihoods of packed documents, and of padded texts with positions of their own."""

import itertools

import pytest
import torch

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.sampling import denoising_bound, next_token_nll, product_nll
from lm_tools import SINGLE, lm_of, recurrent_of, tokens_of
from tools import DEVICE, randomized, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

ENDS = (0, 4, 12, 16)  # longer than the context of 12 together
TOKENS = tokens_of(1, 16, seed=2)
PACKED = torch.tensor(ENDS, dtype=torch.int32, device=DEVICE)
MODELS = {
    "single": lambda: lm_of(**SINGLE),
    "doubled": lm_of,
    "four at once": lambda: lm_of(tokens_per_block=4, tokens_per_sigma=4),
    "recurrent": lambda: recurrent_of(**SINGLE),
}


def blocks_of(name):
    return DiffusionBlocks(randomized(MODELS[name]()), BlocksConfig(2, top_share=0.6))


def by_place(monkeypatch):
    """Random numbers of each token that depend on its place in its document alone."""
    uniform, normal = torch.rand(16, generator=seeded()), torch.randn(16, 64, generator=seeded())
    places = [j for a, b in itertools.pairwise(ENDS) for j in range(b - a)]

    def rand(n, count, **options):
        row = uniform[places[::4]] if count == 4 else uniform[places]
        return row[:count].expand(n, -1)

    def randn(*shape, **options):
        n, length, width = shape[0] if len(shape) == 1 else shape
        row = normal[places] if length == 16 else normal
        return row[:length, :width].expand(n, -1, -1)

    monkeypatch.setattr(torch, "rand", rand)
    monkeypatch.setattr(torch, "randn", randn)


@pytest.mark.parametrize("name", ["single", "doubled", "recurrent"])
def test_documents_are_scored_as_each_alone(name, monkeypatch):
    model = blocks_of(name)
    by_place(monkeypatch)
    for price in (next_token_nll, product_nll):
        found = price(model, TOKENS, cu_seqlens=PACKED)[0]
        for a, b in itertools.pairwise(ENDS):
            alone = price(model, TOKENS[:, a:b])[0]
            torch.testing.assert_close(found[a : b - 1], alone, rtol=1e-4, atol=1e-4)
            assert a == 0 or found[a - 1] == 0


@pytest.mark.parametrize("name", MODELS)
def test_first_tokens_of_documents_are_in_no_bound(name):
    model = blocks_of(name)
    bound = denoising_bound(model, TOKENS, cu_seqlens=PACKED, generator=seeded())
    first = torch.tensor(ENDS[1:-1]) - 1
    for values in (bound.nll, bound.variance, *bound.by_block):
        assert not values[0, first].any()
    assert bound.scored.sum() == 13
    assert not bound.scored[0, first].any()
    assert bound.mean()[0] == pytest.approx(bound.nll.sum().item() / 13, rel=1e-4)
    if name == "four at once":
        # The three scored tokens of each document's first block have its whole variance.
        assert (bound.variance[0, 3:7] > 0).tolist() == [False, True, True, True]


def test_documents_have_no_padding():
    model = blocks_of("single")
    mask = torch.tensor([[0] * 2 + [1] * 14], device=DEVICE)
    for price in (next_token_nll, product_nll, denoising_bound):
        with pytest.raises(ValueError, match="attention_mask must be None with cu_seqlens"):
            price(model, TOKENS, cu_seqlens=PACKED, attention_mask=mask)


def test_the_row_that_is_wrong_is_named():
    mask = torch.ones(3, 8, device=DEVICE)
    mask[1, 2] = 2
    with pytest.raises(ValueError, match=r"got \[1.0, 1.0, 2.0, .* in row 1"):
        next_token_nll(blocks_of("single"), tokens_of(3), attention_mask=mask)
