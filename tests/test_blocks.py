import copy
import math

import pytest
import torch
from torch import nn

from dblocks import functional as F
from dblocks.blocks import BlocksConfig, Bound, DiffusionBlocks, loss_factors
from dblocks.models.vit import ViT, ViTConfig
from dblocks.schedule import NoiseSchedule

SIZES = {"image_size": 8, "patch_size": 4, "width": 24, "depth": 6, "heads": 2, "num_classes": 5}


class Oracle(nn.Module):
    """Knows the clean target and predicts the F that leads to it: a perfect denoiser."""

    loss_kind = "l2"
    condition_drop = 0.0
    target_embedding = None

    def __init__(self, num_layers=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(num_layers))
        self.unused = nn.Parameter(torch.zeros(()))
        self.embedded = 0

    def sigma_shape(self, batch):
        return (batch["y"].shape[0],)

    def embed_target(self, batch):
        return batch["y"]

    def embed_condition(self, batch, drop=None):
        self.embedded += 1
        return batch["y"]

    def run_layers(self, layers, z_in, level, condition):
        for layer in layers:
            z_in = layer(z_in)
        return condition

    def read_out(self, hidden, z, level):
        s, c_skip, c_out = (v[:, None] for v in (level.sigma, level.c_skip, level.c_out))
        return (hidden - c_skip * z) / c_out + 0 * s

    def denoise(self, prediction, z, level):
        return F.edm_denoise(prediction, z, level.sigma, sigma_data=level.sigma_data)

    def score(self, hidden, z, level, y, seed, batch):
        f = self.read_out(hidden, z, level)
        return F.edm_loss(f, y, level.sigma, seed, sigma_data=level.sigma_data)


def vit(**options):
    torch.manual_seed(0)
    return ViT(ViTConfig(**{**SIZES, **options}))


def randomized(model):
    torch.manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def batch(n=8):
    generator = torch.Generator().manual_seed(2)
    return {"images": torch.randn(n, 3, 8, 8, generator=generator), "labels": torch.arange(n) % 5}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Layers


@pytest.mark.parametrize(
    ("num_layers", "num_blocks", "expected"),
    [
        (12, 3, ((0, 4), (4, 8), (8, 12))),
        (8, 3, ((0, 3), (3, 6), (6, 8))),
        (7, 3, ((0, 3), (3, 5), (5, 7))),
        (3, 3, ((0, 1), (1, 2), (2, 3))),
        (5, 1, ((0, 5),)),
    ],
)
def test_layers_are_spread_evenly(num_layers, num_blocks, expected):
    assert BlocksConfig(num_blocks).layer_ranges(num_layers) == expected


def test_layers_per_block():
    config = BlocksConfig(3, layers_per_block=(2, 4, 6))
    assert config.layer_ranges(12) == ((0, 2), (2, 6), (6, 12))
    with pytest.raises(ValueError, match=r"must sum to the number of layers, 11, got \(2, 4, 6\)"):
        config.layer_ranges(11)
    with pytest.raises(ValueError, match="num_blocks must be at most the number of layers, 2, got"):
        BlocksConfig(3).layer_ranges(2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be a positive integer, got 0"),
        ({"num_blocks": 2, "layers_per_block": (1, 1, 1)}, "must have num_blocks=2 entries"),
        ({"num_blocks": 2, "layers_per_block": (0, 6)}, "layers_per_block must be positive"),
        ({"num_blocks": 2, "overlap": -1}, "overlap must not be negative, got -1"),
        ({"num_blocks": 2, "weighting": "min"}, "weighting must be one of .* got 'min'"),
        ({"num_blocks": 2, "shared": "all"}, "shared must be one of .* got 'all'"),
        ({"num_blocks": 2, "shared": "reduce"}, "shared='reduce' needs block-parallel training"),
        ({"num_blocks": 3, "schedule": NoiseSchedule(partition=(1.0,))}, "1 inner boundaries"),
    ],
)
def test_config_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        BlocksConfig(**values)


def test_config_json():
    schedule = NoiseSchedule(sigma_max=10.0, partition=(1.0,))
    config = BlocksConfig(2, layers_per_block=(1, 5), schedule=schedule, weighting="clamped")
    assert BlocksConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="BlocksConfig has no field layers; its fields are"):
        BlocksConfig.from_json('{"num_blocks": 2, "layers": 3}')
    with pytest.raises(ValueError, match=r"config type must be one of .* got 'Cosine'"):
        BlocksConfig.from_json('{"num_blocks": 2, "schedule": {"type": "Cosine"}}')


def test_a_model_needs_layers():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        DiffusionBlocks(3, BlocksConfig(1))
    with pytest.raises(
        TypeError, match=r"Linear must hold its residual layers in an nn\.ModuleList"
    ):
        DiffusionBlocks(nn.Linear(2, 2), BlocksConfig(1))


# Loss


@pytest.mark.parametrize("counts", [(2, 2, 2), (1, 2, 3)])
def test_only_the_layers_of_a_block_run(counts):
    model = DiffusionBlocks(vit(), BlocksConfig(3, layers_per_block=counts))
    ran = []
    for i, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    for b, (first, last) in enumerate(model.layer_ranges):
        ran.clear()
        model.loss(batch(), b).loss.backward()
        assert ran == list(range(first, last))
        ran.clear()
        model(torch.randn(2, 24), torch.tensor(1.0), block=b, images=batch(2)["images"])
        assert ran == list(range(first, last))


def test_loss_repeats_from_a_generator():
    model = DiffusionBlocks(randomized(vit(image_drop=0.5)), BlocksConfig(3))
    first, again = (model.loss(batch(), 1, generator=seeded()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = model.loss(batch(), 1, generator=seeded(1))
    assert not torch.equal(first.sigma, other.sigma)
    lo, hi = model.config.schedule.range_of(1, 3, overlap=0.05)
    assert ((first.sigma >= lo) & (first.sigma <= hi)).all()


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
    expected["auto"] = expected["edm" if kind == "l2" else "batch_mean"]
    carried = losses * w if kind == "l2" else losses
    got = (loss_factors(weighting, kind, w) * carried).mean()
    torch.testing.assert_close(got, expected[weighting])


@pytest.mark.parametrize("weighting", ["edm", "clamped", "none", "batch_mean"])
def test_the_loss_is_weighted_cross_entropy(weighting):
    model = DiffusionBlocks(randomized(vit()), BlocksConfig(3, weighting=weighting))
    data = batch()
    draw = model.draw(data, 1, generator=seeded())
    got = model.loss_at(data, 1, draw)
    y = model.base_model.embed_target(data)
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
    model = DiffusionBlocks(Oracle(), BlocksConfig(3))
    y = torch.randn(4, 7, generator=seeded())
    z = y + sigma * torch.randn(4, 7, generator=seeded(1))
    torch.testing.assert_close(model(z, torch.tensor(sigma), y=y), y, atol=1e-4, rtol=1e-4)
    for b in range(3):
        assert model.loss({"y": y}, b).losses.max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sigma", [0.002, 80.0])
def test_the_ends_of_the_range_are_finite(sigma, dtype):
    model = DiffusionBlocks(randomized(vit()).to(dtype), BlocksConfig(2))
    data = {**batch(), "images": batch()["images"].to(dtype)}
    draw = model.draw(data, 0)._replace(sigma=torch.full((8,), sigma))
    result = model.loss_at(data, 0, draw)
    result.loss.backward()
    assert result.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_autocast_keeps_logits_and_state_in_float32():
    model = DiffusionBlocks(randomized(vit()), BlocksConfig(3))
    images = batch()["images"]
    z = torch.randn(8, 24, generator=seeded())
    inner = []
    layer = model.base_model.layers[0]
    layer.attention.register_forward_hook(lambda *args: inner.append(args[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
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
    z = torch.randn(3, 24, generator=seeded())
    for b, sigma in enumerate(model.config.schedule.boundaries(3)[:3].tolist()):
        assert torch.equal(
            model(z, torch.tensor(sigma), images=images),
            model(z, torch.full((3,), sigma), block=b, images=images),
        )


def test_arguments_are_checked():
    model = DiffusionBlocks(vit(), BlocksConfig(3))
    images, z = batch(2)["images"], torch.randn(2, 24)
    with pytest.raises(
        ValueError, match="sigma must lie in one block, got levels of blocks 0 to 2"
    ):
        model(z, torch.tensor([80.0, 0.002]), images=images)
    for block in (3, -1):
        with pytest.raises(ValueError, match=rf"block must be in 0\.\.2, got {block}"):
            model(z, torch.tensor(1.0), block=block, images=images)
        with pytest.raises(ValueError, match=rf"block must be in 0\.\.2, got {block}"):
            model.loss(batch(), block)
    with pytest.raises(ValueError, match=r"sigma must be a number or have shape \[N\] = \[2\]"):
        model(z, torch.ones(3), images=images)


def test_bind_embeds_the_condition_once():
    model = DiffusionBlocks(Oracle(), BlocksConfig(3))
    y = torch.randn(2, 4)
    bound = model.bind(y=y)
    assert isinstance(bound, Bound)
    for sigma in (80.0, 0.3, 0.01):
        bound(y, torch.tensor(sigma))
    assert model.base_model.embedded == 1


def test_guidance_is_linear_in_denoised_and_in_logits():
    model = DiffusionBlocks(randomized(vit(image_drop=0.1)), BlocksConfig(3))
    images, z, sigma = batch(2)["images"], torch.randn(2, 24), torch.tensor(1.0)
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


# Parameters


@pytest.mark.parametrize("shared", ["train", "frozen", "private"])
def test_every_parameter_belongs_to_one_block_or_is_shared(shared):
    model = DiffusionBlocks(vit(), BlocksConfig(3, shared=shared))
    groups = [list(model.block_parameters(b)) for b in range(3)] + [list(model.shared_parameters())]
    ids = [id(p) for group in groups for p in group]
    assert len(ids) == len(set(ids))
    tables = {id(c.target_embedding.weight) for c in model.copies}
    assert set(ids) | tables == {id(p) for p in model.parameters()}
    assert all(p.requires_grad == (shared == "train") for p in groups[3])


def test_private_blocks_agree_on_the_target_only():
    model = DiffusionBlocks(vit(), BlocksConfig(3, shared="private"))
    tables = [model.parts(b)[0].target_embedding.weight for b in range(3)]
    assert all(torch.equal(t, tables[0]) and not t.requires_grad for t in tables)
    heads = {id(model.parts(b)[0].classifier.weight) for b in range(3)}
    assert len(heads) == 3
    model.loss(batch(), 1).loss.backward()
    assert all(p.grad is None for b in (0, 2) for p in model.block_parameters(b))
    images, z = batch(2)["images"], torch.randn(2, 24)
    bound = model.bind(images=images)
    for b in range(3):
        assert torch.equal(
            bound(z, torch.tensor(1.0), block=b),
            model(z, torch.tensor(1.0), block=b, images=images),
        )


@pytest.mark.parametrize("shared", ["train", "private"])
def test_the_view_of_a_block(shared):
    model = DiffusionBlocks(randomized(vit()), BlocksConfig(3, shared=shared))
    whole = model.state_dict()
    for b in range(3):
        view = model.block(b)
        own = {id(p) for p in (*model.block_parameters(b), *model.shared_parameters())}
        held = {id(p) for p in view.parameters() if p.requires_grad}
        assert held <= own
        assert {id(p) for p in model.block_parameters(b)} <= held
        state = view.state_dict()
        assert all(state[key].data_ptr() == whole[key].data_ptr() for key in state)
        assert torch.equal(
            view.loss(batch(), generator=seeded()).loss,
            model.loss(batch(), b, generator=seeded()).loss,
        )
        z, images = torch.randn(2, 24), batch(2)["images"]
        sigma = torch.tensor(1.0)
        assert torch.equal(view(z, sigma, images=images), model(z, sigma, block=b, images=images))
    with pytest.raises(ValueError, match="block must be 2, the only one held here, got 0"):
        view.parts(0)


def test_state_dict_and_deepcopy():
    model = DiffusionBlocks(randomized(vit()), BlocksConfig(3))
    fresh = DiffusionBlocks(vit(), BlocksConfig(3))
    fresh.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    expected = model.loss(batch(), 1, generator=seeded()).loss
    for other in (fresh, twin):
        assert torch.equal(other.loss(batch(), 1, generator=seeded()).loss, expected)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


def test_print_blocks(capsys):
    model = DiffusionBlocks(vit(), BlocksConfig(3))
    model.print_blocks()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    count = sum(p.numel() for p in model.block_parameters(1))
    assert lines[2].split() == ["1", "2-3", "0.505", "to", "0.1796", f"{count:,}"]


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
    z, images = torch.randn(8, 24), batch()["images"]
    sigma = torch.full((8,), 1.0)
    torch.testing.assert_close(
        compiled(z, sigma, block=0, images=images), model(z, sigma, block=0, images=images)
    )


def test_the_weight_spans_the_range():
    w = NoiseSchedule().loss_weight(torch.tensor([80.0, 0.002]))
    assert w[1] / w[0] == pytest.approx(250_004 / 4.000156, rel=1e-4)
    assert math.isclose(loss_factors("clamped", "cross_entropy", w)[1].item(), 20)
