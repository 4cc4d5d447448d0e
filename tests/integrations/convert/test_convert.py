"""What `convert` leaves as it is, and how the result divides into blocks."""

import copy
import io
import pickle

import pytest
import torch
from convert_tools import (
    ALL,
    CONDITIONED,
    adamw,
    batch_of,
    blocks_of,
    model_of,
    plain_logits,
    shaken,
    task_of,
)

from dblocks import make_optimizers, train_step
from dblocks.integrations.convert import convert
from dblocks.integrations.convert.find import find_layers
from tools import seeded

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = ("llama", "bert", "timm", "dit")


def loss_of(blocks, kind, block=1):
    return blocks.loss(batch_of(kind), block, generator=seeded()).loss


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module, before):
    return {name for name, value in module.state_dict().items() if not value.equal(before[name])}


def names_of(module, parameters):
    """All names of some parameters, also of those that are tied."""
    ids = {id(p) for p in parameters}
    pairs = module.named_parameters(remove_duplicate=False)
    return {name for name, p in pairs if id(p) in ids}


# The model itself


@pytest.mark.parametrize("kind", ALL)
def test_the_model_is_left_as_it_is(kind):
    model, batch = model_of(kind), batch_of(kind)
    expected = plain_logits(kind, model, batch)
    before = state_of(model)
    classes = [(type(m), type(m).forward, vars(type(m)).copy()) for m in model.modules()]
    kept = [
        (set(vars(m)) | set(m._modules), m.training, len(m._forward_hooks)) for m in model.modules()
    ]
    config = getattr(model, "config", None)
    written = None if config is None else repr(config)

    blocks = blocks_of(kind, model=model)
    assert blocks.base_model.model is model
    assert plain_logits(kind, blocks.base_model, batch).equal(expected)
    blocks.train()
    loss_of(blocks, kind).backward()
    blocks.eval()
    assert plain_logits(kind, blocks.base_model, batch).equal(expected)
    assert plain_logits(kind, model, batch).equal(expected)

    assert list(model.state_dict()) == list(before)
    assert not changed(model, before)
    assert repr(config) == written or config is None
    for module, (kind_of, forward, members), (names, training, hooks) in zip(
        model.modules(), classes, kept, strict=True
    ):
        assert type(module) is kind_of
        assert kind_of.forward is forward
        assert vars(kind_of) == members
        assert set(vars(module)) | set(module._modules) == names
        assert "forward" not in vars(module)
        assert (module.training, len(module._forward_hooks)) == (training, hooks)
    if config is not None and hasattr(config, "_attn_implementation"):
        for module in model.modules():
            assert getattr(module, "config", config)._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", SOME)
def test_the_result_has_the_attributes_of_the_model(kind):
    blocks = blocks_of(kind)
    first = next(iter(find_layers(blocks.base_model.model)))
    assert blocks.base_model.get_submodule(f"model.{first}") is not None
    if kind != "timm":
        assert blocks.base_model.dtype == torch.float32
        assert blocks.base_model.config is blocks.base_model.model.config
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = blocks.base_model.nothing


def test_a_model_whose_forward_is_overridden_keeps_it():
    model = model_of("llama")

    class Doubling(type(model)):
        def forward(self, *args, **kwargs):
            result = super().forward(*args, **kwargs)
            result.logits = 2 * result.logits
            return result

    batch = batch_of("llama")
    expected = 2 * plain_logits("llama", model, batch)
    model.__class__ = Doubling
    with pytest.raises(ValueError, match="Doubling must compute what its embedding, layers"):
        blocks_of("llama", model=model)
    blocks = blocks_of("llama", model=model, check=False)
    assert plain_logits("llama", blocks.base_model, batch).equal(expected)
    loss_of(blocks, "llama").backward()


# Blocks


@pytest.mark.parametrize("shared", ["train", "frozen", "private"])
@pytest.mark.parametrize("kind", ALL)
def test_a_step_moves_one_block_and_what_is_shared(kind, shared):
    blocks = shaken(blocks_of(kind, 3, config={"shared": shared}))
    optimizers = make_optimizers(blocks, lambda p: adamw(p, weight_decay=0.1))
    train_step(blocks, batch_of(kind), optimizers, block=0, generator=seeded())
    before = state_of(blocks)
    states = [copy.deepcopy(optimizers.blocks[b].state_dict()) for b in (0, 2)]
    train_step(blocks, batch_of(kind), optimizers, block=1, generator=seeded())
    for b, state in zip((0, 2), states, strict=True):
        now = optimizers.blocks[b].state_dict()
        torch.testing.assert_close(now, state, rtol=0, atol=0)
    owned = names_of(blocks, blocks.block_parameters(1))
    common = names_of(blocks, blocks.shared_parameters())
    moved = changed(blocks, before)
    assert moved & owned
    assert moved <= (owned | common if shared == "train" else owned)
    if shared == "train":
        assert moved & common


@pytest.mark.parametrize("kind", ALL)
def test_only_the_layers_of_a_block_run(kind):
    blocks = blocks_of(kind, 3)
    ran, network = [], blocks.base_model
    for i, name in enumerate(network.names):
        inner = [m for m in network.model.get_submodule(name).modules() if not list(m.children())]
        inner[0].register_forward_hook(lambda *_, i=i: ran.append(i))
        inner[-1].register_forward_hook(lambda *_, i=i: ran.append(i))
    blocks.before_use()  # hooks are a change of the model, which is compared as a whole once
    for b, (first, last) in enumerate(blocks.layer_ranges):
        ran.clear()
        loss_of(blocks, kind, b).backward()
        assert set(ran) == set(range(first, last))


@pytest.mark.parametrize("shared", ["train", "private"])
@pytest.mark.parametrize("kind", ALL)
def test_the_view_of_a_block(kind, shared):
    blocks = shaken(blocks_of(kind, config={"shared": shared}))
    whole = blocks.state_dict()
    for b in range(2):
        view, held = blocks.block(b), {id(p) for p in blocks.block_parameters(b)}
        state = view.state_dict()
        assert all(state[key].data_ptr() == whole[key].data_ptr() for key in state)
        others = {id(p) for p in blocks.block_parameters(1 - b)}
        assert held <= {id(p) for p in view.parameters()}
        assert not others & {id(p) for p in view.parameters()}
        view_loss = view.loss(batch_of(kind), generator=seeded()).loss
        assert view_loss.equal(loss_of(blocks, kind, b))
    twin = copy.deepcopy(view)
    optimizers = make_optimizers(blocks, adamw)
    train_step(blocks, batch_of(kind), optimizers, block=1, generator=seeded())
    own = {n for n, p in twin.named_parameters() if p.requires_grad}
    optimizer = adamw([p for p in twin.parameters() if p.requires_grad])
    twin.loss(batch_of(kind), generator=seeded()).loss.backward()
    optimizer.step()
    trained = dict(twin.named_parameters())
    assert own
    assert all(trained[n].equal(p) for n, p in blocks.named_parameters() if n in trained)


@pytest.mark.parametrize("kind", SOME)
def test_print_blocks(kind, capsys):
    blocks = blocks_of(kind, 3)
    blocks.print_blocks()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    count = sum(p.numel() for p in blocks.block_parameters(1))
    assert lines[2].split()[:2] == ["1", "2-2"]
    assert lines[2].split()[-1] == f"{count:,}"


# Copies, and several at a time


@pytest.mark.parametrize("shared", ["train", "private"])
@pytest.mark.parametrize("kind", ALL)
def test_copies_and_pickles(kind, shared):
    blocks = shaken(blocks_of(kind, config={"shared": shared}))
    expected = [loss_of(blocks, kind, b) for b in range(2)]
    buffer = io.BytesIO()
    torch.save(blocks.state_dict(), buffer)
    buffer.seek(0)
    fresh = blocks_of(kind, config={"shared": shared})
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    twins = [fresh, copy.deepcopy(blocks)]
    if kind in ("llama", "vit", "timm", "dit"):
        twins.append(pickle.loads(pickle.dumps(blocks)))
    for twin in twins:
        assert all(loss_of(twin, kind, b).equal(expected[b]) for b in range(2))
        ours = {p.data_ptr() for p in blocks.parameters()}
        assert not ours & {p.data_ptr() for p in twin.parameters()}
        train_step(twin, batch_of(kind), make_optimizers(twin, adamw), generator=seeded())
        assert not loss_of(twin, kind, 1).equal(expected[1]) or shared == "private"
    assert all(loss_of(blocks, kind, b).equal(expected[b]) for b in range(2))


def test_two_models_in_one_process():
    first, second = shaken(blocks_of("llama")), shaken(blocks_of("qwen3"))
    before = [loss_of(first, "llama"), loss_of(second, "qwen3")]
    train_step(first, batch_of("llama"), make_optimizers(first, adamw), generator=seeded())
    assert loss_of(second, "qwen3").equal(before[1])
    assert not loss_of(first, "llama").equal(before[0])


def test_a_model_converted_twice_is_shared_by_both():
    model = model_of("vit")
    first, second = blocks_of("vit", model=model), blocks_of("vit", 4, model=model)
    train_step(first, batch_of("vit"), make_optimizers(first, adamw), generator=seeded())
    assert {p.data_ptr() for p in model.parameters()} <= {p.data_ptr() for p in second.parameters()}
    loss_of(second, "vit").backward()
    frozen = blocks_of("vit", model=model, config={"shared": "frozen"})
    count = sum(not p.requires_grad for p in model.parameters())
    assert 0 < count < sum(1 for _ in frozen.shared_parameters())
    with pytest.warns(UserWarning, match=f"shared='train' trains all parameters, got {count} out"):
        blocks_of("vit", model=model)


@pytest.mark.parametrize("kind", ["llama", "dit"])
def test_what_is_converted_is_not_converted_again(kind):
    blocks = blocks_of(kind)
    for again in (blocks, blocks.base_model):
        with pytest.raises(
            ValueError, match="model must be one that was not converted, got a Conv"
        ):
            convert(again, blocks.config, task=task_of(kind))


@pytest.mark.parametrize("kind", CONDITIONED)
def test_every_added_parameter_gets_a_gradient(kind):
    blocks = shaken(blocks_of(kind))
    names = {n for n, _ in blocks.named_parameters() if not n.startswith("base_model.model.")}
    missing = set(names)
    for b in range(2):
        blocks.zero_grad()
        loss_of(blocks, kind, b).backward()
        missing -= {n for n, p in blocks.named_parameters() if p.grad is not None and p.grad.any()}
    assert names
    assert not missing
