import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dblocks.blocks import BlocksConfig
from dblocks.schedules import MaskSchedule, NoiseSchedule
from tools import seeded

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def mass(schedule, lo, hi):
    """The log-normal's mass between two levels, from the nearer tail."""
    a, b = ((math.log(s) - schedule.p_mean) / schedule.p_std for s in (lo, hi))
    return stats.norm.cdf(b) - stats.norm.cdf(a) if a < 0 else stats.norm.sf(a) - stats.norm.sf(b)


@pytest.mark.parametrize(
    ("num_blocks", "expected"),
    [
        (1, [80.0, 0.002]),
        (3, [80.0, 0.5050414640, 0.1796324721, 0.002]),
        (4, [80.0, 0.6766486433, 0.3012001026, 0.1340760955, 0.002]),
    ],
)
def test_boundaries_are_the_reference_values(num_blocks, expected):
    got = NoiseSchedule().boundaries(num_blocks)
    assert got.dtype == torch.float64
    assert got[0] == 80.0
    assert got[-1] == 0.002
    torch.testing.assert_close(got, torch.tensor(expected).double(), rtol=1e-6, atol=0)
    assert got.tolist() == pytest.approx(expected, rel=2e-10)


@given(
    num_blocks=st.integers(1, 40),
    p_mean=st.floats(-4, 3),
    p_std=st.floats(0.5, 2),
    sigma_max=st.sampled_from([1.0, 80.0, 1000.0]),
)
def test_blocks_have_equal_mass(num_blocks, p_mean, p_std, sigma_max):
    schedule = NoiseSchedule(p_mean=p_mean, p_std=p_std, sigma_max=sigma_max)
    ends = schedule.boundaries(num_blocks).tolist()
    masses = [mass(schedule, lo, hi) for hi, lo in pairwise(ends)]
    total = mass(schedule, schedule.sigma_min, sigma_max)
    assert masses == pytest.approx([total / num_blocks] * num_blocks, abs=1e-12)


def test_other_partitions():
    log = NoiseSchedule(partition="uniform_log").boundaries(3).log().diff()
    assert log.tolist() == pytest.approx([math.log(0.002 / 80) / 3] * 3)
    even = NoiseSchedule(partition="uniform").boundaries(4).diff()
    assert even.tolist() == pytest.approx([(0.002 - 80) / 4] * 4)
    given_ = NoiseSchedule(partition=(5.0, 0.5))
    assert given_.boundaries(3).tolist() == [80.0, 5.0, 0.5, 0.002]
    with pytest.raises(ValueError, match="2 inner boundaries, which make 3 blocks, got num_blocks"):
        given_.boundaries(4)


@given(
    block=st.integers(0, 4),
    partition=st.sampled_from(["equal_mass", "uniform_log", "uniform"]),
    overlap=st.sampled_from([0.0, 0.05, 0.1, 1.0]),
    p_mean=st.sampled_from([-6.0, -1.2, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_draws_lie_in_the_widened_range(block, partition, overlap, p_mean, seed):
    schedule = NoiseSchedule(partition=partition, p_mean=p_mean)
    generator = torch.Generator().manual_seed(seed)
    sigma = schedule.sample(block, 5, (500,), overlap=overlap, generator=generator)
    hi, lo = schedule.boundaries(5)[block : block + 2].tolist()
    widening = overlap * math.log(hi / lo)
    low = max(math.log(lo) - widening, math.log(0.002))
    high = min(math.log(hi) + widening, math.log(80))
    assert sigma.dtype == torch.float32
    assert sigma.double().min() >= math.exp(low) * (1 - 1e-12)
    assert sigma.double().max() <= math.exp(high) * (1 + 1e-12)


@pytest.mark.parametrize("end", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_the_extreme_draws_lie_in_the_range(monkeypatch, end, block):
    monkeypatch.setattr(torch, "rand", lambda size, **_: torch.full(size, end, dtype=torch.float64))
    schedule = NoiseSchedule()
    sigma = schedule.sample(block, 3, (1,), overlap=0.0).double().item()
    hi, lo = schedule.boundaries(3)[block : block + 2].tolist()
    assert lo <= sigma <= hi
    assert sigma == pytest.approx(lo if (end == 0) == (block > 0) else hi, rel=1e-6) or block == 1


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("p_mean", [-1.2, 6.0, -9.0])
def test_draws_follow_the_truncated_log_normal(block, p_mean):
    schedule = NoiseSchedule(p_mean=p_mean)
    generator = torch.Generator().manual_seed(0)
    sigma = schedule.sample(block, 3, (20_000,), overlap=0.05, generator=generator)
    lo, hi = schedule.range_of(block, 3, overlap=0.05)
    a, b = ((math.log(s) - p_mean) / schedule.p_std for s in (lo, hi))
    x = (sigma.double().log() - p_mean) / schedule.p_std
    assert stats.kstest(x.numpy(), stats.truncnorm(a, b).cdf).pvalue > 0.01


def test_draws_repeat_from_a_generator():
    draw = lambda: NoiseSchedule().sample(1, 3, (4, 2), generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw(), draw())
    assert draw().shape == (4, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 7])
def test_a_boundary_belongs_to_the_block_below_it(dtype, num_blocks):
    schedule = NoiseSchedule()
    sigma = schedule.boundaries(num_blocks).to(dtype)
    expected = [*range(num_blocks), num_blocks - 1]
    assert schedule.block_of(sigma, num_blocks).tolist() == expected
    above = torch.nextafter(sigma, torch.full_like(sigma, 1e4))[1:-1]
    if dtype != torch.float64:
        assert schedule.block_of(above, num_blocks).tolist() == list(range(num_blocks - 1))


def test_float32_levels_in_float64_are_routed_as_float32():
    schedule = NoiseSchedule()
    rounded = schedule.boundaries(3).float()
    assert schedule.block_of(rounded.double(), 3).tolist() == [0, 1, 2, 2]


def test_levels_outside_the_range_clamp():
    sigma = torch.tensor([1e-9, 0.0, 1e4, math.inf])
    assert NoiseSchedule().block_of(sigma, 3).tolist() == [2, 2, 0, 0]
    with pytest.raises(TypeError, match=r"sigma must be floating point, got torch\.int64"):
        NoiseSchedule().block_of(torch.tensor([1]), 3)


@pytest.mark.parametrize(
    ("n", "kind", "calls"),
    [
        (50, "equal_mass", [17, 16, 17]),
        (50, "karras", [33, 4, 13]),
        (4, "equal_mass", [1, 1, 2]),
        (3, "equal_mass", [1, 1, 1]),
        (1, "equal_mass", [1, 0, 0]),
    ],
)
def test_how_often_a_grid_calls_each_block(n, kind, calls):
    schedule = NoiseSchedule()
    steps = schedule.steps(n, kind)
    assert len(steps) == n
    assert steps[0] == 80.0
    assert n == 1 or steps[-1] == 0.002
    assert (steps.diff() < 0).all()
    assert torch.bincount(schedule.block_of(steps, 3), minlength=3).tolist() == calls


@pytest.mark.parametrize("num_blocks", range(2, 9))
def test_as_many_steps_as_blocks_call_each_block(num_blocks):
    schedule = NoiseSchedule()
    for n in range(num_blocks, 3 * num_blocks):
        assert len(schedule.block_of(schedule.steps(n), num_blocks).unique()) == num_blocks


def test_karras_steps_that_skip_a_block():
    schedule = NoiseSchedule()
    skips = [
        n
        for n in range(1, 40)
        if len(schedule.block_of(schedule.steps(n, "karras"), 3).unique()) < 3
    ]
    assert skips == [1, 2, 3, 5, 6, 9]


def test_a_share_of_the_draws_is_at_the_top():
    """Whatever the block; the others are in its widened range."""
    schedule, n = NoiseSchedule(), 4000
    for block in range(3):
        lo, hi = schedule.range_of(block, 3, overlap=0.05)
        sigma = schedule.sample(block, 3, (n, 2), top_share=0.6, generator=seeded(block))
        top = sigma == 80.0
        # Five standard deviations of a binomial.
        assert abs(top.double().mean().item() - 0.6) < 5 * math.sqrt(0.24 / (2 * n))
        assert ((sigma[~top] >= lo) & (sigma[~top] <= hi)).all()
        # Independent of each other and of the levels: rows are all kinds, and medians agree.
        assert abs(top.all(1).double().mean().item() - 0.36) < 5 * math.sqrt(0.23 / n)
        free = schedule.sample(block, 3, (n, 2), generator=seeded(block))
        assert abs((free[~top] < free.median()).double().mean().item() - 0.5) < 0.05
        assert torch.equal(sigma[~top], free[~top])


def test_no_share_at_the_top_draws_as_without_one():
    schedule = NoiseSchedule()
    before, after = seeded(), seeded()
    plain = schedule.sample(1, 3, (64,), generator=before)
    none = schedule.sample(1, 3, (64,), top_share=0.0, generator=after)
    assert torch.equal(plain, none)
    assert torch.equal(before.get_state(), after.get_state())


@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("sigma_max", [80.0, 0.1])
def test_all_draws_at_the_top(block, sigma_max):
    schedule = NoiseSchedule(sigma_max=sigma_max)
    sigma = schedule.sample(block, 3, (1000,), top_share=1.0, generator=seeded())
    assert sigma.dtype == torch.float32
    assert len(sigma.unique()) == 1
    # The largest float32 that is not above sigma_max: it is routed to the first block.
    assert sigma_max * (1 - 2**-23) <= sigma[0].item() <= sigma_max


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, "x", True])
@pytest.mark.parametrize("schedule", [NoiseSchedule(), MaskSchedule()])
def test_a_share_is_a_number_from_0_to_1(schedule, share):
    with pytest.raises(ValueError, match="top_share must"):
        schedule.sample(0, 3, (4,), top_share=share)
    error = TypeError if share is True else ValueError  # no number is no value of the field
    with pytest.raises(error, match=r"top_share (of BlocksConfig )?must"):
        BlocksConfig(3, schedule=schedule, top_share=share)


def test_preconditioning():
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    level = NoiseSchedule().level(sigma)
    torch.testing.assert_close(level.c_skip + (level.c_out / 0.5) ** 2, torch.ones(3).double())
    torch.testing.assert_close(level.c_in * level.c_in * (sigma**2 + 0.25), torch.ones(3).double())
    weight = NoiseSchedule().loss_weight(sigma)
    torch.testing.assert_close(weight, level.c_out**-2)
    assert weight[0].item() == pytest.approx(250_004)
    assert weight[2].item() == pytest.approx(4, rel=1e-3)
    assert NoiseSchedule().level(sigma.bfloat16()).c_in.dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigma_min": 0.0}, "sigma_min must be positive, got 0.0"),
        ({"sigma_max": math.inf}, "sigma_max must be a finite number, got inf"),
        ({"sigma_max": 0.001}, "sigma_max must be greater than sigma_min, got 0.001 and 0.002"),
        ({"p_std": -1.0}, "p_std must be positive, got -1.0"),
        ({"sigma_data": 0}, "sigma_data must be positive, got 0"),
        ({"p_mean": 1e4}, r"put no mass on \[0.002, 80.0\]"),
        ({"partition": "equal"}, "partition must be one of .* got 'equal'"),
        ({"partition": (0.1, 5.0)}, "must hold the inner boundaries, descending and strictly"),
        ({"partition": (5.0, 5.0)}, "must hold the inner boundaries, descending and strictly"),
        ({"partition": (80.0, 5.0)}, "must hold the inner boundaries, descending and strictly"),
    ],
)
def test_values_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s: dataclasses.replace(s, partition=(1 + 2e-9, 1 + 1e-9)).boundaries(3),
            r"must hold float32 numbers, .* got 1.000000001 to 1.000000002",
        ),
        (
            lambda s: dataclasses.replace(s, sigma_min=1 + 1e-9, sigma_max=1 + 2e-9).sample(
                0, 1, ()
            ),
            r"must hold float32 numbers, .* got 1.000000001 to 1.000000002; widen",
        ),
        (lambda s: s.boundaries(0), "num_blocks must be a positive integer, got 0"),
        (lambda s: s.sample(3, 3, (1,)), r"block must be in 0\.\.2, got 3"),
        (lambda s: s.sample(-1, 3, (1,)), r"block must be in 0\.\.2, got -1"),
        (lambda s: s.sample(0, 3, (1,), overlap=-0.1), "overlap must not be negative, got -0.1"),
        (lambda s: s.steps(0), "number of steps must be a positive integer, got 0"),
        (lambda s: s.steps(2, "cosine"), "spacing must be 'equal_mass' or 'karras', got 'cosine'"),
        (lambda s: s.steps(2, "karras", rho=0), "rho must be positive, got 0"),
    ],
)
def test_arguments_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call(NoiseSchedule())


@pytest.mark.parametrize("partition", ["uniform", (5.0, 0.5), ()])
def test_json(partition):
    schedule = NoiseSchedule(sigma_max=40.0, partition=partition)
    assert NoiseSchedule.from_json(schedule.to_json()) == schedule
    with pytest.raises(ValueError, match="NoiseSchedule has no field p_men; its fields are"):
        NoiseSchedule.from_json('{"p_men": 1}')
    with pytest.raises(ValueError, match="NoiseSchedule must be a JSON object, got"):
        NoiseSchedule.from_json("[]")


def test_the_default_device_does_not_matter():
    def draw():
        generator = torch.Generator().manual_seed(0)
        schedule = NoiseSchedule(sigma_max=79.0)  # a schedule whose boundaries are not cached
        sigma = schedule.sample(1, 3, (4,), generator=generator)
        return sigma, schedule.boundaries(3), schedule.steps(5), schedule.block_of(sigma, 3)

    with torch.device("meta"):
        there = draw()
    assert all(torch.equal(a, b) for a, b in zip(there, draw(), strict=True))


def test_integers_of_other_libraries_count():
    schedule, three, one = NoiseSchedule(), np.int64(3), np.int32(1)
    assert torch.equal(schedule.boundaries(three), schedule.boundaries(3))
    assert torch.equal(schedule.steps(three), schedule.steps(3))
    assert schedule.range_of(one, three) == schedule.range_of(torch.tensor(1), 3)
    for wrong in (1.0, "1", True, None):
        with pytest.raises(TypeError, match=r"block must be an integer, got .*convert it with int"):
            schedule.range_of(wrong, 3)
