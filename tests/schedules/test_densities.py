"""What every density of noise levels offers, and how one of a user's own joins them."""

import json
import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.models import ViT, ViTConfig
from dblocks.sampling import initial_noise, sample_logits
from dblocks.schedules import (
    SCHEDULES,
    CosineNoiseSchedule,
    EDMSchedule,
    LogUniformNoiseSchedule,
    NoiseSchedule,
    register,
)
from tools import seeded

DENSITIES = (NoiseSchedule, LogUniformNoiseSchedule, CosineNoiseSchedule)
each_density = pytest.mark.parametrize("density", DENSITIES)


def exact(schedule):
    """The distribution function of the truncated levels, written out with scipy; of arrays."""
    lo, hi = schedule.sigma_min, schedule.sigma_max
    if isinstance(schedule, NoiseSchedule):
        law = stats.lognorm(schedule.p_std, scale=math.exp(schedule.p_mean))
    elif isinstance(schedule, LogUniformNoiseSchedule):
        law = stats.loguniform(lo, hi)
    else:
        law = stats.halfcauchy()  # the tangent of a uniform angle
    return lambda sigma: (law.cdf(sigma) - law.cdf(lo)) / (law.cdf(hi) - law.cdf(lo))


@each_density
@settings(max_examples=30)
@given(
    num_blocks=st.integers(1, 30),
    sigma_min=st.sampled_from([0.002, 0.3]),
    sigma_max=st.sampled_from([1.0, 80.0]),
)
def test_blocks_have_equal_mass(density, num_blocks, sigma_min, sigma_max):
    schedule = density(sigma_min=sigma_min, sigma_max=sigma_max)
    ends = schedule.boundaries(num_blocks)
    assert ends.dtype == torch.float64
    assert (ends[0].item(), ends[-1].item()) == (sigma_max, sigma_min)
    masses = -exact(schedule)(ends.numpy())
    assert [b - a for a, b in pairwise(masses)] == pytest.approx([1 / num_blocks] * num_blocks)
    total = schedule.mass(sigma_min, sigma_max)
    parts = [schedule.mass(lo, hi) for hi, lo in pairwise(ends.tolist())]
    assert parts == pytest.approx([total / num_blocks] * num_blocks)


@each_density
@pytest.mark.parametrize("block", [0, 1, 2])
def test_draws_follow_the_truncated_density(density, block):
    schedule = density()
    sigma = schedule.sample(block, 3, (5000,), overlap=0.05, generator=seeded(block)).double()
    lo, hi = schedule.range_of(block, 3, overlap=0.05)
    assert ((sigma >= lo) & (sigma <= hi)).all()
    cdf = exact(schedule)
    place = (cdf(sigma.numpy()) - cdf(lo)) / (cdf(hi) - cdf(lo))
    assert stats.kstest(place, "uniform").pvalue > 0.01


@each_density
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_boundary_belongs_to_the_block_below_it(density, dtype):
    schedule = density()
    ends = schedule.boundaries(5)
    assert schedule.block_of(ends.to(dtype), 5).tolist() == [0, 1, 2, 3, 4, 4]
    middles = (ends[1:] * ends[:-1]).sqrt().to(dtype)
    assert schedule.block_of(middles, 5).tolist() == [0, 1, 2, 3, 4]
    draws = [schedule.sample(b, 5, (100,), overlap=0.0, generator=seeded()) for b in range(5)]
    for block, sigma in enumerate(draws):
        assert (schedule.block_of(sigma, 5) == block).all()


@each_density
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_steps_are_quantiles(density, n):
    schedule = density()
    steps = schedule.steps(n)
    assert (steps[0].item(), len(steps)) == (80.0, n)
    if n > 1:
        expected = [1 - i / (n - 1) for i in range(n)]
        assert exact(schedule)(steps.numpy()).tolist() == pytest.approx(expected, abs=1e-12)
    if n >= 3:
        assert len(schedule.block_of(steps, 3).unique()) == 3
    assert torch.equal(schedule.steps(n, "karras"), NoiseSchedule().steps(n, "karras"))


@each_density
def test_quantiles_invert_the_distribution_function_in_both_tails(density):
    schedule = density()
    for p in (1e-12, 1e-3, 0.2, 0.5):
        for upper in (False, True):
            sigma = schedule.log_quantile(torch.tensor(p).double(), upper=upper).exp().item()
            assert schedule.cdf(sigma, upper=upper) == pytest.approx(p, rel=1e-6)
            other = schedule.cdf(sigma, upper=not upper)
            assert other == pytest.approx(1 - p, abs=1e-6 * p + 1e-15)


@each_density
def test_json(density):
    schedule = density(sigma_max=20.0, partition=(3.0, 0.4))
    config = BlocksConfig(3, schedule=schedule)
    assert json.loads(config.to_json())["schedule"]["type"] == density.__name__
    assert BlocksConfig.from_json(config.to_json()) == config
    assert density.from_json(schedule.to_json()) == schedule


def test_json_without_a_type_is_log_normal():
    values = {"num_blocks": 3, "schedule": {"p_mean": 1.0}}
    assert BlocksConfig.from_dict(values).schedule == NoiseSchedule(p_mean=1.0)
    with pytest.raises(ValueError, match=r"config type must be one of .*Cosine.* got 'Sine'"):
        BlocksConfig.from_dict({"num_blocks": 3, "schedule": {"type": "Sine"}})
    with pytest.raises(ValueError, match=r"BlocksConfig.schedule must be NoiseSchedule or .* 'x'"):
        BlocksConfig.from_dict({"num_blocks": 3, "schedule": "x"})


@each_density
def test_a_network_is_trained_and_sampled(density):
    torch.manual_seed(0)
    vit = ViT(ViTConfig(image_size=8, patch_size=4, width=24, depth=3, heads=2, num_classes=2))
    model = DiffusionBlocks(vit, BlocksConfig(3, schedule=density(), top_share=0.0))
    labels = torch.arange(2).repeat(8)
    images = labels.float()[:, None, None, None].expand(-1, 3, 8, 8) - 0.5
    optimizers = make_optimizers(model, lambda p: torch.optim.AdamW(p, lr=3e-3))
    batch, generator = {"images": images, "labels": labels}, seeded()
    for step in range(45):
        result = train_step(model, batch, optimizers, block=step % 3, generator=generator)
        lo, hi = model.config.schedule.range_of(step % 3, 3, overlap=model.config.overlap)
        assert ((result.details.sigma >= lo) & (result.details.sigma <= hi)).all()
    z = initial_noise((16, 24), model.config.noise_schedule, generator=seeded())
    logits = sample_logits(model, z, model.config.noise_schedule.steps(3), images=images)
    assert (logits.argmax(-1) == labels).double().mean() > 0.9


@pytest.fixture
def registry(monkeypatch):
    before = dict(SCHEDULES)
    yield
    SCHEDULES.clear()
    SCHEDULES.update(before)


def triangular():
    @register
    @dataclass(frozen=True)
    class Triangular(EDMSchedule):
        """ln sigma has a density that grows from 0 at sigma_min to sigma_max."""

        sigma_min: float = 0.01
        sigma_max: float = 10.0
        sigma_data: float = 1.0
        partition: str = "equal_mass"

        def cdf(self, sigma, *, upper=False):
            length = math.log(self.sigma_max / self.sigma_min)
            p = (math.log(sigma / self.sigma_min) / length) ** 2
            return 1 - p if upper else p

        def log_quantile(self, p, *, upper=False):
            length = math.log(self.sigma_max / self.sigma_min)
            return math.log(self.sigma_min) + length * (1 - p if upper else p).sqrt()

    return Triangular


@pytest.mark.usefixtures("registry")
def test_a_density_of_ones_own_is_one_class():
    schedule = triangular()()
    config = BlocksConfig(2, schedule=schedule)
    assert BlocksConfig.from_json(config.to_json()) == config
    assert config.noise_schedule is schedule
    middle = math.exp(math.log(0.01) + math.log(1000) * math.sqrt(0.5))
    assert schedule.boundaries(2).tolist() == pytest.approx([10.0, middle, 0.01])


@pytest.mark.usefixtures("registry")
def test_a_name_is_registered_once():
    @dataclass(frozen=True)
    class CosineNoiseSchedule(LogUniformNoiseSchedule):
        pass

    with pytest.raises(ValueError, match=r"one that is not registered, got 'CosineNoise.* rename"):
        register(CosineNoiseSchedule)
    triangular()
    triangular()  # the same place in the same file: a module that is loaded again


@each_density
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sigma_min": 0.0}, "sigma_min must be positive, got 0.0"),
        ({"sigma_max": math.nan}, "sigma_max must be a finite number, got nan"),
        ({"sigma_max": 0.001}, "sigma_max must be greater than sigma_min"),
        ({"sigma_data": -1.0}, "sigma_data must be positive, got -1.0"),
        ({"partition": "equal"}, "partition must be one of .* got 'equal'"),
        ({"partition": (0.1, 5.0)}, "must hold the inner boundaries, descending"),
    ],
)
def test_values_are_checked(density, values, message):
    with pytest.raises(ValueError, match=message):
        density(**values)


def test_a_schedule_that_could_not_be_read_again_is_not_written():
    named = type("NoiseSchedule", (LogUniformNoiseSchedule,), {})  # as one that is registered
    for kind in (named, type("Unknown", (LogUniformNoiseSchedule,), {})):
        config = BlocksConfig(3, schedule=kind())
        with pytest.raises(ValueError, match="must be of a registered class"):
            config.to_json()


def plain(base):
    class Own(base):
        p_extra = 1.0

    return Own


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    "schedule",
    [
        plain(EDMSchedule),
        plain(LogUniformNoiseSchedule),  # whose own fields would be lost
        dataclass(plain(object)),
        dataclass(frozen=True)(plain(object)),
        LogUniformNoiseSchedule(),
        None,
    ],
)
def test_a_registered_class_is_a_frozen_dataclass(schedule):
    with pytest.raises(
        TypeError, match=r"a schedule must be a frozen dataclass .* below @register"
    ):
        register(schedule)
    assert "Own" not in SCHEDULES


def test_numbers_without_a_hash_are_refused_by_name():
    with pytest.raises((TypeError, ValueError), match="overlap must"):
        LogUniformNoiseSchedule().sample(0, 2, (3,), overlap=[0.1])
