import copy

import pytest
import torch
from masked_tools import lm_of as masked_of
from torch import nn

from dblocks.blocks import (
    BlocksConfig,
    ClassTarget,
    DiffusionBlocks,
    L2Target,
    MaskedTokenTarget,
    TokenTarget,
    make_optimizers,
    train_step,
    trained_at_top,
)
from dblocks.nn import NoiseEmbedding
from dblocks.sampling import initial_noise, sample_euler
from dblocks.schedules import MaskSchedule, NoiseSchedule
from tools import DEVICE, batch, normal, randomized, seeded, vit


class ConvDenoiser(nn.Module):
    """Denoises images by residual convolutions: the smallest complete model with an L2 loss."""

    target = L2Target("images")

    def __init__(self, channels=1, width=16, depth=3):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.noise = NoiseEmbedding(width)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def embed_condition(self, batch, drop):
        return None

    def run_layers(self, layers, z_in, level, condition):
        h = self.first(z_in) + self.noise(level.c_noise)[:, :, None, None]
        for layer in layers:
            h = h + layer(nn.functional.silu(h))
        return h

    def features(self, hidden):
        return self.last(hidden)


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
        (
            {"num_blocks": 2, "layers_per_block": (0, 6)},
            "layers_per_block must be a positive integer, got 0",
        ),
        ({"num_blocks": 2, "overlap": -1}, "overlap must not be negative, got -1"),
        ({"num_blocks": 2, "weighting": "min"}, "weighting must be one of .* got 'min'"),
        ({"num_blocks": 2, "shared": "all"}, "shared must be one of .* got 'all'"),
        (
            {"num_blocks": 2, "shared": "sum"},
            r"shared must be one of \('train', 'frozen', 'private', 'reduce'\), got 'sum'",
        ),
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


@pytest.mark.parametrize("schedule", [NoiseSchedule(), MaskSchedule()])
def test_the_share_of_draws_at_the_top(schedule):
    config = BlocksConfig(3, schedule=schedule)
    assert config.top_share == "auto"
    auto = {"cross_entropy": 0.6, "l2": 0.0, "masked_cross_entropy": 0.0}
    targets = (ClassTarget, TokenTarget, L2Target, MaskedTokenTarget)
    assert {target.loss_kind: target.top_share for target in targets} == auto
    for share in ("auto", 0.0, 0.25, 1.0):
        config = BlocksConfig(3, schedule=schedule, top_share=share)
        assert BlocksConfig.from_json(config.to_json()) == config
        network = masked_of() if isinstance(schedule, MaskSchedule) else ConvDenoiser()
        model = DiffusionBlocks(network, config)
        assert trained_at_top(model) == (share not in ("auto", 0.0))
    with pytest.raises(ValueError, match=r"top_share must be .*, got 'all'"):
        BlocksConfig.from_json('{"num_blocks": 3, "top_share": "all"}')
    with pytest.raises(ValueError, match=r"top_share must be 'auto' or a number .*, got 'all'"):
        BlocksConfig(3, top_share="all")


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_training_draws_the_share_and_routing_stays(share):
    model = DiffusionBlocks(vit(), BlocksConfig(3, top_share=share))
    sigma = model.loss(batch(200), 2, generator=seeded()).sigma
    assert (
        abs((sigma == 80).double().mean().item() - share)
        < 5 * (share * (1 - share) / 200) ** 0.5 + 1e-9
    )
    assert model.config.schedule.block_of(torch.tensor([80.0, 0.01]), 3).tolist() == [0, 2]
    view = model.block(2).loss(batch(200), generator=seeded())
    assert torch.equal(view.sigma, sigma)


def test_a_model_needs_layers():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        DiffusionBlocks(3, BlocksConfig(1))
    with pytest.raises(
        TypeError, match=r"Linear must hold its residual layers in an nn\.ModuleList"
    ):
        DiffusionBlocks(nn.Linear(2, 2), BlocksConfig(1))


def test_a_model_needs_all_members():
    class Partial(ConvDenoiser):
        features = None
        target = property()

    with pytest.raises(
        TypeError, match=r"Partial must have all .*got none of features\(\), target"
    ):
        DiffusionBlocks(Partial(), BlocksConfig(1))
    model = ConvDenoiser()
    model.target = L2Target("images")
    model.target.loss_kind = "mse"
    message = r"loss_kind of the target of ConvDenoiser must be one .* got 'mse'"
    with pytest.raises(ValueError, match=message):
        DiffusionBlocks(model, BlocksConfig(1))
    for target, got in (
        (torch.zeros(3), "Tensor without loss_kind, "),
        (L2Target, "the class L2T"),
    ):
        model = ConvDenoiser()
        model.target = target
        message = rf"target of ConvDenoiser must be a dblocks\.blocks\.Target, .* got {got}"
        with pytest.raises(TypeError, match=message):
            DiffusionBlocks(model, BlocksConfig(1))


# Loss


def test_an_l2_model_trains_and_samples():
    def images(n, seed):
        return 0.5 * normal(n, 1, 1, 1, seed=seed).sign().expand(-1, 1, 4, 4)

    model = DiffusionBlocks(ConvDenoiser().to(DEVICE), BlocksConfig(3))
    optimizers = make_optimizers(model, lambda params: torch.optim.AdamW(params, lr=1e-2))
    generator = seeded()
    for step in range(150):
        train_step(model, {"images": images(16, step)}, optimizers, generator=generator)
    y = images(64, 999)
    for b in range(3):
        losses = model.loss({"images": y}, b, generator=seeded(b)).losses
        assert losses.mean() < 0.6  # 1 for a network that predicts 0
    for sigma in (0.05, 0.3, 1.0):
        z = y + sigma * normal(64, 1, 4, 4)
        assert (model(z, sigma) - y).square().mean() < 0.7 * sigma**2
    schedule = model.config.schedule
    z = initial_noise((4, 1, 4, 4), schedule, generator=seeded()).to(DEVICE)
    assert sample_euler(model, z, schedule.steps(6)).abs().max() < 2  # from 80


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
        model(normal(2, 24), torch.tensor(1.0), block=b, images=batch(2)["images"])
        assert ran == list(range(first, last))


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
    images, z = batch(2)["images"], normal(2, 24)
    bound = model.bind(images=images)
    for b in range(3):
        assert torch.equal(
            bound(z, torch.tensor(1.0), block=b),
            model(z, torch.tensor(1.0), block=b, images=images),
        )


@pytest.mark.parametrize("first", ["frozen", "private"])
def test_two_configurations_of_one_network(first):
    network = vit()
    DiffusionBlocks(copy.deepcopy(network), BlocksConfig(3, shared=first))
    assert all(p.requires_grad for p in network.parameters())
    frozen = DiffusionBlocks(network, BlocksConfig(3, shared=first))
    DiffusionBlocks(network, BlocksConfig(2, shared=first))
    count = sum(not p.requires_grad for p in frozen.shared_parameters())
    with pytest.warns(UserWarning, match=f"shared='train' trains all parameters, got {count} out"):
        DiffusionBlocks(network, BlocksConfig(3))
    network.requires_grad_(True)
    model = DiffusionBlocks(network, BlocksConfig(3))
    assert all(p.requires_grad for p in model.parameters())


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
        z, images = normal(2, 24), batch(2)["images"]
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
