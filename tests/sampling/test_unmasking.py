import math

import pytest
import torch
from masked_tools import blocks_of, distribution_of, exact_of, independent_of, lm_of, tokens_of
from scipy import stats

from dblocks.sampling import unmask
from dblocks.schedules import MASKED, MaskSchedule
from tools import DEVICE, seeded, vit

masks = lambda n=2, length=8: torch.full((n, length), MASKED, device=DEVICE)


def counts_of(tokens, V):
    """How often each sequence occurs, [V**T]."""
    digits = V ** torch.arange(tokens.shape[1]).flip(0)
    return (tokens.cpu() * digits).sum(1).bincount(minlength=V ** tokens.shape[1])


# What is written


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_independent_tokens_come_as_they_should_in_any_number_of_steps(kind):
    p = independent_of(torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64), 2)
    model, N = exact_of(p, 2, MaskSchedule(kind)), 3000
    written = unmask(model, masks(N, 2), num_steps=3, generator=seeded())
    found = stats.chisquare(counts_of(written.tokens, 3), (N * p).flatten())
    assert found.pvalue > 1e-4


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_a_known_distribution_is_reproduced(num_blocks):
    """Only tokens unmasked in one step are drawn as if independent: in n steps that happens with
    probability at most T(T-1)/2n, which bounds the bias; the rest is McDiarmid's inequality."""
    p, N, T, n = distribution_of(2, 3), 4000, 3, 120
    written = unmask(exact_of(p, num_blocks), masks(N, T), num_steps=n, generator=seeded())
    distance = (counts_of(written.tokens, 2) / N - p.flatten()).abs().sum() / 2
    chance = math.sqrt(p.numel() / N) / 2 + math.sqrt(math.log(1e4) / (2 * N))
    assert distance < T * (T - 1) / 2 / n + chance
    uniform = torch.full_like(p, 1 / p.numel())
    assert (p - uniform).abs().sum() / 2 > 3 * (T * (T - 1) / 2 / n + chance)  # it could fail


def test_one_step_draws_all_tokens_as_if_independent():
    p, N = distribution_of(2, 2), 4000
    written = unmask(exact_of(p, 1), masks(N, 2), num_steps=1, generator=seeded())
    product = p.sum(1)[:, None] * p.sum(0)
    found = stats.chisquare(counts_of(written.tokens, 2), (N * product).flatten())
    assert found.pvalue > 1e-4
    assert written.calls == (1,)


def test_gaps_are_filled_by_the_posterior():
    p, N = distribution_of(3, 2), 3000
    z = masks(N, 2)
    z[:, 0] = 1
    written = unmask(exact_of(p, 3), z, generator=seeded())
    posterior = p[1] / p[1].sum()
    found = stats.chisquare(written.tokens[:, 1].bincount(minlength=3).cpu(), N * posterior)
    assert found.pvalue > 1e-4


def test_what_is_given_never_changes():
    model, z = blocks_of(), tokens_of(3, 8)
    z[0, 2:5] = z[1, ::2] = MASKED
    before, seen = z.clone(), []
    given = z != MASKED

    def look(state):
        seen.append(state["i"])
        assert torch.equal(state["tokens"][given], before[given])
        assert state["num_steps"] == 6

    written = unmask(model, z, num_steps=6, generator=seeded(), callback=look)
    assert seen == [*range(6)]
    assert torch.equal(z, before)  # the argument is left alone
    assert torch.equal(written.tokens[given], before[given])
    assert ((written.tokens >= 0) & (written.tokens < 11)).all()


def test_nothing_to_write_calls_nothing():
    z = tokens_of()
    written = unmask(blocks_of(), z)
    assert torch.equal(written.tokens, z)
    assert written.calls == written.rows == (0, 0, 0)
    assert unmask(blocks_of(), masks(0)).tokens.shape == (0, 8)


def test_a_text_depends_on_its_place_and_the_generator_only():
    model = blocks_of()
    first, again, other = (unmask(model, masks(3), generator=seeded(s)).tokens for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 3
    z = tokens_of(3)
    z[1] = MASKED
    assert torch.equal(unmask(model, z, generator=seeded()).tokens[1], first[1])
    assert torch.equal(unmask(model, masks(1), generator=seeded()).tokens[0], first[0])


def test_temperature_zero_takes_the_most_likely_token():
    p = independent_of(torch.tensor([0.2, 0.5, 0.3]), 3)
    model = exact_of(p)
    assert (unmask(model, masks(4, 3), temperature=0).tokens == 1).all()
    assert (unmask(model, masks(4, 3), top_k=1).tokens == 1).all()
    kept = unmask(model, masks(200, 3), top_p=0.6, generator=seeded()).tokens
    assert set(kept.flatten().tolist()) == {1, 2}


# What is run


def test_only_the_owner_of_each_time_runs():
    model, ran = blocks_of(), []
    for k, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *a, k=k: ran.append(k))
    steps = []
    written = unmask(
        model, masks(4, 12), num_steps=9, generator=seeded(),
        callback=lambda state: steps.append([*ran]) or ran.clear(),
    )  # fmt: skip
    owners = [i // 3 for i in range(9)]
    for block, layers in zip(owners, steps, strict=True):
        assert layers in ([], [2 * block, 2 * block + 1])
    called = [sum(bool(s) for s in steps[3 * b : 3 * b + 3]) for b in range(3)]
    assert list(written.calls) == called
    assert all(c <= r <= 4 * c for c, r in zip(written.calls, written.rows, strict=True))


def test_steps_that_unmask_nothing_are_skipped():
    written = unmask(blocks_of(), masks(1, 12), num_steps=500, generator=seeded())
    assert sum(written.calls) <= 12
    assert written.calls == written.rows
    many = unmask(blocks_of(), masks(50, 12), num_steps=500, generator=seeded())
    assert sum(many.rows) <= 50 * 12
    # On average a third of the tokens in each block: of 600, five standard deviations are 58.
    assert all(abs(rows - 200) < 60 for rows in many.rows)


def test_a_few_gaps_begin_in_the_last_block():
    z = tokens_of(1, 12)
    z[0, 3:6] = MASKED  # a quarter, and blocks have thirds
    written = unmask(blocks_of(), z, num_steps=12, generator=seeded())
    assert written.calls[:2] == (0, 0)
    assert written.calls[2] >= 1


def test_shares_of_gaps_begin_in_the_first_block():
    z = tokens_of(1, 12)
    z[0, :3] = MASKED
    written = unmask(blocks_of(3), z, share_of="gaps", generator=seeded())
    assert sum(written.calls) == 3  # a step a token, but for those that coincide
    assert written.calls[0] + written.calls[1] > 0
    assert unmask(blocks_of(3), z, generator=seeded()).calls[:2] == (0, 0)
    whole = masks(2, 12)
    one, other = (
        unmask(blocks_of(3), whole, share_of=of, generator=seeded()) for of in ("gaps", "tokens")
    )
    assert torch.equal(one.tokens, other.tokens)


def test_rows_in_different_blocks_run_apart():
    z = torch.cat([masks(1, 12), tokens_of(1, 12)])
    z[1, 3:5] = MASKED
    together = unmask(blocks_of(), z, num_steps=1, generator=seeded())
    assert together.calls == (1, 0, 1)
    alone = unmask(blocks_of(), masks(1, 12), num_steps=1, generator=seeded())
    assert torch.equal(together.tokens[0], alone.tokens[0])


# Arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_steps": 0}, ValueError, "number of steps must be a positive integer, got 0"),
        (
            {"spacing": "karras"},
            ValueError,
            "spacing must be 'equal_mass' or 'uniform', got 'karras'",
        ),
        ({"temperature": -1}, ValueError, "temperature must be a finite number >= 0, got -1"),
        ({"tokens": tokens_of() - 3}, ValueError, r"tokens must be in 0\.\.10, got -3"),
        ({"tokens": tokens_of() + 5}, ValueError, r"tokens must be in 0\.\.10, got"),
        ({"tokens": masks(1, 13)}, ValueError, "at most context=12 long, got 13"),
        ({"tokens": masks().float()}, TypeError, r"tokens must be int64, got torch\.float32"),
        ({"tokens": masks()[0]}, ValueError, r"tokens must have shape \[N, T\]"),
        ({"model": lm_of()}, TypeError, "the DiffusionBlocks of a MaskedLM, got a MaskedLM"),
        ({"model": vit()}, TypeError, "the DiffusionBlocks of a MaskedLM, got a ViT"),
    ],
)
def test_arguments_are_checked(change, error, message):
    with pytest.raises(error, match=message):
        unmask(**{"model": blocks_of(), "tokens": masks(), **change})
