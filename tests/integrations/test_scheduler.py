import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from dit_tools import blocks_of, some_labels
from hub_tools import library

from dblocks import (
    CosineNoiseSchedule,
    LogUniformNoiseSchedule,
    MaskSchedule,
    NoiseSchedule,
    initial_noise,
    sample_euler,
    sample_heun,
)
from tools import DEVICE, ROOT, normal, seeded

diffusers = library("diffusers")
DiffusionBlocksScheduler = import_module("dblocks.integrations.scheduler").DiffusionBlocksScheduler
SHAPE = (4, 3, 4, 6)


class Wrapped(diffusers.ModelMixin, diffusers.ConfigMixin):
    """Blocks as the `unet` of a pipeline, which asks a model for its device, dtype and sizes."""

    @diffusers.configuration_utils.register_to_config
    def __init__(self, in_channels=3, sample_size=4, num_class_embeds=5):
        super().__init__()
        self.blocks = blocks_of(image_size=4)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        assert not return_dict
        return (self.blocks(sample, timestep, labels=class_labels),)


class BlocksPipeline(diffusers.DiffusionPipeline):
    """The loop that diffusers' pipelines have."""

    def __init__(self, model, scheduler):
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, labels, num_inference_steps, generator):
        z = torch.randn(len(labels), 3, 4, 4, generator=generator).to(self.device)
        z = z * self.scheduler.init_noise_sigma
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            z_in = self.scheduler.scale_model_input(z, t)
            denoised = self.model(z_in, t, class_labels=labels, return_dict=False)[0]
            z = self.scheduler.step(denoised, t, z, generator=generator, return_dict=False)[0]
        return z


def noise():
    return initial_noise(SHAPE, NoiseSchedule(), generator=seeded()).to(DEVICE)


@torch.no_grad()
def loop(scheduler, model, z, **cond):
    """The states that a loop passes through, and the last denoised."""
    states = []
    for t in scheduler.timesteps:
        states.append(z)
        z = scheduler.step(model(z, t, **cond), t, z).prev_sample
    return states, z


@pytest.mark.parametrize("kind", ["equal_mass", "karras"])
def test_steps_are_those_of_sample_euler_bit_for_bit(kind):
    model, z = blocks_of(), noise()
    schedule = NoiseSchedule(sigma_max=20.0, p_mean=-1.0)
    scheduler = DiffusionBlocksScheduler.from_schedule(schedule, spacing=kind)
    scheduler.set_timesteps(7)
    ran = []
    for i, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i // 2))
    states, denoised = loop(scheduler, model, z, labels=some_labels())
    owners = model.config.noise_schedule.block_of(schedule.steps(7, kind), 3).tolist()
    assert ran == [block for block in owners for _ in range(2)]
    seen = []
    expected = sample_euler(
        model, z, schedule.steps(7, kind), callback=seen.append, labels=some_labels()
    )
    assert torch.equal(denoised, expected)
    assert all(torch.equal(x, info["x"]) for x, info in zip(states, seen, strict=True))


def test_three_steps_call_three_blocks():
    model = blocks_of()
    scheduler = DiffusionBlocksScheduler()
    scheduler.set_timesteps(3)
    ran = []
    for i, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    loop(scheduler, model, noise(), labels=some_labels())
    assert ran == [0, 1, 2, 3, 4, 5]


def test_timesteps_are_the_levels_in_float32():
    scheduler = DiffusionBlocksScheduler(spacing="karras", rho=5.0)
    scheduler.set_timesteps(9)
    levels = NoiseSchedule().steps(9, "karras", rho=5.0)
    assert torch.equal(scheduler.sigmas, levels)
    assert torch.equal(scheduler.timesteps, levels.float())
    assert (scheduler.num_inference_steps, len(scheduler), scheduler.order) == (9, 9, 1)


@pytest.mark.parametrize(
    "sigmas",
    [[80.0, 5.0, 0.5, 0.002], [80.0, 5.0, 0.5, 0.002, 0.0], torch.tensor([80, 5, 0.5, 0.002])],
)
def test_sigmas_given_are_the_very_levels(sigmas):
    model, z = blocks_of(), noise()
    scheduler = DiffusionBlocksScheduler()
    scheduler.set_timesteps(sigmas=sigmas)
    assert torch.equal(scheduler.timesteps, torch.tensor([80, 5, 0.5, 0.002]))
    assert scheduler.num_inference_steps == 4
    _, denoised = loop(scheduler, model, z, labels=some_labels())
    assert torch.equal(denoised, sample_euler(model, z, sigmas, labels=some_labels()))


@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_a_pipeline_of_diffusers_samples_as_we_do(num_steps):
    wrapped = Wrapped().to(DEVICE)
    pipeline = BlocksPipeline(wrapped, DiffusionBlocksScheduler())
    pipeline.set_progress_bar_config(disable=True)
    got = pipeline(some_labels(), num_steps, seeded())
    schedule = NoiseSchedule()
    z = initial_noise((4, 3, 4, 4), schedule, generator=seeded()).to(DEVICE)
    with pytest.warns(UserWarning, match="have no level") if num_steps == 1 else nullcontext():
        expected = sample_euler(wrapped.blocks, z, schedule.steps(num_steps), labels=some_labels())
    assert torch.equal(got, expected)
    assert isinstance(pipeline.components["scheduler"], DiffusionBlocksScheduler)


def test_the_pipeline_that_ships_with_diffusers():
    wrapped = Wrapped().to(DEVICE)
    pipeline = diffusers.ConsistencyModelPipeline(wrapped, DiffusionBlocksScheduler())
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    got = pipeline(
        4, some_labels(), 5, output_type="pt", generator=seeded(), return_dict=False,
        callback=lambda i, t, sample: seen.append((i, float(t))),
    )[0]  # fmt: skip
    sigmas = NoiseSchedule().steps(5)
    z = initial_noise((4, 3, 4, 4), NoiseSchedule(), generator=seeded()).to(DEVICE)
    expected = sample_euler(wrapped.blocks, z, sigmas, labels=some_labels())
    assert torch.equal(got, (expected / 2 + 0.5).clamp(0, 1))
    assert seen == list(enumerate(sigmas.float().tolist()))


def test_a_saved_pipeline_loads_its_scheduler(tmp_path):
    class Pipeline(diffusers.DiffusionPipeline):
        def __init__(self, scheduler):
            super().__init__()
            self.register_modules(scheduler=scheduler)

    schedule = NoiseSchedule(0.01, 30.0, partition=(2.0, 0.3))
    scheduler = DiffusionBlocksScheduler.from_schedule(schedule, spacing="karras")
    Pipeline(scheduler).save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path).scheduler
    assert type(loaded) is DiffusionBlocksScheduler
    assert loaded.noise_schedule == schedule
    assert loaded.config.spacing == "karras"


def test_config_round_trip(tmp_path):
    options = {"spacing": "karras", "rho": 5.0, "noise": "unit_variance"}
    schedule = NoiseSchedule(0.01, 30.0, -0.5, 1.5, 0.3, (2.0, 0.3))
    scheduler = DiffusionBlocksScheduler.from_schedule(schedule, **options)
    scheduler.save_pretrained(tmp_path)
    for copy in (
        DiffusionBlocksScheduler.from_pretrained(tmp_path),
        DiffusionBlocksScheduler.from_config(scheduler.config),
    ):
        assert copy.noise_schedule == schedule
        assert {name: copy.config[name] for name in options} == options
        assert copy.init_noise_sigma == (30.0**2 + 1) ** 0.5


def test_the_initial_noise_belongs_to_the_first_level():
    scheduler = DiffusionBlocksScheduler()
    assert scheduler.init_noise_sigma == 80.0
    scheduler.set_timesteps(sigmas=[3.0, 1.0])
    assert scheduler.init_noise_sigma == 3.0
    official = DiffusionBlocksScheduler(noise="unit_variance")
    official.set_timesteps(4)
    assert official.init_noise_sigma == (80.0**2 + 1) ** 0.5


def test_noise_is_added_at_the_level_of_each_sample():
    scheduler = DiffusionBlocksScheduler()
    y, eps = normal(*SHAPE), normal(*SHAPE, seed=1)
    sigma = torch.tensor([4.0, 3.0, 2.0, 0.5], device=DEVICE)
    each = scheduler.add_noise(y, eps, sigma)
    torch.testing.assert_close(each, y + sigma[:, None, None, None] * eps)
    assert torch.equal(scheduler.add_noise(y, eps, sigma[2]), y + 2.0 * eps)
    assert torch.equal(scheduler.add_noise(y, eps, sigma[2:3]), y + 2.0 * eps)
    assert scheduler.add_noise(y.bfloat16(), eps.bfloat16(), sigma).dtype == torch.bfloat16


def test_a_pipeline_may_begin_in_the_middle():
    y, eps = normal(*SHAPE), normal(*SHAPE, seed=1)
    scheduler = DiffusionBlocksScheduler()
    perfect = lambda z, t: y
    expected = None
    for begin in (None, 2):
        scheduler.set_timesteps(5)
        if begin is not None:
            scheduler.set_begin_index(begin)
        z = scheduler.add_noise(y, eps, scheduler.timesteps[2])
        assert scheduler.step_index is None
        for i, t in enumerate(scheduler.timesteps[2:4]):
            z = scheduler.step(perfect(z, t), t, z).prev_sample
            assert scheduler.step_index == i + 3
            reached = scheduler.add_noise(y, eps, scheduler.timesteps[i + 3])
            torch.testing.assert_close(z, reached, atol=1e-5, rtol=1e-5)
        assert expected is None or torch.equal(z, expected)
        expected = z


def test_states_are_float32_whatever_the_pipeline_computes_in():
    scheduler = DiffusionBlocksScheduler()
    scheduler.set_timesteps(2)
    half = normal(*SHAPE).half()
    first, second = scheduler.timesteps
    out = scheduler.step(half, first, half)
    assert (out.prev_sample.dtype, out.pred_original_sample.dtype) == (torch.float32,) * 2
    last, denoised = scheduler.step(half, second, out.prev_sample, return_dict=False)
    assert torch.equal(last, half.float())
    assert last is denoised


def test_another_sample_needs_new_timesteps():
    scheduler = DiffusionBlocksScheduler()
    z = normal(*SHAPE)
    with pytest.raises(RuntimeError, match=r"set_timesteps\(\) must be called before each sample"):
        scheduler.step(z, 80.0, z)
    for _ in range(2):
        scheduler.set_timesteps(2)
        scheduler.step(z, 80.0, z)
        scheduler.step(z, scheduler.timesteps[1], z)
        with pytest.raises(RuntimeError, match="got a step after all 2 calls"):
            scheduler.step(z, 80.0, z)


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_call_that_is_not_the_next_is_refused(sampler):
    scheduler, z = DiffusionBlocksScheduler(sampler=sampler), normal(*SHAPE)
    scheduler.set_timesteps(5)
    first, second, *_, last = scheduler.timesteps
    scheduler.step(z, first, z)
    for other in (first, last, float(last)):
        with pytest.raises(ValueError, match=r"timestep must be that of call 1, .*; call step\(\)"):
            scheduler.step(z, other, z)
    scheduler.step(z, second.bfloat16(), z)
    assert scheduler.step_index == 2


@pytest.mark.parametrize("timestep", [0, 3.0, torch.tensor([80.0]), torch.tensor(1)])
def test_a_timestep_is_a_level(timestep):
    scheduler = DiffusionBlocksScheduler()
    scheduler.set_timesteps(3)
    z = normal(*SHAPE)
    with pytest.raises(ValueError, match=r"timestep must be an element of timesteps, \[80.0, "):
        scheduler.step(z, timestep, z)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of num_inference_steps and sigmas must be given"),
        ({"num_inference_steps": 2, "sigmas": [2.0, 1.0]}, "got num_inference_steps=2"),
        ({"num_inference_steps": 0}, "number of steps must be a positive integer"),
        ({"sigmas": [1.0, 2.0]}, "must be positive and descending"),
    ],
)
def test_wrong_timesteps(arguments, message):
    scheduler = DiffusionBlocksScheduler()
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_max": 0.001}, "sigma_max must be greater than sigma_min"),
        ({"partition": "even"}, "partition must be one of"),
        ({"spacing": "uniform"}, "spacing must be 'equal_mass' or 'karras'"),
        ({"spacing": "karras", "rho": 0.0}, "rho must be positive"),
        ({"noise": "edm"}, "noise must be 'paper' or 'unit_variance'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionBlocksScheduler(**options)


def test_an_absent_diffusers_is_named():
    code = """
import sys
from contextlib import nullcontext
sys.modules["diffusers"] = None
try:
    import dblocks.integrations.scheduler
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "needs the package diffusers" in done.stdout, done.stderr
    assert "pip install 'dblocks[hf]'" in done.stdout


# Heun's method and other densities


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_calls_are_those_of_sample_heun_bit_for_bit(num_steps):
    model, z = blocks_of(), noise()
    scheduler = DiffusionBlocksScheduler(sampler="heun")
    scheduler.set_timesteps(num_steps)
    sigmas = NoiseSchedule().steps(num_steps)
    of_calls = [s for i, s in enumerate(sigmas.tolist()) for _ in range(2 if i else 1)]
    assert scheduler.timesteps.tolist() == torch.tensor(of_calls).tolist()
    assert (scheduler.order, scheduler.num_inference_steps) == (2, num_steps)
    seen = []
    options = {"callback": seen.append, "labels": some_labels()}
    with pytest.warns(UserWarning, match="have no level") if num_steps < 3 else nullcontext():
        expected = sample_heun(model, z, sigmas, **options)
    states, denoised = loop(scheduler, model, z, labels=some_labels())
    assert torch.equal(denoised, expected)
    assert all(torch.equal(x, info["x"]) for x, info in zip(states[::2], seen, strict=True))


def test_heun_may_begin_in_the_middle():
    """As diffusers' pipelines do: at the number of the step times the order."""
    model, z = blocks_of(), 3 * noise() / 80
    sigmas = [3.0, 0.5, 0.1, 0.01]
    expected = sample_heun(model, z, sigmas, labels=some_labels())
    scheduler = DiffusionBlocksScheduler(sampler="heun")
    for begin in (None, 2 * scheduler.order):
        scheduler.set_timesteps(sigmas=[80.0, 9.0, *sigmas])
        if begin is not None:
            scheduler.set_begin_index(begin)
        x = z
        for t in scheduler.timesteps[2 * scheduler.order :]:
            with torch.no_grad():
                x = scheduler.step(model(x, t, labels=some_labels()), t, x).prev_sample
        assert torch.equal(x, expected)


@pytest.mark.parametrize("density", [CosineNoiseSchedule, LogUniformNoiseSchedule])
def test_other_densities(density, tmp_path):
    schedule = density(sigma_max=20.0, partition=(2.0, 0.3))
    scheduler = DiffusionBlocksScheduler.from_schedule(schedule, sampler="heun")
    scheduler.save_pretrained(tmp_path)
    for each in (scheduler, DiffusionBlocksScheduler.from_pretrained(tmp_path)):
        assert each.noise_schedule == schedule
        assert each.order == 2
        each.set_timesteps(5)
        assert torch.equal(each.sigmas, schedule.steps(5))


def test_schedules_that_a_config_does_not_hold():
    @dataclass(frozen=True)
    class Sharper(CosineNoiseSchedule):
        power: float = 2.0

    with pytest.raises(ValueError, match=r"got a Sharper with \['power'\]; call set_timesteps"):
        DiffusionBlocksScheduler.from_schedule(Sharper())
    with pytest.raises(TypeError, match=r"noise schedule, got a MaskSchedule; .* dblocks\.unmask"):
        DiffusionBlocksScheduler.from_schedule(MaskSchedule())
    for density in ("Sharp", "MaskSchedule"):
        with pytest.raises(ValueError, match=rf"one of .*'NoiseSchedule'.*, got '{density}'; see"):
            DiffusionBlocksScheduler(density=density)
    with pytest.raises(ValueError, match=r"sampler must be one of .*, got 'dpm'"):
        DiffusionBlocksScheduler(sampler="dpm")


def test_an_older_config_loads():
    new = DiffusionBlocksScheduler(spacing="karras", rho=5.0, noise="unit_variance")
    earlier = {"spacing": "kind", "noise": "initial_noise"}
    config = {earlier.get(key, key): value for key, value in new.config.items()}
    assert not {"spacing", "noise"} & set(config)
    old = DiffusionBlocksScheduler.from_config(config)
    assert dict(old.config) == dict(new.config)
    for scheduler in (old, new):
        scheduler.set_timesteps(7)
    assert torch.equal(old.sigmas, new.sigmas)
    assert old.init_noise_sigma == new.init_noise_sigma
