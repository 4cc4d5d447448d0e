"""What is changed in a network after it was divided is used at once, or refused by name."""

import copy
import pickle

import dit_tools
import masked_tools
import pytest
import torch
from torch import nn

import lm_tools
from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.schedules import MaskSchedule
from tools import batch, randomized, seeded, vit

pytestmark = pytest.mark.usefixtures("one_thread")


def tokens():
    return {"tokens": lm_tools.tokens_of()}


NETWORKS = {
    "vit": (vit, batch),
    "dit": (dit_tools.dit_of, dit_tools.batch_of),
    "lm": (lambda: lm_tools.lm_of(**lm_tools.SINGLE), tokens),
    "lm-doubled": (lm_tools.lm_of, tokens),
    "recurrent": (lm_tools.recurrent_of, tokens),
    "masked": (masked_tools.lm_of, tokens),
}
UNCALLED = {
    "vit": ["classifier", "norm", "target_embedding", "layers.1.norm1", "layers"],
    "dit": ["layers.1.norm2", "layers"],
    "lm": ["norm", "target_embedding", "layers.3.norm1"],
    "lm-doubled": ["layers.4", "layers.2.attention", "layers.2.attention.qkv", "layers.0.norm2"],
    "recurrent": ["layers.1", "coda.0", "coda.1.attention", "prelude_norm", "core_norm"],
    "masked": ["layers.1.norm1", "norm"],
}
OF_KIND = [(kind, path) for kind, paths in UNCALLED.items() for path in paths]


def divided(kind, **config):
    torch.manual_seed(0)
    if kind == "masked":
        config["schedule"] = MaskSchedule()
    make, given = NETWORKS[kind]
    return DiffusionBlocks(randomized(make()), BlocksConfig(2, **config)), given()


def loss_of(dm, given, block=0):
    return dm.loss(given, block, generator=seeded(3)).loss


def halved(module, args, out):
    return (out[0] / 2, *out[1:]) if isinstance(out, tuple) else out / 2


def other_of(module):
    """Another module of the same class, with other weights."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=seeded(5)).to(p))
    return other


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("how", ["hook", "forward", "full_backward"])
@pytest.mark.parametrize(("kind", "path"), OF_KIND)
def test_hooks_that_would_not_run_are_refused(kind, path, how):
    dm, given = divided(kind)
    before = loss_of(dm, given)
    module = dm.base_model.get_submodule(path)
    if how == "forward":
        module.forward = lambda *args, **kwargs: None
    elif how == "hook":
        handle = module.register_forward_hook(halved)
    else:
        handle = module.register_full_backward_hook(lambda *args: None)
    optimizers = make_optimizers(dm, sgd)
    for call in (lambda: loss_of(dm, given), lambda: train_step(dm, given, optimizers, block=0)):
        with pytest.raises(ValueError, match=rf"{path} must have no hooks .* is not called"):
            call()
    if how == "forward":
        del module.forward
    else:
        handle.remove()
    assert loss_of(dm, given) == before


@pytest.mark.parametrize("path", ["norm", "classifier", "target_embedding"])
def test_hooks_from_before_are_refused(path):
    network = vit()
    network.get_submodule(path).register_forward_hook(halved)
    with pytest.raises(ValueError, match=f"{path} must have no hooks"):
        DiffusionBlocks(network, BlocksConfig(2))


@pytest.mark.parametrize("how", ["hook", "replaced"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_called_is_used_at_once(kind, how):
    dm, given = divided(kind)
    before = loss_of(dm, given)
    layer = dm.base_model.layers[1]
    if how == "hook":
        layer.mlp.register_forward_hook(halved)
    else:
        dm.base_model.layers[1] = other_of(layer)
    assert loss_of(dm, given) != before


class Adapter(nn.Module):
    """A linear layer and a low-rank addition, as LoRA makes it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.low = nn.Parameter(torch.randn(2, inner.in_features, generator=seeded(4)))
        self.high = nn.Parameter(torch.randn(inner.out_features, 2, generator=seeded(5)))

    @property
    def weight(self):
        return self.inner.weight

    @property
    def bias(self):
        return self.inner.bias

    def forward(self, x):
        return self.inner(x) + x @ self.low.T @ self.high.T


@pytest.mark.parametrize("kind", ["lm", "lm-doubled", "recurrent", "vit"])
def test_an_adapter_computes_as_its_merged_weight(kind):
    """Also in the last layer, whose keys of clean rows come from a part of qkv."""
    dm, given = divided(kind)
    attentions = [m for m in dm.base_model.modules() if hasattr(m, "qkv")]
    for attention in attentions:
        attention.qkv = Adapter(attention.qkv)
    adapted = [loss_of(dm, given, b) for b in range(2)]
    for attention in attentions:
        adapter = attention.qkv
        merged = copy.deepcopy(adapter.inner)
        with torch.no_grad():
            merged.weight += adapter.high @ adapter.low
        attention.qkv = merged
    torch.testing.assert_close([loss_of(dm, given, b) for b in range(2)], adapted)


@pytest.mark.parametrize("kind", ["vit", "lm"])
def test_parameters_that_come_later_need_optimizers(kind):
    dm, given = divided(kind)
    optimizers = make_optimizers(dm, sgd)
    attention = dm.base_model.layers[0].attention
    attention.out = Adapter(attention.out)
    with pytest.raises(ValueError, match=r"were added or unfrozen.*layers\.0\.attention\.out"):
        train_step(dm, given, optimizers, block=0)
    train_step(dm, given, make_optimizers(dm, sgd), block=0)


@pytest.mark.parametrize("kind", ["vit", "lm"])
def test_blocks_that_come_to_share_a_parameter_are_refused(kind):
    dm, given = divided(kind)
    layers = dm.base_model.layers
    layers[5].mlp = layers[0].mlp
    with pytest.raises(ValueError, match=r"must not share a parameter.*layers\.5\.mlp"):
        loss_of(dm, given)


@pytest.mark.parametrize("path", ["layers.4", "norm", "layers"])
@pytest.mark.parametrize("kind", ["vit", "lm", "masked"])
def test_a_taken_block_refuses_other_modules(kind, path):
    dm, given = divided(kind)
    block = dm.block(1)
    loss_of(block, given, 1)
    place, _, name = path.rpartition(".")
    own = dm.base_model.get_submodule(path)
    setattr(dm.base_model.get_submodule(place), name, other_of(own))
    with pytest.raises(ValueError, match=f"{path} must stay the module that it was when the block"):
        loss_of(block, given, 1)
    loss_of(dm.block(1), given, 1)
    setattr(dm.base_model.get_submodule(place), name, own)
    loss_of(block, given, 1)
    dm.base_model.layers[0] = other_of(dm.base_model.layers[0])  # of the other block
    loss_of(block, given, 1)
    block.base_model.layers["4"].norm1.register_forward_hook(halved)
    with pytest.raises(ValueError, match=r"layers\.4\.norm1 must have no hooks"):
        loss_of(block, given, 1)


@pytest.mark.parametrize("how", ["hook", "replaced"])
def test_what_blocks_have_copies_of_is_not_changed(how):
    dm, given = divided("vit", shared="private")
    network = dm.base_model
    if how == "hook":
        network.patches.register_forward_hook(halved)
        path = "patches"
    else:
        network.classifier, path = other_of(network.classifier), "classifier"
    with pytest.raises(ValueError, match=rf"{path} .* must not be changed .* copy"):
        loss_of(dm, given, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda dm: pickle.loads(pickle.dumps(dm))])
def test_copies_are_looked_at_too(copied):
    dm, given = divided("vit")
    dm.loss(given, 0)
    other = copied(dm)
    assert loss_of(other, given) == loss_of(dm, given)
    other.base_model.norm.register_forward_hook(halved)
    with pytest.raises(ValueError, match="norm must have no hooks"):
        loss_of(other, given)
    block = copied(dm.block(1))
    loss_of(block, given, 1)


def test_nothing_is_looked_at_closer_without_a_change(monkeypatch):
    dm, given = divided("vit")
    loss_of(dm, given)
    monkeypatch.setattr("dblocks.blocks.denoiser.follow_changes_", None)
    dm.train().eval().zero_grad()
    dm.load_state_dict(dm.state_dict())
    loss_of(dm.to(torch.float32), given, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["vit", "dit", "lm"])
def test_scripted_modules_are_called(kind):
    dm, given = divided(kind)
    before = loss_of(dm, given)
    for layer in dm.base_model.layers:
        layer.mlp = torch.jit.script(layer.mlp)
    assert loss_of(dm, given) == before
    seen = dm.changes
    loss_of(dm, given, 1)
    assert dm.changes == seen


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_head_is_refused_and_a_scripted_projection_is_called():
    dm, given = divided("lm-doubled")
    before = loss_of(dm, given)
    attention = dm.base_model.layers[2].attention
    attention.qkv = torch.jit.script(attention.qkv)
    torch.testing.assert_close(loss_of(dm, given), before)
    dm, given = divided("vit")
    dm.base_model.classifier = torch.jit.script(dm.base_model.classifier)
    with pytest.raises(TypeError, match=r"head must be an nn\.Linear"):
        loss_of(dm, given)


# Compiled


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["vit", "lm", "masked"])
def test_layers_in_the_wrapper_of_the_compiler_are_called(kind):
    dm, given = divided(kind)
    before = loss_of(dm, given)
    layers = dm.base_model.layers
    for i, layer in enumerate(layers):
        layers[i] = torch.compile(layer, backend="eager")
    torch.testing.assert_close(loss_of(dm, given), before)
    layers[1].register_forward_hook(halved)
    assert loss_of(dm, given) != before
    layers[1].norm1.register_forward_hook(halved)
    with pytest.raises(ValueError, match=r"layers\.1\._orig_mod\.norm1 must have no hooks"):
        loss_of(dm, given)


def recording():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    return graphs, backend


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [False, True], ids=["loss", "loss_at"])
def test_a_compiled_loss_follows_hooks(whole):
    dm, given = divided("vit")
    graphs, backend = recording()
    torch._dynamo.reset()
    compiled = torch.compile(dm.loss_at if whole else dm.loss, backend=backend, fullgraph=whole)

    def loss():
        if whole:
            return compiled(given, 0, dm.draw(given, 0, generator=seeded(3))).loss
        return compiled(given, 0, generator=seeded(3)).loss

    before = loss_of(dm, given)
    torch.testing.assert_close(loss(), before)
    made = len(graphs)
    loss()
    assert len(graphs) == made
    hook = dm.base_model.layers[0].mlp.register_forward_hook(halved)
    changed = loss_of(dm, given)
    assert changed != before
    torch.testing.assert_close(loss(), changed)
    hook.remove()
    torch.testing.assert_close(loss(), before)
    made = len(graphs)
    loss()
    assert len(graphs) == made
    dm.base_model.classifier.register_forward_hook(halved)
    with pytest.raises(ValueError, match="classifier must have no hooks"):
        loss()
