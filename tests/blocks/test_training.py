import copy

import pytest
import torch
from torch import nn

from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.models import ViT, ViTConfig
from tools import DEVICE, SIZES, Elsewhere, batch, seeded

FACTORIES = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(shared="train", **options):
    torch.manual_seed(0)
    vit = ViT(ViTConfig(**{**SIZES, **options}))
    for p in vit.parameters():
        nn.init.normal_(p, std=0.1)
    return DiffusionBlocks(vit.to(DEVICE), BlocksConfig(3, shared=shared))


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
    expected = {id(p) for p in (*model.block_parameters(2), *model.shared_parameters())}
    assert reached == expected


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
        model.loss(batch(), 0, generator=Elsewhere())


def test_the_kind_of_optimizers_is_checked():
    model = model_of()
    with pytest.raises(TypeError, match="must be BlockOptimizers, got SGD; call make_optimizers"):
        train_step(model, batch(), FACTORIES["sgd"](model.parameters()))
    with pytest.raises(TypeError, match=r"block must be an integer, got 1\.0 of type float"):
        train_step(model, batch(), make_optimizers(model, FACTORIES["sgd"]), block=1.0)


def test_a_frozen_block_has_no_optimizer():
    model = model_of()
    for p in model.block_parameters(1):
        p.requires_grad_(False)
    optimizers = make_optimizers(model, FACTORIES["adamw"])
    assert optimizers.blocks[1] is None
    assert optimizers.of_block(1) == (optimizers.shared,)
    assert len(list(optimizers)) == 3
    before = [p.clone() for p in model.block_parameters(1)]
    shared = next(model.shared_parameters()).clone()
    train_step(model, batch(), optimizers, block=1)
    assert all(torch.equal(p, q) for p, q in zip(model.block_parameters(1), before, strict=True))
    assert not torch.equal(next(model.shared_parameters()), shared)
    optimizers.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="block 1 must have an optimizer, got parameters that all"):
        train_step(model, batch(), make_optimizers(model, FACTORIES["adamw"]), block=1)


def matrices_apart(params):
    """Two optimizers, as for Muon, which takes matrices only."""
    matrices = [p for p in params if p.ndim == 2]
    others = [p for p in params if p.ndim != 2]
    return [torch.optim.SGD(matrices, lr=1e-2, momentum=0.9), torch.optim.AdamW(others, lr=1e-2)]


def test_several_optimizers_for_each_block():
    model = model_of()
    optimizers = make_optimizers(model, matrices_apart)
    assert len(list(optimizers)) == 8
    assert optimizers.of_block(2) == (*optimizers.blocks[2], *optimizers.shared)
    before = [[p.clone() for p in model.block_parameters(b)] for b in range(3)]
    result = train_step(model, batch(), optimizers, block=2, clip_grad_norm=1.0)
    assert result.grad_norm > 0
    for b in range(3):
        changed = [
            not torch.equal(p, q) for p, q in zip(model.block_parameters(b), before[b], strict=True)
        ]
        assert all(changed) if b == 2 else not any(changed)
    state = copy.deepcopy(optimizers.state_dict())
    fresh = make_optimizers(model, matrices_apart)
    fresh.load_state_dict(state)
    for ours, theirs in zip(optimizers, fresh, strict=True):
        assert_equal_states(ours.state_dict(), theirs.state_dict())
    with pytest.raises(ValueError, match=r"must have as many optimizers .*, \[1, 1, 1, 1\], got"):
        make_optimizers(model, FACTORIES["sgd"]).load_state_dict(state)


def test_gradients_accumulate_as_the_docstring_says():
    model, twin = model_of(), model_of()
    optimizers, theirs = (make_optimizers(m, FACTORIES["sgd"]) for m in (model, twin))
    train_step(model, batch(), optimizers, block=1, generator=seeded())
    for _ in range(2):
        (twin.loss(batch(), 1, generator=seeded()).loss / 2).backward()
    for optimizer in theirs.of_block(1):
        optimizer.step()
    twin.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("factory", [*FACTORIES.values(), matrices_apart])
def test_training_resumes_bit_for_bit(factory):
    def begin():
        model = model_of(image_drop=0.2)
        return model, make_optimizers(model, factory), seeded()

    def advance(model, optimizers, generator):
        for _ in range(5):
            train_step(model, batch(), optimizers, generator=generator, clip_grad_norm=1.0)

    model, optimizers, generator = begin()
    advance(model, optimizers, generator)
    saved = copy.deepcopy((model.state_dict(), optimizers.state_dict(), generator.get_state()))
    advance(model, optimizers, generator)
    again, its_optimizers, its_generator = begin()
    again.load_state_dict(saved[0])
    its_optimizers.load_state_dict(saved[1])
    its_generator.set_state(saved[2])
    advance(again, its_optimizers, its_generator)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    for ours, theirs in zip(optimizers, its_optimizers, strict=True):
        assert_equal_states(ours.state_dict(), theirs.state_dict())


def test_the_default_device_does_not_matter():
    model, twin, data = model_of(), model_of(), batch()
    optimizers, theirs = (make_optimizers(m, FACTORIES["sgd"]) for m in (model, twin))
    expected = train_step(model, data, optimizers, generator=seeded())
    with torch.device("meta"):
        got = train_step(twin, data, theirs, generator=seeded())
    assert got.block == expected.block
    assert torch.equal(got.loss, expected.loss)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("image_drop", [0.0, 0.2])
def test_a_step_does_not_synchronise(clip, image_drop):
    model, data, generator = model_of(image_drop=image_drop), batch(), seeded()
    optimizers = make_optimizers(model, FACTORIES["adamw"])
    for block in range(3):  # compiles the kernels
        train_step(model, data, optimizers, block=block, clip_grad_norm=clip)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [
            train_step(model, data, optimizers, generator=generator, clip_grad_norm=clip)
            for _ in range(4)
        ]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(result.loss.isfinite() for result in results)


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
    with pytest.raises(
        ValueError, match=r"as many optimizers .* \[1, 1, 1, 0\], got \[1, 1, 1, 1\]"
    ):
        frozen.load_state_dict(state)


def test_the_result_prints_in_a_line():
    model = model_of()
    result = train_step(
        model, batch(), make_optimizers(model, FACTORIES["sgd"]), block=1, generator=seeded(),
        clip_grad_norm=1.0,
    )  # fmt: skip
    loss, sizes = f"{result.loss.item():.6g}", f"float32 {list(result.details.losses.shape)}"
    assert repr(result) == (
        f"StepResult(block=1, loss={loss}, details=Loss(loss={loss}, losses={sizes}, "
        f"weight={sizes}, sigma={sizes}), grad_norm={result.grad_norm.item():.6g}, skipped=False)"
    )
    block, *_, skipped = result
    assert (block, skipped) == (result.block, result.skipped)
    meta = result._replace(loss=torch.empty((), device="meta"), grad_norm=None)
    assert "loss=float32 [], " in repr(meta)
    assert "grad_norm=None" in repr(meta)


class Adapted(nn.Module):
    """A linear map with a trainable addition, as LoRA adds one."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.extra = nn.Linear(linear.in_features, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.extra(x)


def linear_of(module):
    return next((n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("how", ["added", "unfrozen", "shared"])
@pytest.mark.parametrize("taken", [False, True], ids=["whole", "block"])
def test_parameters_that_come_after_the_optimizers_are_refused(how, taken):
    model = model_of()
    layer = model.parts(1)[1][0]
    path, linear = linear_of(layer)
    late = next(model.shared_parameters()) if how == "shared" else linear.weight
    late.requires_grad_(how == "added")
    used = model.block(1) if taken else model
    optimizers = make_optimizers(used, FACTORIES["sgd"])
    train_step(used, batch(), optimizers, block=1, generator=seeded())
    if how == "added":
        layer.set_submodule(path, Adapted(linear).to(DEVICE))
    else:
        late.requires_grad_(True)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"added or unfrozen later, such as .*; call make_opt"):
        train_step(used, batch(), optimizers, block=1, generator=seeded())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    if not taken and how != "shared":
        train_step(model, batch(), optimizers, block=0, generator=seeded())
    train_step(used, batch(), make_optimizers(used, FACTORIES["sgd"]), block=1)


def test_parameters_that_are_frozen_for_a_while_or_left_out_are_not_late():
    model = model_of()
    optimizers = make_optimizers(model, lambda p: torch.optim.SGD(p[:1], lr=1e-2))
    own = list(model.block_parameters(0))
    own[1].requires_grad_(False)
    train_step(model, batch(), optimizers, block=0)
    own[1].requires_grad_(True)
    train_step(model, batch(), optimizers, block=0)
    other, others = copy.deepcopy((model, optimizers))
    train_step(other, batch(), others, block=0)


def test_a_parameter_given_to_an_optimizer_later_is_not_late():
    model = model_of()
    late = next(iter(model.block_parameters(0)))
    late.requires_grad_(False)
    optimizers = make_optimizers(model, FACTORIES["sgd"])
    late.requires_grad_(True)
    optimizers.of_block(0)[0].add_param_group({"params": [late]})
    before = late.detach().clone()
    train_step(model, batch(), optimizers, block=0)
    assert not torch.equal(late, before)
