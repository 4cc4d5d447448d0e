import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dblocks.blocks import BlocksConfig
from dblocks.schedules import MASKED, MaskSchedule, NoiseSchedule
from dblocks.schedules.mask import DRAWS, KINDS, T_MIN
from tools import DEVICE, seeded

kinds = st.sampled_from(KINDS)
draws = st.sampled_from(DRAWS)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def quadrature(low, high, n=40):
    """Gauss-Legendre nodes and weights on [low, high], float64 [n]."""
    import numpy as np

    x, w = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(n))
    return (low + high) / 2 + (high - low) / 2 * x, (high - low) / 2 * w


# alpha, its derivative and its inverse


def test_alpha_is_its_formula():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    formulas = {"linear": 1 - t, "poly2": 1 - t**2, "cosine": 1 - (math.pi / 2 * (1 - t)).cos()}
    for kind, alpha in formulas.items():
        schedule = MaskSchedule(kind)
        torch.testing.assert_close(schedule.alpha(t), alpha, rtol=0, atol=1e-15)
        torch.testing.assert_close(schedule.masked(t), 1 - alpha, rtol=0, atol=1e-15)
        assert schedule.alpha(double(0, 1)).tolist() == pytest.approx([1, 0], abs=1e-15)
        assert schedule.masked(double(0, 1)).tolist() == [0, 1]


@given(kind=kinds, t=st.floats(0, 1), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_time_is_the_inverse_of_the_mask_ratio(kind, t, dtype):
    schedule, eps = MaskSchedule(kind), torch.finfo(dtype).eps
    t = torch.tensor(t, dtype=dtype)
    share = schedule.masked(t)
    assert schedule.masked(schedule.time_at(share)) == pytest.approx(
        share.item(), rel=8 * eps, abs=torch.finfo(dtype).tiny
    )
    assert schedule.time_at(t).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_both_ends_are_without_cancellation(kind):
    schedule = MaskSchedule(kind)
    t = torch.tensor([1e-6, 1e-3])
    exact = schedule.masked(t.double())
    torch.testing.assert_close(schedule.masked(t).double(), exact, rtol=4e-7, atol=0)
    near_one = torch.tensor([1 - 2**-20, 1 - 2**-10])
    exact = schedule.alpha(near_one.double())
    torch.testing.assert_close(schedule.alpha(near_one).double(), exact, rtol=4e-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_prime_is_the_derivative(kind):
    t = torch.linspace(0, 1, 21, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(MaskSchedule(kind).alpha(t).sum(), t)
    torch.testing.assert_close(MaskSchedule(kind).alpha_prime(t.detach()), grad)


# Blocks


@pytest.mark.parametrize(
    ("kind", "inner"),
    [
        ("linear", (2 / 3, 1 / 3)),
        ("cosine", (0.4645591, 0.2163469)),
        ("poly2", (math.sqrt(2 / 3), math.sqrt(1 / 3))),
    ],
)
def test_boundaries_are_the_reference_values(kind, inner):
    got = MaskSchedule(kind).boundaries(3)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([1, *inner, 0], abs=5e-8)
    assert got[0] == 1
    assert got[-1] == 0


@given(kind=kinds, num_blocks=st.integers(1, 40))
def test_blocks_have_equal_decrements_of_alpha(kind, num_blocks):
    schedule = MaskSchedule(kind)
    alpha = schedule.alpha(schedule.boundaries(num_blocks))
    expected = torch.arange(num_blocks + 1, dtype=torch.float64) / num_blocks
    torch.testing.assert_close(alpha, expected, rtol=0, atol=1e-14)


@given(kind=kinds, num_blocks=st.integers(1, 12), dtype=st.sampled_from(DTYPES))
def test_a_boundary_belongs_to_the_block_below_it(kind, num_blocks, dtype):
    schedule = MaskSchedule(kind)
    owners = schedule.block_of(schedule.boundaries(num_blocks).to(dtype), num_blocks)
    assert owners.tolist() == [*range(num_blocks), num_blocks - 1]
    middles = schedule.time_at((torch.arange(num_blocks).double() + 0.5) / num_blocks)
    assert schedule.block_of(middles, num_blocks).tolist() == [*range(num_blocks)][::-1]


@given(kind=kinds, num_blocks=st.integers(1, 8), block=st.integers(0, 7), overlap=st.floats(0, 3))
def test_the_overlap_widens_the_range_of_alpha(kind, num_blocks, block, overlap):
    schedule, block = MaskSchedule(kind), block % num_blocks
    low, high = schedule.range_of(block, num_blocks, overlap=overlap)
    first, last = schedule.alpha(double(high, low)).tolist()
    assert first == pytest.approx(max(0, (block - overlap) / num_blocks), abs=1e-14)
    assert last == pytest.approx(min(1, (block + 1 + overlap) / num_blocks), abs=1e-14)


# Drawing


@given(
    kind=kinds, draw=draws, num_blocks=st.integers(1, 6), block=st.integers(0, 5),
    n=st.integers(0, 70), overlap=st.sampled_from([0, 0.1]), seed=st.integers(0, 100),
)  # fmt: skip
def test_draws_are_antithetic_and_inside_the_range(kind, draw, num_blocks, block, n, overlap, seed):
    schedule, block = MaskSchedule(kind, draw), block % num_blocks
    low, high = schedule.range_of(block, num_blocks, overlap=overlap)
    t = schedule.sample(block, num_blocks, (n,), overlap=overlap, generator=seeded(seed))
    assert t.dtype == torch.float32
    assert t.shape == (n,)
    assert ((t.double() >= max(low, T_MIN * (1 - 1e-6))) & (t.double() <= high)).all()
    # Sorted, one lies in each n-th of the range.
    place = schedule.masked(t.double()) if draw == "alpha" else t.double()
    ends = schedule.masked(double(low, high)) if draw == "alpha" else double(low, high)
    place = ((place - ends[0]) / (ends[1] - ends[0])).sort().values
    gaps = place.diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / max(n, 1)), rtol=0, atol=1e-4)
    again = schedule.sample(block, num_blocks, (n,), overlap=overlap, generator=seeded(seed))
    assert torch.equal(t, again)


@pytest.mark.parametrize("draw", ["alpha", "t"])
def test_a_share_of_the_draws_is_all_masked(draw):
    schedule, n = MaskSchedule(draw=draw), 4000
    for block in range(3):
        low, high = schedule.range_of(block, 3, overlap=0.05)
        t = schedule.sample(block, 3, (n,), top_share=0.25, generator=seeded(block))
        top = t == 1
        assert abs(top.double().mean().item() - 0.25) < 5 * math.sqrt(0.19 / n)
        assert ((t[~top] >= low - 1e-6) & (t[~top] <= high)).all()
        free, state = schedule.sample(block, 3, (n,), generator=seeded(block)), seeded(block)
        assert torch.equal(t[~top], free[~top])
        none = schedule.sample(block, 3, (n,), top_share=0.0, generator=state)
        assert torch.equal(none, free)
        assert (schedule.sample(block, 3, (n,), top_share=1.0, generator=seeded()) == 1).all()


def test_zero_is_never_drawn():
    schedule = MaskSchedule("cosine")
    smallest = min(schedule.sample(2, 3, (4096,), generator=seeded(s)).min() for s in range(20))
    assert smallest >= T_MIN * (1 - 1e-6)
    for kind in KINDS:
        for draw in DRAWS:
            t = torch.tensor([T_MIN])
            assert MaskSchedule(kind, draw).loss_weight(t).isfinite().all()


# The weight of the bound


def integrand(share):
    """Any smooth nats a masked token, as a function of the mask ratio."""
    return 1 + share.exp() * share


@given(
    kind=kinds, draw=draws, num_blocks=st.integers(1, 5), block=st.integers(0, 4),
    overlap=st.sampled_from([0, 0.1]),
)  # fmt: skip
def test_either_draw_gives_the_bound_of_the_range(kind, draw, num_blocks, block, overlap):
    """The expectation of weight * E[sum over masked] over what is drawn is the integral over m."""
    schedule, block = MaskSchedule(kind, draw), block % num_blocks
    low, high = schedule.range_of(block, num_blocks, overlap=overlap)
    first, last = schedule.masked(double(low, high)).tolist()
    m, w = quadrature(first, last)
    expected = (w * integrand(m)).sum()
    if draw == "alpha":
        drawn, w = quadrature(first, last)
        t = schedule.time_at(drawn)
    else:
        t, w = quadrature(low, high)
    density = w / w.sum()
    weight = schedule.loss_weight(t, block, num_blocks, overlap=overlap)
    got = (density * weight * schedule.masked(t) * integrand(schedule.masked(t))).sum()
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("draw", DRAWS)
def test_the_weight_is_its_formula(draw):
    t = torch.tensor([0.3])
    schedule = MaskSchedule("cosine", draw)
    low, high = schedule.range_of(1, 3)
    alpha = 1 - math.cos(math.pi / 2 * 0.7)
    prime = -math.pi / 2 * math.sin(math.pi / 2 * 0.7)
    expected = 1 / 3 / (1 - alpha) if draw == "alpha" else -(high - low) * prime / (1 - alpha)
    assert schedule.loss_weight(t, 1, 3).item() == pytest.approx(expected, rel=1e-6)


# Sampling grids


@given(kind=kinds, n=st.integers(1, 60))
def test_grids_descend_from_one(kind, n):
    schedule = MaskSchedule(kind)
    for rule in ("equal_mass", "uniform"):
        grid = schedule.steps(n, rule)
        assert grid.dtype == torch.float64
        assert grid[0] == 1
        assert (grid.diff() < 0).all()
        assert len(grid) == n
        assert grid[-1] > 0
    alpha = schedule.alpha(schedule.steps(n))
    torch.testing.assert_close(alpha, torch.arange(n).double() / n, rtol=0, atol=1e-14)


@given(kind=kinds, num_blocks=st.integers(1, 8), each=st.integers(1, 20))
def test_each_block_owns_equally_many_steps(kind, num_blocks, each):
    schedule = MaskSchedule(kind)
    owners = schedule.block_of(schedule.steps(each * num_blocks), num_blocks)
    assert owners.bincount(minlength=num_blocks).tolist() == [each] * num_blocks


# Masks


def test_the_masked_share_is_that_of_t():
    y = torch.zeros(3, 40_000, dtype=torch.int64, device=DEVICE)
    t = torch.tensor([1.0, 0.5, 0.03], device=DEVICE)
    schedule = MaskSchedule("cosine")
    z, z_in = schedule.corrupt(y, schedule.level(t), 7)
    share = schedule.masked(t).tolist()
    assert (z[0] == MASKED).all()
    assert torch.equal(z, z_in)
    for row, p in zip(z, share, strict=True):
        error = math.sqrt(p * (1 - p) / y.shape[1])
        assert (row == MASKED).double().mean().item() == pytest.approx(p, abs=5 * error)


def test_masks_are_functions_of_the_seed_and_nested_in_t():
    y = torch.randint(9, (4, 50), generator=seeded()).to(DEVICE)
    schedule = MaskSchedule()
    level = schedule.level(torch.full((4,), 0.4, device=DEVICE))
    z = schedule.corrupt(y, level, 3).z
    seed = torch.tensor(3, device=DEVICE)
    assert torch.equal(z, schedule.corrupt(y, level, seed).z)
    assert not torch.equal(z, schedule.corrupt(y, level, 4).z)
    assert torch.equal(z[z != MASKED], y[z != MASKED])
    more = schedule.corrupt(y, schedule.level(torch.full((4,), 0.6, device=DEVICE)), 3).z
    assert (more[z == MASKED] == MASKED).all()
    assert (more == MASKED).sum() > (z == MASKED).sum()


# Arguments


def test_json_keeps_either_schedule():
    for schedule in (MaskSchedule("poly2", "t"), NoiseSchedule(p_mean=0.5)):
        config = BlocksConfig(3, schedule=schedule)
        assert BlocksConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MaskSchedule("sine"), ValueError, "kind must be one of .* got 'sine'"),
        (lambda: MaskSchedule(draw="u"), ValueError, "draw must be one of .* got 'u'"),
        (lambda: MaskSchedule().boundaries(0), ValueError, "num_blocks must be a positive"),
        (lambda: MaskSchedule().range_of(3, 3), ValueError, r"block must be in 0\.\.2, got 3"),
        (lambda: MaskSchedule().range_of(0, 3, overlap=-1), ValueError, "overlap must not be neg"),
        (lambda: MaskSchedule().steps(0), ValueError, "number of steps must be a positive"),
        (lambda: MaskSchedule().steps(3, "karras"), ValueError, "spacing must be 'equal_mass' or"),
        (lambda: MaskSchedule().block_of(torch.tensor(1), 3), TypeError, "t must be floating"),
        (lambda: MaskSchedule().state(torch.zeros(1, 2)), TypeError, "z must be tokens, int64"),
    ],
)  # fmt: skip
def test_arguments_are_checked(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("weighting", ["edm", "clamped", "batch_mean"])
def test_weightings_of_noise_have_no_meaning_for_masks(weighting):
    with pytest.raises(ValueError, match=f"'none'.* with a MaskSchedule, got '{weighting}'"):
        BlocksConfig(3, schedule=MaskSchedule(), weighting=weighting)


def test_there_is_no_noise_schedule():
    with pytest.raises(TypeError, match=r"a NoiseSchedule, got a MaskSchedule; .* dblocks\.unmask"):
        _ = BlocksConfig(3, schedule=MaskSchedule()).noise_schedule
    assert BlocksConfig(3).noise_schedule == NoiseSchedule()
