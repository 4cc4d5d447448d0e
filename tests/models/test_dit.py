from collections import Counter

import pytest
import torch
import torch.nn.functional as nnf
from dit_tools import SIZES, batch_of, blocks_of, dit_of, some_labels
from torch import nn

from dblocks.blocks import BlocksConfig, DiffusionBlocks, L2Target
from dblocks.models.dit import DiTConfig, generate_images
from dblocks.models.patches import sincos_positions, unpatchify
from dblocks.sampling import initial_noise, sample_euler, sampling_cost
from tools import DEVICE, seeded

# Patches and positions


def test_positions_of_another_size_span_the_native_image():
    native = sincos_positions((2, 4), 8, native=(2, 4)).view(2, 4, 8)
    triple = sincos_positions((6, 12), 8, native=(2, 4)).view(6, 12, 8)
    # The centre of every native patch is that of the middle one of its nine.
    torch.testing.assert_close(triple[1::3, 1::3], native)
    half = sincos_positions((2, 2), 8, native=(2, 4)).view(2, 2, 8)
    expected = torch.tensor([0.5, 2.5], dtype=torch.float64).sin().float()
    torch.testing.assert_close(half[0, :, 0], expected)
    torch.testing.assert_close(half[:, 0, 4:], native[:, 0, 4:])


@pytest.mark.parametrize(
    ("size", "patch", "channels"), [((4, 6), 2, 3), ((3, 9), 3, 1), ((2, 1), 1, 4)]
)
def test_unpatchify_undoes_patches(size, patch, channels):
    images = torch.randn(2, channels, *size, generator=seeded())
    numbers = patch * patch * channels
    # Filters that copy pixel (p, q, c) into column (p*patch + q)*channels + c.
    filters = torch.eye(numbers).view(numbers, patch, patch, channels).permute(0, 3, 1, 2)
    tokens = nnf.conv2d(images, filters, stride=patch).flatten(2).transpose(1, 2)
    grid = (size[0] // patch, size[1] // patch)
    assert torch.equal(unpatchify(tokens, grid, patch), images)


def test_other_sizes_than_the_trained_one():
    model = blocks_of()
    labels = some_labels(2)
    for size in ((8, 12), (2, 2), (6, 4)):
        images = generate_images(model, labels, image_size=size, num_steps=3, generator=seeded())
        assert images.shape == (2, 3, *size)
        loss = model.loss(batch_of(2, size=size), 1, generator=seeded()).loss
        assert loss.isfinite()
    native, square = (
        generate_images(model, labels, image_size=s, num_steps=3, generator=seeded())
        for s in (None, 4)
    )
    assert native.shape[2:] == (4, 6)
    assert square.shape[2:] == (4, 4)


# Blocks, sampling, guidance


@pytest.mark.parametrize("kind", ["equal_mass", "karras"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_step_runs_the_block_of_its_level_only(kind, guidance_scale):
    model = blocks_of()
    ran, calls, reported = [], Counter(), []
    for i, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))

    def callback(state):
        sigma = torch.tensor(state["sigma"], dtype=torch.float64)
        block = int(model.config.schedule.block_of(sigma, 3))
        times = 1 if guidance_scale == 1 else 2
        assert ran == [2 * block, 2 * block + 1] * times
        calls[block] += times
        reported.append(state["i"])
        ran.clear()

    generate_images(
        model, some_labels(), num_steps=13, spacing=kind, guidance_scale=guidance_scale,
        generator=seeded(), callback=callback,
    )  # fmt: skip
    assert reported == list(range(13))
    cost = sampling_cost(
        model, model.config.schedule.steps(13, kind), guidance_scale=guidance_scale
    )
    assert cost.calls == tuple(calls[b] for b in range(3))
    assert cost.layer_evaluations == 2 * sum(calls.values())


def test_the_cost_of_sampling():
    model = DiffusionBlocks(dit_of(depth=5), BlocksConfig(3))
    sigmas = model.config.schedule.steps(50)
    cost = sampling_cost(model, [*sigmas.tolist(), 0.0])
    assert cost.calls == (17, 16, 17)
    assert cost.layer_evaluations == 17 * 2 + 16 * 2 + 17
    assert sampling_cost(model, sigmas, guidance_scale=0).calls == (17, 16, 17)
    assert sampling_cost(model, sigmas, guidance_scale=2).calls == (34, 32, 34)
    assert sampling_cost(model, [80.0]).calls == (1, 0, 0)
    whole = DiffusionBlocks(dit_of(depth=5), BlocksConfig(1))
    assert sampling_cost(whole, sigmas).layer_evaluations == 250


def test_generating_is_euler_from_noise():
    model, labels = blocks_of(), some_labels()
    schedule = model.config.schedule
    z = initial_noise((4, 3, 4, 6), schedule, generator=seeded()).to(DEVICE)
    for options, sigmas, scale in (
        ({}, schedule.steps(50), 2.0),
        ({"num_steps": 20, "spacing": "karras"}, schedule.steps(20, "karras"), 2.0),
        ({"sigmas": [80.0, 0.4, 0.01], "guidance_scale": 1.5}, [80.0, 0.4, 0.01], 1.5),
    ):
        got = generate_images(model, labels, generator=seeded(), **options)
        expected = sample_euler(model, z, sigmas, labels=labels, guidance_scale=scale)
        assert torch.equal(got, expected)
        assert got.dtype == torch.float32
    other = generate_images(model, labels, num_steps=5, generator=seeded(), noise="unit_variance")
    assert not torch.equal(other, generate_images(model, labels, num_steps=5, generator=seeded()))


def test_guidance_of_one_and_zero_is_exact_and_one_call():
    model = blocks_of()
    z, labels = torch.randn(4, 3, 4, 6, generator=seeded()).to(DEVICE), some_labels()
    given = model.bind(labels=labels)(z, 0.3)
    no_drop = torch.zeros(4, dtype=torch.bool, device=DEVICE)
    network, layers = model.parts(1)
    level = model.config.schedule.level(torch.full((4,), 0.3, device=DEVICE))

    def prediction(drop):
        condition = network.embed_condition({"labels": labels}, drop)
        hidden = network.run_layers(layers, level.c_in.view(-1, 1, 1, 1) * z, level, condition)
        prediction = network.target.predict(network.features(hidden), z, level)
        return network.target.denoise(prediction, z, level)

    calls = []
    model.base_model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert torch.equal(model.bind(labels=labels, guidance_scale=1)(z, 0.3), given)
        null = model.bind(labels=labels, guidance_scale=0)(z, 0.3)
        assert len(calls) == 2
        assert torch.equal(given, prediction(no_drop))
        assert torch.equal(null, prediction(~no_drop))
        assert torch.equal(null, model.bind(labels=labels.flip(0), guidance_scale=0.0)(z, 0.3))
        guided = model.bind(labels=labels, guidance_scale=3)(z, 0.3)
    torch.testing.assert_close(guided, null + 3 * (given - null))
    assert not torch.allclose(null, given)


class GaussianImages(nn.Module):
    """The exact denoiser of N(mean, cov) images: layers count, and do nothing else.

    Denoised is `mean + cov (cov + sigma^2)^-1 (z - mean)`, the optimum of every block.
    """

    def __init__(self, mean, cov, depth=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(depth))
        self.target = Gaussian(mean, cov)

    def embed_condition(self, batch, drop=None):
        return None

    def run_layers(self, layers, z_in, level, condition):
        for layer in layers:
            z_in = layer(z_in)
        return z_in

    def features(self, hidden):
        return hidden


class Gaussian(L2Target):
    """Of features that are `c_in*z`."""

    def __init__(self, mean, cov):
        super().__init__("images")
        self.mean, self.cov = mean, cov

    def predict(self, features, z, level):
        values, vectors = torch.linalg.eigh(self.cov)
        c_in, sigma = level.c_in.view(-1, 1), level.sigma.view(-1, 1)
        x = (features.flatten(1) / c_in - self.mean) @ vectors
        denoised = self.mean + (x * values / (values + sigma**2)) @ vectors.T
        f = (denoised - level.c_skip.view(-1, 1) * z.flatten(1)) / level.c_out.view(-1, 1)
        return f.view_as(z)


def gaussian(n=20000):
    """Mean, covariance, and n images of 2x2 pixels."""
    factor = torch.randn(4, 4, generator=seeded(3), dtype=torch.float64) * 0.4
    mean, cov = (
        torch.tensor([0.5, -0.3, 0.0, 0.2]).double(),
        factor @ factor.T + 0.05 * torch.eye(4),
    )
    noise = torch.randn(n, 4, generator=seeded(4), dtype=torch.float64)
    images = mean + noise @ torch.linalg.cholesky(cov).T
    return mean, cov, images.view(n, 1, 2, 2)


def test_the_exact_denoiser_of_gaussian_images_gives_their_mean_and_covariance():
    mean, cov, _ = gaussian(1)
    model = DiffusionBlocks(GaussianImages(mean, cov), BlocksConfig(4))
    z = initial_noise((20000, 1, 2, 2), model.config.schedule, generator=seeded(5)).double()
    errors = []
    for steps in (100, 200):
        x = sample_euler(model, z, model.config.schedule.steps(steps)).flatten(1)
        errors.append((x.T.cov() - cov).norm().item())
    # The grid's error falls as 1/steps; what the draws leave is about |cov|/sqrt(20000).
    drawn = 4 * cov.norm().item() / 20000**0.5
    assert errors[1] < 0.65 * errors[0] + drawn
    assert errors[1] < 0.1 * cov.norm()
    torch.testing.assert_close(
        x.mean(0), mean, rtol=0, atol=5 * (cov.diagonal().max() / 2e4) ** 0.5
    )


def test_the_exact_denoiser_is_the_optimum_of_every_block():
    mean, cov, images = gaussian(4000)

    def losses(shift=0.0, scale=1.0):
        model = DiffusionBlocks(GaussianImages(mean + shift, scale * cov), BlocksConfig(4))
        return torch.stack(
            [model.loss({"images": images}, b, generator=seeded(b)).loss for b in range(4)]
        )

    # With the same noise, which the seeds give, a wrong denoiser can only be worse on average.
    exact = losses()
    for wrong in (losses(shift=0.5), losses(shift=-0.5), losses(scale=0.5), losses(scale=2.0)):
        assert (exact < wrong).all()


# Bad arguments


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 9}, r"image_size must be multiples of patch_size=2, got \(9, 9\)"),
        ({"image_size": (8, 0)}, r"image_size must be multiples of patch_size=2, got \(8, 0\)"),
        ({"depth": 0}, "depth must be positive, got 0"),
        ({"width": 26}, "width must be a multiple of 4, .* got 26"),
        ({"mlp_ratio": 0}, "mlp_ratio must leave the MLP a finite width of at least 1, got 0"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must leave the MLP a finite width"),
        ({"num_classes": -1}, "num_classes must not be negative, got -1"),
        ({"label_drop": 1.0}, r"label_drop must be in \[0, 1\), got 1.0"),
        ({"gate_init": -1.0}, r"gate_init must be a finite number >= 0, got -1.0"),
        ({"heads": 5}, "width must be a multiple of heads, got 24 and 5"),
        ({"conditioning": "none"}, r"one of \('dit', 'official'\), got 'none'; a denoiser must"),
    ],
)
def test_config_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        dit_of(**values)


def test_config_json():
    config = DiTConfig(**SIZES)
    assert DiTConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="DiTConfig has no field layers; its fields are"):
        DiTConfig.from_json('{"layers": 3}')


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.ones(4, dtype=torch.uint8)}, TypeError, "int64, got torch.uint8; call"),
        ({"labels": torch.ones(4, 1).long()}, ValueError, r"shape \[N\], got \[4, 1\]"),
        ({"labels": torch.ones(3).long()}, ValueError, "got 4 images and 3 labels; pair them"),
        ({"labels": torch.full((4,), 5)}, ValueError, r"labels must be in 0\.\.4, got 5\.\.5"),
        ({"labels": None}, ValueError, "a DiT's batch must hold a tensor 'labels'"),
        ({"images": None}, ValueError, "must hold a tensor 'images', got the keys"),
        ({"images": torch.ones(4, 3, 4, 6).byte()}, TypeError, "floating point, got torch.uint8"),
        ({"images": torch.ones(4, 1, 4, 6)}, ValueError, r"with C = 3 .* got \[4, 1, 4, 6\]"),
        ({"images": torch.ones(4, 3, 4, 5)}, ValueError, r"multiples of patch_size=2, got"),
        ({"images": torch.ones(3, 4, 6)}, ValueError, r"got \[3, 4, 6\]; resize or crop them"),
    ],
)
def test_batches_are_checked(change, error, message):
    model = DiffusionBlocks(dit_of().cpu(), BlocksConfig(3))
    data = {"images": torch.ones(4, 3, 4, 6), "labels": torch.ones(4).long(), **change}
    with pytest.raises(error, match=message):
        model.loss(data, 0)


def test_arguments_of_generate_images_are_checked():
    model, labels = blocks_of(), some_labels()
    with pytest.raises(ValueError, match="number of steps must be a positive integer, got 0"):
        generate_images(model, labels, num_steps=0)
    with pytest.raises(ValueError, match=r"one of num_steps and sigmas .* got num_steps=2 and"):
        generate_images(model, labels, num_steps=2, sigmas=[80.0, 0.1])
    with pytest.raises(ValueError, match="spacing must be 'equal_mass' or 'karras', got 'linear'"):
        generate_images(model, labels, spacing="linear")
    with pytest.raises(ValueError, match=r"multiples of patch_size=2, got \[4, 3, 5, 5\]"):
        generate_images(model, labels, image_size=5)
    with pytest.raises(ValueError, match="noise must be 'paper' or 'unit_variance', got 'none'"):
        generate_images(model, labels, noise="none")
    with pytest.raises(TypeError, match="the DiffusionBlocks of a DiT, got DiT; end to end"):
        generate_images(model.base_model, labels)
    with pytest.raises(TypeError, match=r"int64 tensor .* of the 5 classes, got int"):
        generate_images(model, 4)
    with pytest.raises(TypeError, match="number of images for a model without classes, got tensor"):
        generate_images(blocks_of(num_classes=0), labels)


def test_no_images():
    assert generate_images(blocks_of(), some_labels(0), num_steps=3).shape == (0, 3, 4, 6)
