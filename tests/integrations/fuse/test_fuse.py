import copy
import io
import pickle
from functools import partial

import pytest
import torch
from fuse_network import (
    Block,
    D,
    Doubled,
    FinalLayer,
    Mixer,
    Network,
    Renamed,
    inputs,
    network,
    registered,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from dblocks.integrations.fuse import (
    Replacement,
    dit_block,
    fuse_,
    unfuse_,
)
from dblocks.integrations.fuse.fusion import REGISTERED
from dblocks.testing import assert_within_budget
from tools import DEVICE, IMPLS, normal, randomized

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _registered():
    with registered():
        yield


def results(model, dtype, *, call=None):
    """The output and every gradient of a copy of the model in `dtype`, by name."""
    model = copy.deepcopy(model).to(dtype)
    x, c = (tensor.requires_grad_() for tensor in inputs(dtype))
    y = (call or model)(*((model, x, c) if call else (x, c)))
    leaves = {"x": x, "c": c, **dict(model.named_parameters())}
    grads = torch.autograd.grad(y, list(leaves.values()), normal(*y.shape, seed=2).to(dtype))
    return {"y": y, **dict(zip(leaves, grads, strict=True))}


def assert_same_function(plain, fused, dtype):
    got, eager, ref64 = (
        results(fused, dtype), results(plain, dtype), results(plain, torch.float64)
    )  # fmt: skip
    for name, expected in ref64.items():
        assert_within_budget(got[name], expected, eager[name], name)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"affine": True, "eps": 1e-2}])
def test_outputs_and_gradients_are_within_budget(options, dtype, impl):
    plain = network(**options)
    fused = copy.deepcopy(plain)
    fuse_(fused, impl=impl)
    assert_same_function(plain, fused, dtype)


def test_rms_norm_of_torch_keeps_its_own_forward():
    plain = network()
    plain.blocks[0].norm1 = plain.blocks[1].norm2 = nn.RMSNorm(D, device=DEVICE)
    fused = copy.deepcopy(plain)
    fuse_(fused)
    assert_same_function(plain, fused, torch.float32)


def test_float64_agrees_to_its_own_rounding():
    plain = network().double()
    fused = copy.deepcopy(plain)
    fuse_(fused)
    expected = results(plain, torch.float64)
    for name, got in results(fused, torch.float64).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-10, atol=1e-10)


def test_what_is_returned_and_what_stays():
    model = network()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    modules = list(model.modules())
    model.blocks[1].eval()
    both = "residual_adaln + gated_residual"
    assert fuse_(model) == [
        Replacement("blocks.0", "Block", both),
        Replacement("blocks.1", "Block", both),
        Replacement("final", "FinalLayer", "adaln"),
    ]
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert model.blocks[0].training
    assert not model.blocks[1].training
    assert isinstance(model.blocks[0], Block)
    assert type(model.blocks[0]).__name__ == "Block"
    assert "FusedBlock(" in repr(model)
    assert model.blocks[0].fused_impl == "auto"
    assert Block(D).forward.__func__ is Block.forward is not dit_block


def test_fuse_twice_and_unfuse():
    model = network()
    x, c = inputs()
    before, types = model(x, c), [type(m) for m in model.modules()]
    replaced = fuse_(model)
    fused, fused_types = model(x, c), [type(m) for m in model.modules()]
    assert fuse_(model) == []
    assert [type(m) for m in model.modules()] == fused_types != types
    with pytest.raises(ValueError, match=r"impl='reference' must have modules .* fused already"):
        fuse_(model, impl="reference")
    assert torch.equal(model(x, c), fused)
    assert unfuse_(model) == [r.name for r in replaced]
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model(x, c), before)
    assert unfuse_(model) == []


def test_the_model_itself_may_be_what_is_replaced():
    block = randomized(Block()).to(DEVICE)
    assert [r.name for r in fuse_(block)] == [""]
    assert unfuse_(block) == [""]


def test_filter_sees_what_could_be_replaced():
    seen = []
    model = network()
    replaced = fuse_(model, lambda module, name: seen.append((module, name)) or name == "blocks.1")
    assert [r.name for r in replaced] == ["blocks.1"]
    assert [name for _, name in seen] == ["blocks.0", "blocks.1", "final"]
    assert seen[0][0] is model.blocks[0]
    assert type(model.blocks[0]) is Block
    with pytest.raises(ValueError, match=r"got none to replace in Network"):
        fuse_(network(), lambda module, name: False, impl="reference")


def test_only_the_known_forward_is_replaced():
    model = nn.ModuleList([Renamed(), Doubled(), Block(), Mixer(D), nn.LayerNorm(D)]).to(DEVICE)
    model[2].forward = lambda x, c: x
    with pytest.raises(
        RuntimeError, match=r"got one set on 1 of 2: 2 \(Block\); call fuse_ before"
    ):
        fuse_(model)
    assert type(model[0]) is Renamed
    left = lambda module, name: "forward" not in vars(module)
    assert [(r.name, r.before) for r in fuse_(model, left)] == [("0", "Renamed")]
    x, c = inputs()
    plain = copy.deepcopy(model[1])
    assert torch.equal(model[1](x, c), plain(x, c))
    assert torch.equal(model[2](x, c), x)


def test_a_stored_forward_is_the_fused_one_and_after_unfuse_the_plain_one():
    model, (x, c) = network(), inputs()
    plain = copy.deepcopy(model)(x, c)
    fuse_(model)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    torch.testing.assert_close(model(x, c), plain)
    assert unfuse_(model) == ["blocks.0", "blocks.1", "final"]
    assert torch.equal(model(x, c), plain)


def test_nothing_to_replace():
    model = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D))
    assert fuse_(model) == []
    with pytest.raises(ValueError, match=r"got none to replace in Sequential .*register_fusion"):
        fuse_(model, impl="reference")


def test_two_models_are_independent():
    first, second = network(), network()
    x, c = inputs()
    expected = second(x, c)
    fuse_(first)
    fuse_(second, impl="reference")
    assert (first.final.fused_impl, second.final.fused_impl) == ("auto", "reference")
    unfuse_(second)
    assert torch.equal(second(x, c), expected)
    assert len(unfuse_(first)) == 3


def test_deep_copy_is_fused_and_separate():
    model = network()
    fuse_(model)
    twin = copy.deepcopy(model)
    assert type(twin.blocks[0]) is type(model.blocks[0])
    x, c = inputs()
    assert torch.equal(twin(x, c), model(x, c))
    with torch.no_grad():
        twin.blocks[0].attn.linear.weight.zero_()
    assert not torch.equal(twin(x, c), model(x, c))
    unfuse_(twin)
    assert type(twin.blocks[0]) is Block
    assert len(unfuse_(model)) == 3


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_of_the_module(protocol):
    model = network()
    fuse_(model, impl="reference")
    data = pickle.dumps(model, protocol)
    twin = pickle.loads(data)
    x, c = inputs()
    assert torch.equal(twin(x, c), model(x, c))
    assert len(unfuse_(twin)) == 3
    REGISTERED.pop(FinalLayer)
    with pytest.raises(RuntimeError, match=r"FinalLayer must have a fusion here .* got None"):
        pickle.loads(data)


def test_state_dict_moves_between_fused_and_plain():
    plain, fused = network(), Network().to(DEVICE)
    fuse_(fused)
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    fused.load_state_dict(torch.load(file))
    x, c = inputs()
    got = fused(x, c)
    unfuse_(fused)
    assert torch.equal(fused(x, c), plain(x, c))
    torch.testing.assert_close(got, plain(x, c))


def test_hooks_of_the_module_and_of_its_norms_run():
    model = network()
    x, c = inputs()
    expected = results(model, torch.float32)
    fuse_(model)
    norm, called = model.blocks[0].norm2, []
    handles = [
        norm.register_forward_hook(lambda m, args, out: called.append("norm")),
        norm.register_full_backward_hook(lambda m, gi, go: called.append("backward")),
        model.blocks[0].register_forward_pre_hook(lambda m, args: called.append("block")),
    ]
    model(x.requires_grad_(), c).sum().backward()
    assert called == ["block", "norm", "backward"]
    for handle in handles[1:]:
        handle.remove()
    scaled = norm.register_forward_hook(lambda m, args, out: 2 * out)
    assert (model(x, c) - expected["y"]).abs().max() > 0.1
    scaled.remove()
    handles[0].remove()
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda m, args, out: called.append(m)
    )
    model(x, c)
    everywhere.remove()
    assert norm in called


def test_replaced_norm_is_used():
    model = network()
    fuse_(model)
    model.blocks[0].norm1 = nn.Identity()
    plain = copy.deepcopy(model)
    unfuse_(plain)
    x, c = inputs()
    torch.testing.assert_close(model(x, c), plain(x, c))


def test_gradient_checkpointing():
    model = network()
    fuse_(model)
    expected = results(model, torch.float32)
    got = results(
        model, torch.float32, call=lambda m, x, c: checkpoint(m, x, c, use_reentrant=False)
    )
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_autocast_keeps_the_residual_stream_and_its_accuracy():
    plain = network()
    fused = copy.deepcopy(plain)
    fuse_(fused)
    x, c = inputs()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got, eager = (m.blocks[0](x, c) for m in (fused, plain))
    ref64 = copy.deepcopy(plain).double().blocks[0](x.double(), c.double())
    # Its matrix products are bfloat16's, though the sum is float32.
    assert got.dtype == eager.dtype == torch.float32
    assert_within_budget(got.bfloat16(), ref64, eager.bfloat16())


@pytest.mark.parametrize(
    ("backend", "impl"),
    [("aot_eager", "triton"), pytest.param("inductor", "auto", marks=pytest.mark.slow)],
)
@pytest.mark.filterwarnings("default")  # Inductor's own deprecations
def test_compiles_to_one_graph(impl, backend):
    block = randomized(Block()).to(DEVICE)
    fuse_(block, impl=impl)
    expected = results(block, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda m, x, c: m(x, c), fullgraph=True, backend=backend)
    got = results(block, torch.float32, call=compiled)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)
