import copy

import pytest
import torch
from torch import nn

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.models.vit import ViT, ViTConfig
from dblocks.train import make_optimizers, train_step

SIZES = {"image_size": 8, "patch_size": 4, "width": 24, "depth": 6, "heads": 2, "num_classes": 5}
FACTORIES = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


@pytest.fixture(autouse=True)
def _one_thread():
    # For operators this small a second thread only waits.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(shared="train", **options):
    torch.manual_seed(0)
    vit = ViT(ViTConfig(**{**SIZES, **options}))
    for p in vit.parameters():
        nn.init.normal_(p, std=0.1)
    return DiffusionBlocks(vit, BlocksConfig(3, shared=shared))


def batch(n=8):
    generator = torch.Generator().manual_seed(2)
    return {"images": torch.randn(n, 3, 8, 8, generator=generator), "labels": torch.arange(n) % 5}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def snapshot(model, optimizers, block):
    own = [p.detach().clone() for p in model.block_parameters(block)]
    return own, copy.deepcopy(optimizers.blocks[block].state_dict())


def assert_equal_states(first, second):
    assert first["param_groups"] == second["param_groups"]
    assert first["state"].keys() == second["state"].keys()
    for key, values in first["state"].items():
        for name, value in values.items():
            other = second["state"][key][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize("shared", ["train", "frozen", "private"])
@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_step_leaves_other_blocks_alone(shared, factory, clip):
    model = model_of(shared)
    optimizers = make_optimizers(model, FACTORIES[factory])
    for b in range(3):
        train_step(model, batch(), optimizers, block=b, generator=seeded(b))
    before = [snapshot(model, optimizers, b) for b in range(3)]
    fixed = [p.clone() for p in model.parameters() if not p.requires_grad]
    train_step(model, batch(), optimizers, block=1, generator=seeded(9), clip_grad_norm=clip)
    for b in range(3):
        own, state = snapshot(model, optimizers, b)
        same = all(torch.equal(p, q) for p, q in zip(own, before[b][0], strict=True))
        assert same == (b != 1)
        if b != 1:
            assert_equal_states(state, before[b][1])
    after = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(p, q) for p, q in zip(after, fixed, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_gradients_reach_one_block_and_the_shared_parameters():
    model = model_of()
    model.loss(batch(), 2).loss.backward()
    reached = {id(p) for p in model.parameters() if p.grad is not None}
    unused = {id(model.base_model.class_token)}
    expected = {id(p) for p in (*model.block_parameters(2), *model.shared_parameters())}
    assert reached == expected - unused


def test_the_shared_optimizer():
    assert make_optimizers(model_of("frozen"), FACTORIES["sgd"]).shared is None
    assert make_optimizers(model_of("private"), FACTORIES["sgd"]).shared is None
    optimizers = make_optimizers(model_of(), FACTORIES["sgd"])
    assert optimizers.shared is not None
    assert list(optimizers) == [*optimizers.blocks, optimizers.shared]
    assert optimizers.of_block(1) == (optimizers.blocks[1], optimizers.shared)


def test_everything_follows_from_the_generator():
    def run(seed):
        model = model_of(image_drop=0.2)
        optimizers = make_optimizers(model, FACTORIES["adamw"])
        generator = seeded(seed)
        results = [train_step(model, batch(), optimizers, generator=generator) for _ in range(6)]
        return [r.block for r in results], torch.stack([r.loss for r in results])

    blocks, losses = run(0)
    again, same = run(0)
    assert blocks == again
    assert torch.equal(losses, same)
    assert not torch.equal(losses, run(1)[1])


def test_blocks_are_drawn_uniformly_and_drawn_is_trained():
    model = model_of(depth=3)
    optimizers = make_optimizers(model, lambda params: torch.optim.SGD(params, lr=0.0))
    ran = []
    for i, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    generator = seeded()
    drawn = [train_step(model, batch(1), optimizers, generator=generator).block for _ in range(60)]
    assert drawn == ran
    assert min(drawn.count(b) for b in range(3)) > 10


def test_what_a_step_returns():
    model = model_of()
    optimizers = make_optimizers(model, FACTORIES["sgd"])
    expected = model.loss(batch(), 1, generator=seeded())
    result = train_step(model, batch(), optimizers, block=1, generator=seeded())
    assert result.block == 1
    assert result.grad_norm is None
    assert torch.equal(result.loss, expected.loss.detach())
    assert torch.equal(result.details.sigma, expected.sigma)
    assert not any(value.requires_grad for value in result.details)
    clipped = train_step(model, batch(), optimizers, block=1, clip_grad_norm=1e-9)
    assert clipped.grad_norm > 1e-3


def test_arguments_are_checked():
    model = model_of()
    optimizers = make_optimizers(model, FACTORIES["sgd"])
    with pytest.raises(ValueError, match=r"block must be in 0\.\.2, got 3"):
        train_step(model, batch(), optimizers, block=3)
    with pytest.raises(ValueError, match="generator must be on the CPU, got one on meta"):
        model.loss(batch(), 0, generator=type("G", (), {"device": torch.device("meta")})())


def test_optimizer_states_round_trip():
    model = model_of()
    optimizers = make_optimizers(model, FACTORIES["adamw"])
    for b in range(3):
        train_step(model, batch(), optimizers, block=b, generator=seeded(b))
    state = copy.deepcopy(optimizers.state_dict())
    fresh = make_optimizers(model, FACTORIES["adamw"])
    fresh.load_state_dict(state)
    for ours, theirs in zip(optimizers, fresh, strict=True):
        assert_equal_states(ours.state_dict(), theirs.state_dict())
    frozen = make_optimizers(model_of("frozen"), FACTORIES["adamw"])
    with pytest.raises(ValueError, match="3 blocks with shared=False, got 3 blocks with shared=Tr"):
        frozen.load_state_dict(state)
