"""Heun's method: of images, classes and text, against closed forms and k-diffusion's recipe."""

import pytest
import torch

from dblocks import functional as F
from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.models import DiT, DiTConfig, ViT, ViTConfig
from dblocks.models.dit import generate_images
from dblocks.models.vit import classify
from dblocks.sampling import (
    generate,
    initial_noise,
    sample_euler,
    sample_heun,
    sample_logits,
    sampling_cost,
    stream,
)
from dblocks.sampling.steps import Steps
from dblocks.schedules import NoiseSchedule
from lm_tools import blocks_of as text_blocks_of
from lm_tools import lm_of
from tools import DEVICE, randomized, seeded

SCHEDULE = NoiseSchedule()


def vit_blocks(**options):
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=4, width=24, depth=3, heads=2, num_classes=5)
    return DiffusionBlocks(randomized(ViT(config)).to(DEVICE), BlocksConfig(3, **options))


def dit_blocks():
    torch.manual_seed(0)
    config = DiTConfig(
        image_size=4, patch_size=2, width=12, depth=3, heads=2, num_classes=5, channels=3
    )
    return DiffusionBlocks(randomized(DiT(config)).to(DEVICE), BlocksConfig(3))


def images():
    return torch.randn(4, 3, 8, 8, generator=seeded(5)).to(DEVICE)


def noise():
    return initial_noise((4, 24), SCHEDULE, generator=seeded()).to(DEVICE)


def heun_of_k_diffusion(model, x, sigmas):
    """k-diffusion's sample_heun, without churn; `sigmas` end with 0."""
    ones = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        d = (x - model(x, sigmas[i] * ones)) / sigmas[i]
        dt = sigmas[i + 1] - sigmas[i]
        if sigmas[i + 1] == 0:
            x = x + d * dt
        else:
            x_2 = x + d * dt
            d_2 = (x_2 - model(x_2, sigmas[i + 1] * ones)) / sigmas[i + 1]
            x = x + (d + d_2) / 2 * dt
    return x


@pytest.mark.parametrize(("sample", "order"), [(sample_euler, 1), (sample_heun, 2)])
def test_the_flow_of_gaussian_data_is_followed_to_the_order_of_the_sampler(sample, order):
    """Data of N(0, s^2): the flow takes z to z*sqrt((s^2 + sigma_next^2)/(s^2 + sigma^2))."""
    s = 0.5
    wiener = lambda z, sigma: z * (s**2 / (sigma**2 + s**2))[:, None]
    start = torch.randn(1, 1, generator=seeded()).double()
    exact = start * ((0.01**2 + s**2) / (1 + s**2)) ** 0.5

    def error(n):
        seen = []
        sample(wiener, start, torch.logspace(0, -2, n).double(), callback=seen.append)
        assert [info["i"] for info in seen] == list(range(n))
        return ((seen[-1]["x"] - exact) / exact).abs().item()

    errors = [error(n) for n in (51, 101, 201)]
    assert errors[0] < 0.05**order
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_the_recipe_of_k_diffusion_gives_the_same(n):
    s, start = 0.5, 80 * torch.randn(3, 7, generator=seeded()).double()
    wiener = lambda z, sigma: z.sin() * (s**2 / (sigma**2 + s**2))[:, None]
    sigmas = SCHEDULE.steps(n)
    got = sample_heun(wiener, start, sigmas)
    expected = heun_of_k_diffusion(wiener, start, torch.cat([sigmas, torch.zeros(1)]))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(got, sample_heun(wiener, start, [*sigmas.tolist(), 0.0]))


def test_one_step_is_the_formula():
    z, called = torch.tensor([[4.0, -2.0]]), []

    def model(z, sigma):
        called.append((z, sigma.item()))
        return z / 4 + sigma[:, None]

    got = sample_heun(model, z, [2.0, 0.5])
    d = (z - (z / 4 + 2)) / 2
    middle = z - 1.5 * d
    d_2 = (middle - (middle / 4 + 0.5)) / 0.5
    last = z - 1.5 * (d + d_2) / 2
    torch.testing.assert_close(got, last / 4 + 0.5)
    assert [sigma for _, sigma in called] == [2.0, 0.5, 0.5]
    assert torch.equal(called[1][0], F.euler_step(z, z / 4 + 2, 2.0, 0.5))
    torch.testing.assert_close(called[2][0], last)


def test_each_call_runs_the_owner_of_its_level_and_the_cost_counts_them():
    model, ran = vit_blocks(), []
    for i, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    seen = []
    sigmas = SCHEDULE.steps(4)
    assert SCHEDULE.block_of(sigmas, 3).tolist() == [0, 1, 2, 2]
    denoised = sample_heun(model, noise(), sigmas, callback=seen.append, images=images())
    assert ran == [0, 1, 1, 2, 2, 2, 2]
    assert sampling_cost(model, sigmas, sampler="heun") == ((1, 2, 4), 7)
    assert sampling_cost(model, sigmas, sampler="heun", guidance_scale=2.0) == ((2, 4, 8), 14)
    assert [info["sigma"] for info in seen] == sigmas.tolist()
    assert seen[-1]["denoised"] is denoised
    logits = sample_logits(model, noise(), sigmas, sampler="heun", images=images())
    expected = model.logits(seen[-1]["x"], torch.tensor(0.002), block=2, images=images())
    assert torch.equal(logits, expected)


def test_a_skipped_block_is_named_where_it_was_asked_for():
    with pytest.warns(UserWarning, match=r"have no level of blocks \[1, 2\]") as caught:
        sample_heun(vit_blocks(), noise(), [80.0], images=images())
    assert caught[0].filename == __file__


# Images, classes, text


def test_images_are_generated():
    model, labels = dit_blocks(), torch.arange(5, device=DEVICE)
    options = {"num_steps": 5, "guidance_scale": 1.5}
    got = generate_images(model, labels, generator=seeded(), sampler="heun", **options)
    z = initial_noise((5, 3, 4, 4), SCHEDULE, generator=seeded()).to(DEVICE)
    expected = sample_heun(model, z, SCHEDULE.steps(5), labels=labels, guidance_scale=1.5)
    assert torch.equal(got, expected)
    euler = generate_images(model, labels, generator=seeded(), **options)
    assert not torch.equal(got, euler)
    with pytest.raises(ValueError, match=r"sampler must be one of .*'heun'.*, got 'dpm'"):
        generate_images(model, labels, sampler="dpm")


def test_images_are_classified():
    model, z = vit_blocks(top_share=0.6), torch.zeros(4, 24, device=DEVICE)
    got = classify(model, images(), num_steps=4, sampler="heun")
    expected = sample_logits(model, z, SCHEDULE.steps(4), sampler="heun", images=images())
    assert torch.equal(got, expected)
    assert not torch.equal(got, classify(model, images(), num_steps=4))
    with pytest.raises(ValueError, match=r"product .* takes no steps, .* got 'heun'; give num_st"):
        classify(model, images(), sampler="heun")


@pytest.mark.parametrize("num_steps", [1, 3, 4])
def test_text_is_the_sampler_over_the_whole_sequence(num_steps):
    model, prompt = text_blocks_of(), [1, 2, 3]
    options = {"max_new_tokens": 1, "num_steps": num_steps, "sampler": "heun", "temperature": 0.0}
    (token,) = generate(model, [prompt], generator=seeded(), **options)
    (again,) = generate(model, [prompt], generator=seeded(), cache=False, **options)
    drawn = int(torch.randint(2**63 - 1, (), generator=seeded()))
    zeros, one = torch.zeros(1, 16, device=DEVICE), torch.ones((), device=DEVICE)
    z = torch.zeros(1, 4, 16, device=DEVICE)
    z[:, -1] = 80 * F.noise_inject(zeros, one, drawn).z
    tokens = torch.tensor([[*prompt, 0]], device=DEVICE)
    if num_steps == 1:
        logits = model.logits(z, 80.0, block=0, tokens=tokens)
    else:
        sigmas = SCHEDULE.steps(num_steps)
        logits = sample_logits(model, z, sigmas, sampler="heun", tokens=tokens)
    assert token.tolist() == again.tolist() == [int(logits[0, -1].argmax())]


def test_what_takes_no_steps_takes_no_sampler():
    prompts = {"prompts": [[1, 2]], "max_new_tokens": 1}
    with pytest.raises(ValueError, match=r"for a plain CausalLM, .* got 'heun'; leave it out"):
        stream(lm_of(), sampler="heun", **prompts)
    with pytest.raises(ValueError, match=r"product makes no steps .* got 'heun'; leave it out"):
        stream(text_blocks_of(), sampler="heun", product=True, **prompts)
    for model in (lm_of(), text_blocks_of()):
        with pytest.raises(ValueError, match=r"sampler must be one of .*, got 'dpm'"):
            stream(model, sampler="dpm", **prompts)
    steps = Steps([2.0, 1.0], "heun")
    with pytest.raises(RuntimeError, match="call 1 of heun's method must follow the first call"):
        steps.after(1, torch.ones(1, 2), torch.ones(1, 2))
