import pytest
import torch

from dblocks import functional as F
from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.models import ViT, ViTConfig
from dblocks.sampling import initial_noise, sample_euler, sample_logits
from dblocks.schedules import NoiseSchedule

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCHEDULE = NoiseSchedule()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blocks(num_blocks=3):
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=4, width=24, depth=6, heads=2, num_classes=5)
    model = DiffusionBlocks(ViT(config), BlocksConfig(num_blocks))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.to(DEVICE)


def images(n=4):
    return torch.randn(n, 3, 8, 8, generator=seeded(5)).to(DEVICE)


def noise(n=4):
    return initial_noise((n, 24), SCHEDULE, generator=seeded()).to(DEVICE)


def k_diffusion_euler(model, x, sigmas, extra_args, callback=None):
    """The Euler sampler of k-diffusion, with its appended zero and without churn."""
    s_in = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in, **extra_args)
        d = (x - denoised) / sigmas[i]
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "denoised": denoised})
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


@pytest.mark.parametrize("num_steps", [3, 4, 7])
def test_a_k_diffusion_sampler_gives_the_same(num_steps):
    model = blocks()
    z = noise()
    sigmas = SCHEDULE.steps(num_steps)
    ours = sample_euler(model, z, sigmas, images=images())
    appended = torch.cat([sigmas.float(), torch.zeros(1)]).to(DEVICE)
    with torch.no_grad():
        theirs = k_diffusion_euler(model, z, appended, {"images": images()})
        bound = k_diffusion_euler(model.bind(images=images()), z, appended, {})
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert torch.equal(theirs, bound)
    # The grid rounded to float32 is routed as the exact one.
    rounded = sample_euler(model, z, appended, images=images())
    torch.testing.assert_close(rounded, ours, atol=1e-4, rtol=1e-4)


def test_each_step_calls_the_owner_of_its_level():
    model = blocks()
    embedded, ran, seen = [], [], []
    model.base_model.patches.register_forward_hook(lambda *_: embedded.append(1))
    for i, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i // 2))
    z = noise()
    sigmas = SCHEDULE.steps(4)
    denoised = sample_euler(model, z, sigmas, callback=seen.append, images=images())
    assert ran == [0, 0, 1, 1, 2, 2, 2, 2]
    assert len(embedded) == 1
    assert [set(info) for info in seen] == [{"x", "i", "sigma", "sigma_hat", "denoised"}] * 4
    assert [info["i"] for info in seen] == [0, 1, 2, 3]
    assert [info["sigma"] for info in seen] == [info["sigma_hat"] for info in seen]
    assert [info["sigma"] for info in seen] == sigmas.tolist()
    assert torch.equal(seen[0]["x"], z)
    assert seen[-1]["denoised"] is denoised
    assert not denoised.requires_grad


def test_no_look_up_of_blocks_on_the_device(monkeypatch):
    model = blocks()
    monkeypatch.setattr("dblocks.blocks.BoundDenoiser._owner", lambda *_: pytest.fail("looked up"))
    z = noise()
    sample_euler(model, z, SCHEDULE.steps(3), images=images())


def test_logits_are_those_of_the_last_call():
    model = blocks()
    z = noise()
    seen = []
    denoised = sample_euler(model, z, SCHEDULE.steps(3), callback=seen.append, images=images())
    logits = sample_logits(model, z, SCHEDULE.steps(3), images=images())
    with torch.no_grad():
        last = model.logits(seen[-1]["x"], torch.tensor(0.002), block=2, images=images())
    assert torch.equal(logits, last)
    rows = model.base_model.target_embedding.rows()
    torch.testing.assert_close(logits.softmax(-1) @ rows, denoised)


def test_a_perfect_denoiser_lands_on_the_noisy_target():
    y, eps = torch.randn(3, 8, generator=seeded()), torch.randn(3, 8, generator=seeded(1))
    seen = []
    sigmas = SCHEDULE.steps(6)
    perfect = lambda z, sigma: y
    got = sample_euler(perfect, y + 80 * eps, sigmas, callback=seen.append)
    assert torch.equal(got, y)
    for info in seen:
        torch.testing.assert_close(info["x"], y + info["sigma"] * eps, atol=1e-4, rtol=1e-4)


def test_euler_follows_the_flow_of_gaussian_data_to_first_order():
    s = 0.5
    wiener = lambda z, sigma: z * (s**2 / (sigma**2 + s**2))[:, None]
    start = torch.randn(1, 1, generator=seeded()).double()

    def error(n):
        sigmas = torch.logspace(0, -2, n, dtype=torch.float64)
        seen = []
        sample_euler(wiener, start, sigmas, callback=seen.append)
        exact = start * ((0.01**2 + s**2) / (1 + s**2)) ** 0.5
        return ((seen[-1]["x"] - exact) / exact).abs().item()

    errors = [error(n) for n in (51, 101, 201)]
    assert errors[0] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("steps", "skipped"), [(SCHEDULE.steps(2, "karras"), r"\[1\]"), ([80.0], r"\[1, 2\]")]
)
def test_skipped_blocks_are_named(steps, skipped):
    z = noise()
    with pytest.warns(UserWarning, match=f"have no level of blocks {skipped} of 3"):
        sample_euler(blocks(), z, steps, images=images())
    with pytest.warns(UserWarning, match=f"have no level of blocks {skipped} of 3"):
        sample_logits(blocks(), z, steps, images=images())


@pytest.mark.parametrize(
    ("steps", "advice"),
    [
        ([80.0, 0.3], "use at least 3 steps"),
        ([80.0, 70.0, 60.0], "use more steps or the equal_mass"),
    ],
)
def test_the_advice_where_blocks_are_skipped(steps, advice):
    with pytest.warns(UserWarning, match=advice):
        sample_euler(blocks(), noise(), steps, images=images())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_blocks", [2, 3, 6])
def test_a_grid_in_any_dtype_calls_the_owners(dtype, num_blocks):
    model = blocks(num_blocks)
    ran = []
    for i, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    grid = SCHEDULE.boundaries(num_blocks)[:-1].to(dtype)
    sample_euler(model, noise(), grid, images=images())
    assert ran == list(range(6))


def test_the_default_device_does_not_matter():
    model, z, x = blocks(), noise(), images()
    expected = sample_euler(model, z, SCHEDULE.steps(3), images=x)
    with torch.device("meta"):
        assert torch.equal(sample_euler(model, z, SCHEDULE.steps(3).tolist(), images=x), expected)


@pytest.mark.parametrize(
    "wrap",
    [
        torch.optim.swa_utils.AveragedModel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(torch.optim.swa_utils.AveragedModel(model), backend="eager"),
    ],
)
def test_wrappers_are_looked_through(monkeypatch, wrap):
    model = blocks()
    expected = sample_euler(model, noise(), SCHEDULE.steps(4), images=images())
    monkeypatch.setattr("dblocks.blocks.BoundDenoiser._owner", lambda *_: pytest.fail("looked up"))
    wrapped = wrap(model)
    assert torch.equal(sample_euler(wrapped, noise(), SCHEDULE.steps(4), images=images()), expected)
    assert sample_logits(wrapped, noise(), SCHEDULE.steps(4), images=images()).shape == (4, 5)


def test_other_wrappers_are_called():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = torch.nn.Identity()

        def forward(self, z, sigma):
            return 2 * z

    assert torch.equal(sample_euler(Twice(), torch.ones(1, 2), [1.0]), torch.full((1, 2), 2.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sampling_does_not_synchronise():
    model, z, x = blocks(), noise(), images()
    expected = sample_euler(model, z, SCHEDULE.steps(4), images=x)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = sample_euler(model, z, SCHEDULE.steps(4), images=x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([], "sigmas must hold at least one level above 0, got none"),
        ([0.0], "sigmas must hold at least one level above 0, got none"),
        ([1.0, 2.0], r"sigmas must be positive and descending, got \[1.0, 2.0\]"),
        ([1.0, -2.0], r"sigmas must be positive and descending, got \[1.0, -2.0\]"),
        ([1.0, 0.0, 0.0], "sigmas must be positive and descending"),
        ([float("nan"), 1.0], "sigmas must be positive and descending"),
    ],
)
def test_sigmas_are_checked(sigmas, message):
    with pytest.raises(ValueError, match=message):
        sample_euler(lambda z, sigma: z, torch.zeros(1, 2), sigmas)


def test_initial_noise():
    paper = initial_noise((20_000,), SCHEDULE, generator=seeded())
    assert paper.dtype == torch.float32
    assert torch.equal(paper, 80 * torch.randn(20_000, generator=seeded()))
    small = NoiseSchedule(sigma_max=1.0)
    unit = initial_noise((20_000,), small, noise="unit_variance", generator=seeded())
    torch.testing.assert_close(unit, 2**0.5 * torch.randn(20_000, generator=seeded()))
    with pytest.raises(ValueError, match="noise must be 'paper' or 'unit_variance', got 'edm'"):
        initial_noise((1,), SCHEDULE, noise="edm")


def test_one_euler_step_is_the_op():
    z, y = torch.randn(2, 3, generator=seeded()), torch.zeros(2, 3)
    seen = []
    sample_euler(lambda z, sigma: y, z, [2.0, 0.5], callback=seen.append)
    assert torch.equal(seen[1]["x"], F.euler_step(z, y, 2.0, 0.5))
