import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from masked_tools import blocks_of, distribution_of, exact_of, independent_of, lm_of, tokens_of

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.recipes.data.text import Text
from dblocks.recipes.data.windows import consecutive_windows
from dblocks.recipes.metrics.masked import bits_per_character
from dblocks.sampling import bound_terms, points_for
from dblocks.schedules import MASKED, MaskSchedule
from dblocks.schedules.mask import DRAWS, KINDS
from tools import DEVICE, seeded, vit


def exact_bound(model, x, schedule, block, num_blocks):
    """The expected weighted loss of a block on a sequence: all masks, and quadrature over draws."""
    low, high = schedule.range_of(block, num_blocks)
    nodes, w = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(30))
    unit, w = (nodes + 1) / 2, w / 2
    if schedule.draw == "t":
        t = low + (high - low) * unit
    else:
        first, last = schedule.masked(torch.tensor([low, high], dtype=torch.float64))
        t = schedule.time_at(first + (last - first) * unit)
    weight, m, T = schedule.loss_weight(t, block, num_blocks), schedule.masked(t), len(x)
    expected = torch.zeros_like(t)
    for mask in itertools.product((False, True), repeat=T):
        mask = torch.tensor(mask, device=DEVICE)
        z = torch.where(mask, MASKED, x)[None]
        logits = model.logits(z, t[len(t) // 2], block=block)
        cost = nnf.cross_entropy(logits[0], x, reduction="none")[mask].sum().cpu()
        k = int(mask.sum())
        expected += m**k * (1 - m) ** (T - k) * cost
    return (w * weight * expected).sum().item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draw", DRAWS)
def test_the_bounds_of_the_blocks_sum_to_the_whole(kind, draw):
    """Under the exact posterior the bound is tight: -ln p of every sequence."""
    p, schedule = distribution_of(2, 3), MaskSchedule(kind, draw)
    x = torch.tensor([1, 0, 1], device=DEVICE)
    whole = exact_bound(exact_of(p, 1, schedule), x, schedule, 0, 1)
    parts = [exact_bound(exact_of(p, 3, schedule), x, schedule, b, 3) for b in range(3)]
    assert sum(parts) == pytest.approx(whole, rel=1e-5)
    assert whole == pytest.approx(-math.log(p[1, 0, 1]), rel=1e-5)
    assert min(parts) > 0.05 * whole


def test_the_training_loss_is_the_block_s_part_of_the_bound():
    """Its mean over many draws, within five standard errors."""
    p, schedule = distribution_of(2, 3), MaskSchedule("cosine", "t")
    model, N = exact_of(p, 3, schedule), 4096
    x = torch.tensor([0, 1, 1], device=DEVICE)
    for block in range(3):
        result = model.loss({"tokens": x.expand(N, 3)}, block, generator=seeded())
        each = 3 * (result.weight * result.losses).double()
        exact = exact_bound(exact_of(p, 3, schedule), x, schedule, block, 3)
        assert abs(each.mean().item() - exact) < 5 * each.std().item() / math.sqrt(N)


def uniform_model(num_blocks):
    model = blocks_of(num_blocks)
    with torch.no_grad():
        model.base_model.embedding.weight.zero_()  # so all logits are 0
    return model


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_a_uniform_model_needs_log2_of_the_vocabulary(num_blocks):
    text = Text(tokens_of(1, 4000)[0].cpu(), 4000)
    found = bits_per_character(uniform_model(num_blocks), text, 12)
    assert found.bits == pytest.approx(math.log2(11), abs=4 * found.error)
    assert found.error < 0.05
    halved = bits_per_character(uniform_model(num_blocks), Text(text.tokens, 8000), 12)
    assert halved.bits == pytest.approx(found.bits / 2)
    assert halved.error == pytest.approx(found.error / 2)


def test_an_independent_source_costs_its_entropy_under_the_exact_posterior():
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    tokens = torch.multinomial(p, 6000, replacement=True, generator=seeded())
    found = bits_per_character(exact_of(independent_of(p, 4)), Text(tokens, 6000), 4)
    entropy = -(p * p.log2()).sum().item()
    assert found.bits == pytest.approx(entropy, abs=4 * found.error)
    assert found.error < 0.05
    for _, bits in found.by_ratio:
        assert bits == pytest.approx(entropy, abs=0.5)


def test_a_dependent_source_costs_its_entropy_under_the_exact_posterior():
    p, N = distribution_of(2, 3), 1500
    drawn = torch.multinomial(p.flatten(), N, replacement=True, generator=seeded())
    tokens = torch.stack([drawn // 4, drawn // 2 % 2, drawn % 2], 1).to(DEVICE)
    nats = bound_terms(exact_of(p), tokens, points=24).nats.sum(1)
    entropy = -(p * p.log()).sum().item()
    assert nats.mean().item() == pytest.approx(entropy, abs=4 * nats.std().item() / math.sqrt(N))


def test_each_point_runs_its_owner_and_does_not_depend_on_the_batch():
    model, tokens, ran = blocks_of(3), tokens_of(5), []
    for k, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *a, k=k: ran.append(k // 2))
    terms = bound_terms(model, tokens, points=6)
    assert ran == [2] * 4 + [1] * 4 + [0] * 4  # two layers a point, from few masks to many
    assert terms.shares.tolist() == pytest.approx([(k + 0.5) / 6 for k in range(6)])
    parts = bound_terms(model, tokens, points=6, batch_size=2)
    torch.testing.assert_close(parts.nats, terms.nats, rtol=1e-5, atol=1e-5)
    assert not torch.equal(bound_terms(model, tokens, points=6, seed=1).nats, terms.nats)
    other = DiffusionBlocks(
        model.base_model, BlocksConfig(3, schedule=MaskSchedule("poly2"), overlap=0.3)
    )
    again = bound_terms(other, tokens, points=6)
    torch.testing.assert_close(again.nats, terms.nats, rtol=1e-4, atol=1e-4)


def test_given_tokens_are_never_masked():
    model, tokens = blocks_of(1), tokens_of(4)
    scored = torch.zeros_like(tokens, dtype=torch.bool)
    assert bound_terms(model, tokens, scored=scored).nats.abs().max() == 0
    seen = []
    run = model.base_model.run_layers
    model.base_model.run_layers = lambda layers, z, *a: seen.append(z) or run(layers, z, *a)
    scored[:, 2:] = True
    bound_terms(model, tokens, scored=scored)
    assert all(torch.equal(z[:, :2], tokens[:, :2]) for z in seen)
    assert any((z == MASKED).any() for z in seen)


def test_windows_score_every_token_once():
    for length in (4, 5, 10):
        tokens, scored = consecutive_windows(torch.arange(10), length)
        assert tokens[scored].tolist() == [*range(10)]
        assert torch.equal(tokens - tokens[:, :1], torch.arange(length).expand_as(tokens))


def test_some_windows_are_spread_over_the_text():
    text = Text(torch.arange(11).repeat(40), 440)
    found = bits_per_character(uniform_model(1), text, 11, windows=7)
    assert found.bits == pytest.approx(math.log2(11), abs=1)
    assert found.bits != bits_per_character(uniform_model(1), text, 11).bits


def test_arguments_are_checked():
    assert [points_for(b) for b in (1, 3, 5, 12, 13)] == [12, 12, 15, 12, 13]
    with pytest.raises(ValueError, match=r"points must be a multiple of .* blocks, 3, got 4"):
        bound_terms(blocks_of(3), tokens_of(), points=4)
    with pytest.raises(TypeError, match="blocks with a MaskSchedule, got a NoiseSchedule"):
        bound_terms(DiffusionBlocks(vit(), BlocksConfig(2)), tokens_of())
    with pytest.raises(ValueError, match=r"loss_kind of MaskedLM must be one of .*'l2'"):
        DiffusionBlocks(lm_of(), BlocksConfig(2))
    with pytest.raises(ValueError, match="got 'cross_entropy'; tokens that are masked need a Mask"):
        DiffusionBlocks(vit(), BlocksConfig(2, schedule=MaskSchedule()))


def test_a_batch_of_no_text_is_refused():
    model = blocks_of()
    with pytest.raises(ValueError, match=r"with at least one token, got shape \[0, 5\]"):
        bound_terms(model, torch.zeros(0, 5, dtype=torch.int64, device=DEVICE))
