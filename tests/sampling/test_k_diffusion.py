"""The samplers of k-diffusion, unchanged, on a network in blocks."""

import pytest
import torch
from dit_tools import blocks_of, some_labels
from hub_tools import k_diffusion_sampling

from dblocks import NoiseSchedule, initial_noise, sample_euler
from tools import DEVICE, seeded

sampling = k_diffusion_sampling()
SAMPLERS = {
    # name -> model calls at each level but the last, and at the last
    "sample_euler": (1, 1),
    "sample_heun": (2, 1),
    "sample_dpmpp_2m": (1, 1),
    "sample_euler_ancestral": (1, 1),
    "sample_dpm_2_ancestral": (2, 1),
    "sample_lms": (1, 1),
}
SCHEDULE = NoiseSchedule()


def noise():
    return initial_noise((4, 3, 4, 6), SCHEDULE, generator=seeded()).to(DEVICE)


def grid(num_steps):
    return sampling.append_zero(SCHEDULE.steps(num_steps).float()).to(DEVICE)


@pytest.fixture
def model():
    with torch.no_grad():
        yield blocks_of()


def sample(name, model, sigmas, **options):
    cond = {"labels": some_labels(), "guidance_scale": options.pop("guidance_scale", 1.0)}
    run = getattr(sampling, name)
    return run(model, noise(), sigmas, extra_args=cond, disable=True, **options)


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_call_runs_the_block_that_owns_its_level(name, model):
    called, ran = [], []
    model.register_forward_pre_hook(lambda _, args: called.append(args[1]))
    for i, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    out = sample(name, model, grid(7))
    assert out.isfinite().all()
    each, last = SAMPLERS[name]
    assert len(called) == 6 * each + last
    owners = [int(SCHEDULE.block_of(sigma, 3)[0]) for sigma in called]
    assert set(owners) == {0, 1, 2}
    assert ran == [layer for b in owners for layer in (2 * b, 2 * b + 1)]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("num_steps", [3, 4, 7])
def test_its_euler_gives_the_same_as_ours(num_steps, guidance_scale, model):
    theirs, ours = [], []
    options = {"guidance_scale": guidance_scale}
    got = sample("sample_euler", model, grid(num_steps), callback=theirs.append, **options)
    expected = sample_euler(
        model, noise(), SCHEDULE.steps(num_steps), callback=ours.append, labels=some_labels(),
        **options,
    )  # fmt: skip
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    for info, own in zip(theirs, ours, strict=True):
        assert set(info) == set(own)
        assert info["i"] == own["i"]
        assert float(info["sigma_hat"]) == pytest.approx(own["sigma_hat"])
        torch.testing.assert_close(info["x"], own["x"], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(info["denoised"], own["denoised"], atol=1e-4, rtol=1e-4)


def test_its_noise_levels_are_our_karras_steps():
    theirs = sampling.get_sigmas_karras(9, SCHEDULE.sigma_min, SCHEDULE.sigma_max)
    torch.testing.assert_close(theirs[:-1].double(), SCHEDULE.steps(9, "karras"), rtol=1e-4, atol=0)
