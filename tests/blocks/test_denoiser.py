import math

import pytest
import torch
from torch import nn

from dblocks import functional as F
from dblocks.blocks import (
    BlocksConfig,
    BoundDenoiser,
    DiffusionBlocks,
    L2Target,
)
from dblocks.blocks.denoiser import loss_factors
from dblocks.schedules import NoiseSchedule
from tools import DEVICE, batch, normal, randomized, seeded, vit


class Known(L2Target):
    """Of features that are the clean target."""

    def predict(self, features, z, level):
        s, c_skip, c_out = (v[:, None] for v in (level.sigma, level.c_skip, level.c_out))
        return (features - c_skip * z) / c_out + 0 * s


class Oracle(nn.Module):
    """Knows the clean target and predicts the F that leads to it: a perfect denoiser."""

    def __init__(self, num_layers=3):
        super().__init__()
        self.target = Known("y")
        self.layers = nn.ModuleList(nn.Identity() for _ in range(num_layers))
        self.unused = nn.Parameter(torch.zeros(()))
        self.embedded = 0

    def embed_condition(self, batch, drop=None):
        self.embedded += 1
        return batch["y"]

    def run_layers(self, layers, z_in, level, condition):
        for layer in layers:
            z_in = layer(z_in)
        return condition

    def features(self, hidden):
        return hidden


class SegmentTarget(L2Target):
    """Sequences [N, T, D], with a noise level for every segment."""

    def __init__(self, key, segments):
        super().__init__(key)
        self.segments = segments

    def sigma_shape(self, batch):
        return (len(batch["y"]), self.segments)

    def score(self, features, z, level, y, seed, batch):
        (N, T, D), S = y.shape, self.segments
        rows = (N * S, T // S, D)
        f, y, sigma = features.reshape(rows), y.reshape(rows), level.sigma.reshape(-1)
        return F.edm_loss(f, y, sigma, seed, sigma_data=level.sigma_data).view(N, S)


class Segments(Oracle):
    """Denoises sequences [N, T, D], with a noise level for every segment."""

    def __init__(self, segments):
        super().__init__()
        self.target = SegmentTarget("y", segments)

    def embed_condition(self, batch, drop=None):
        return None

    def run_layers(self, layers, z_in, level, condition):
        return z_in


# Loss


@pytest.mark.parametrize("segments", [1, 2, 6])
def test_a_sigma_for_every_segment(segments):
    model = DiffusionBlocks(Segments(segments).to(DEVICE), BlocksConfig(3))
    y = normal(4, 6, 5)
    draw = model.draw({"y": y}, 1, generator=seeded())
    result = model.loss_at({"y": y}, 1, draw)
    assert result.losses.shape == result.weight.shape == (4, segments)
    f = F.noise_inject(y, draw.sigma, draw.seed).z_in
    whole = F.edm_loss(f, y, draw.sigma, draw.seed)
    torch.testing.assert_close(result.losses.mean(1), whole)
    z = normal(4, 6, 5, seed=1)
    tokens = draw.sigma.repeat_interleave(6 // segments, dim=1)
    torch.testing.assert_close(model(z, draw.sigma, block=1), model(z, tokens, block=1))


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda losses: losses[:, None], r"\[4, 1\]"),
        (lambda losses: losses.mean(), r"\[\]"),
        (lambda losses: losses.sum().expand(1), r"\[1\]"),
    ],
)
def test_one_loss_for_each_sigma(monkeypatch, change, shape):
    model = DiffusionBlocks(Oracle().to(DEVICE), BlocksConfig(3))
    target = model.base_model.target
    score = target.score
    target.score = lambda *args: change(score(*args))
    with pytest.raises(ValueError, match=rf"one loss for each sigma, \[4\], got {shape}; average"):
        model.loss({"y": normal(4, 7)}, 0)


def test_one_loss_for_each_token():
    model = DiffusionBlocks(Segments(6).to(DEVICE), BlocksConfig(3))
    model.base_model.target.score = lambda features, z, level, y, seed, batch: F.edm_loss(
        features, y, level.sigma, seed
    )
    with pytest.raises(ValueError, match=r"one loss for each sigma, \[4, 6\], got \[4\]"):
        model.loss({"y": normal(4, 6, 5)}, 0)


def test_loss_repeats_from_a_generator():
    model = DiffusionBlocks(randomized(vit(image_drop=0.5)), BlocksConfig(3))
    first, again = (model.loss(batch(), 1, generator=seeded()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = model.loss(batch(), 1, generator=seeded(1))
    assert not torch.equal(first.sigma, other.sigma)
    lo, hi = model.config.schedule.range_of(1, 3, overlap=0.05)
    at_top = first.sigma == 80.0  # a share of .6, as by default with classes
    assert (at_top | (first.sigma >= lo) & (first.sigma <= hi)).all()
    assert 0 < at_top.sum() < 8


@pytest.mark.parametrize("weighting", ["auto", "edm", "clamped", "none", "batch_mean"])
@pytest.mark.parametrize("kind", ["cross_entropy", "l2"])
def test_weightings_are_their_formulas(weighting, kind):
    w = torch.tensor([4.1, 30.0, 250_004.0])
    losses = torch.tensor([1.0, 2.0, 0.5])
    expected = {
        "edm": (w * losses).mean(),
        "clamped": (w.clamp(max=20) * losses).mean(),
        "none": losses.mean(),
        "batch_mean": w.mean() * losses.mean(),
    }
    expected["auto"] = expected["edm" if kind == "l2" else "none"]
    carried = losses * w if kind == "l2" else losses
    got = (loss_factors(weighting, kind, w) * carried).mean()
    torch.testing.assert_close(got, expected[weighting])


@pytest.mark.parametrize("weighting", ["edm", "clamped", "none", "batch_mean"])
def test_the_loss_is_weighted_cross_entropy(weighting):
    model = DiffusionBlocks(randomized(vit()), BlocksConfig(3, weighting=weighting))
    data = batch()
    draw = model.draw(data, 1, generator=seeded())
    got = model.loss_at(data, 1, draw)
    y = model.base_model.target.embed(data)
    z, _ = F.noise_inject(y, draw.sigma, draw.seed)
    logits = model.logits(z, draw.sigma, block=1, images=data["images"])
    losses = nn.functional.cross_entropy(logits, data["labels"], reduction="none")
    torch.testing.assert_close(got.losses, losses)
    w = model.config.schedule.loss_weight(draw.sigma)
    torch.testing.assert_close(
        got.loss, (loss_factors(weighting, "cross_entropy", w) * losses).mean()
    )


@pytest.mark.parametrize("sigma", [0.002, 0.18, 0.5, 3.0, 80.0])
def test_a_perfect_denoiser_recovers_the_target(sigma):
    model = DiffusionBlocks(Oracle().to(DEVICE), BlocksConfig(3))
    y = normal(4, 7)
    z = y + sigma * normal(4, 7, seed=1)
    torch.testing.assert_close(model(z, torch.tensor(sigma), y=y), y, atol=1e-4, rtol=1e-4)
    for b in range(3):
        assert model.loss({"y": y}, b).losses.max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma", [0.002, 80.0])
def test_the_ends_of_the_range_are_finite(sigma, dtype):
    model = DiffusionBlocks(randomized(vit()).to(dtype), BlocksConfig(2))
    data = {**batch(), "images": batch()["images"].to(dtype)}
    draw = model.draw(data, 0)._replace(sigma=torch.full((8,), sigma, device=DEVICE))
    result = model.loss_at(data, 0, draw)
    result.loss.backward()
    assert result.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_autocast_keeps_logits_and_state_in_float32():
    model = DiffusionBlocks(randomized(vit()), BlocksConfig(3))
    images = batch()["images"]
    z = normal(8, 24)
    inner = []
    layer = model.base_model.layers[0]
    layer.attention.register_forward_hook(lambda *args: inner.append(args[2].dtype))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = [
            model(z, torch.tensor(1.0), block=0, images=images),
            model.logits(z, torch.tensor(1.0), block=0, images=images),
            *model.loss(batch(), 0),
        ]
    assert inner[0] == torch.bfloat16
    assert all(o.dtype == torch.float32 for o in outputs)
    exact = model.logits(z, torch.tensor(1.0), block=0, images=images)
    torch.testing.assert_close(outputs[1], exact, atol=0.1, rtol=0.1)


# Calling


def test_the_owner_of_sigma_runs():
    model = DiffusionBlocks(randomized(vit()), BlocksConfig(3))
    images = batch(3)["images"]
    z = normal(3, 24)
    for b, sigma in enumerate(model.config.schedule.boundaries(3)[:3].tolist()):
        assert torch.equal(
            model(z, torch.tensor(sigma), images=images),
            model(z, torch.full((3,), sigma, device=DEVICE), block=b, images=images),
        )


def test_arguments_are_checked():
    model = DiffusionBlocks(vit(), BlocksConfig(3))
    images, z = batch(2)["images"], normal(2, 24)
    with pytest.raises(
        ValueError, match="sigma must lie in one block, got levels of blocks 0 to 2"
    ):
        model(z, torch.tensor([80.0, 0.002]), images=images)
    for block in (3, -1):
        with pytest.raises(ValueError, match=rf"block must be in 0\.\.2, got {block}"):
            model(z, torch.tensor(1.0), block=block, images=images)
        with pytest.raises(ValueError, match=rf"block must be in 0\.\.2, got {block}"):
            model.loss(batch(), block)
    with pytest.raises(ValueError, match=r"sigma must be a number or have shape \[N\] = \[2\] or"):
        model(z, torch.ones(3), images=images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_blocks", [2, 3, 6])
def test_a_boundary_in_any_dtype_is_the_block_below_it(dtype, num_blocks):
    model = DiffusionBlocks(randomized(vit()), BlocksConfig(num_blocks))
    images, z = batch(2)["images"], normal(2, 24)
    for b, sigma in enumerate(model.config.schedule.boundaries(num_blocks)[:-1].to(dtype)):
        got = model(z, sigma, images=images)
        assert torch.equal(got, model(z, sigma, block=b, images=images))
        assert torch.equal(got, model(z, sigma.to(DEVICE).expand(2), images=images))
        if dtype == torch.float64:
            assert torch.equal(got, model(z, sigma.item(), images=images))


@pytest.mark.parametrize(
    ("z", "sigma", "message"),
    [
        ((2, 24), (2, 24), r"z must have shape \[N, T, D\] .* \[2, 24\], got \[2, 24\]"),
        ((2, 6, 5), (2, 4), r"T a multiple of S where sigma is \[N, S\] = \[2, 4\], got \[2, 6"),
        ((2, 6, 5), (2, 0), r"T a multiple of S where sigma is \[N, S\] = \[2, 0\]"),
        ((2, 6, 5), (2, 6, 5), r"sigma must be a number or have shape .* got \[2, 6, 5\]"),
        ((2, 6, 5), (1,), r"sigma must be a number or have shape \[N\] = \[2\] .* got \[1\]"),
    ],
)
def test_shapes_of_sigma_are_checked(z, sigma, message):
    model = DiffusionBlocks(Segments(2).to(DEVICE), BlocksConfig(3))
    with pytest.raises(ValueError, match=message):
        model(normal(*z), torch.ones(sigma, device=DEVICE), block=0)
    with pytest.raises(TypeError, match=r"sigma must be floating point, got torch\.int64"):
        model(normal(*z), torch.ones(2, dtype=torch.int64, device=DEVICE))
    for other in ("1", True):
        with pytest.raises(TypeError, match=f"sigma must be a number or a tensor, got {other!r}"):
            model(normal(*z), other)


def test_the_default_device_does_not_matter():
    model = DiffusionBlocks(randomized(vit(image_drop=0.5)), BlocksConfig(3))
    expected = model.loss(batch(), 1, generator=seeded())
    data, z = batch(), normal(8, 24)
    with torch.device("meta"):
        there = model.loss(data, 1, generator=seeded())
        denoised = model(z, 0.3, images=data["images"], guidance_scale=2.0)
    assert all(torch.equal(a, b) for a, b in zip(there, expected, strict=True))
    assert torch.equal(denoised, model(z, 0.3, images=data["images"], guidance_scale=2.0))


@pytest.mark.parametrize("shared", ["train", "private"])
@pytest.mark.parametrize("layer", [nn.Identity, lambda: nn.Linear(4, 4)])
def test_a_model_may_hold_no_parameters_outside_its_layers(layer, shared):
    oracle = Oracle()
    del oracle.unused
    oracle.layers = nn.ModuleList(layer() for _ in range(3))
    model = DiffusionBlocks(oracle.to(DEVICE), BlocksConfig(3, shared=shared))
    y = normal(2, 4)
    for b in range(3):
        assert model.loss({"y": y}, b).sigma.device == y.device
        assert model.block(b).loss({"y": y}).sigma.device == y.device
    assert torch.equal(model(y, 1.0, y=y), model(y, 1.0, y=y, guidance_scale=2.0))


def test_bind_embeds_the_condition_once():
    model = DiffusionBlocks(Oracle().to(DEVICE), BlocksConfig(3))
    y = normal(2, 4)
    bound = model.bind(y=y)
    assert isinstance(bound, BoundDenoiser)
    for sigma in (80.0, 0.3, 0.01):
        bound(y, torch.tensor(sigma))
    assert model.base_model.embedded == 1


def test_guidance_is_linear_in_denoised_and_in_logits():
    model = DiffusionBlocks(randomized(vit(image_drop=0.1)), BlocksConfig(3))
    images, z, sigma = batch(2)["images"], normal(2, 24), torch.tensor(1.0)
    for call in (model, model.logits):
        zero, one, three = (
            call(z, sigma, images=images, guidance_scale=g) for g in (0.0, 1.0, 3.0)
        )
        torch.testing.assert_close(three, zero + 3 * (one - zero))
        assert not torch.allclose(zero, one)
        assert torch.equal(zero, call(z, sigma, images=images + 1, guidance_scale=0.0))
    plain = DiffusionBlocks(vit(), BlocksConfig(3))
    with pytest.raises(ValueError, match=r"guidance needs .* set ViTConfig\.image_drop above 0"):
        plain(z, sigma, images=images, guidance_scale=2.0)


# Compilation


def test_the_loss_compiles_as_one_graph():
    model = DiffusionBlocks(randomized(vit(image_drop=0.3)), BlocksConfig(3))
    data = batch()
    compiled = torch.compile(model.loss_at, fullgraph=True, backend="aot_eager")
    draw = model.draw(data, 1, generator=seeded())
    got = compiled(data, 1, draw)
    expected = model.loss_at(data, 1, draw)
    torch.testing.assert_close(got.loss, expected.loss)
    grads = torch.autograd.grad(got.loss, list(model.block_parameters(1)))
    for a, b in zip(
        grads, torch.autograd.grad(expected.loss, list(model.block_parameters(1))), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_call_compiles_as_one_graph():
    model = DiffusionBlocks(randomized(vit()), BlocksConfig(3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    z, images = normal(8, 24), batch()["images"]
    sigma = torch.full((8,), 1.0, device=DEVICE)
    torch.testing.assert_close(
        compiled(z, sigma, block=0, images=images), model(z, sigma, block=0, images=images)
    )


def test_the_weight_spans_the_range():
    w = NoiseSchedule().loss_weight(torch.tensor([80.0, 0.002]))
    assert w[1] / w[0] == pytest.approx(250_004 / 4.000156, rel=1e-4)
    assert math.isclose(loss_factors("clamped", "cross_entropy", w)[1].item(), 20)
