"""What is changed in a model after its conversion is honoured, or refused by name at the next call.

Honoured: with all layers in one block and z = 0, the result is that of the plain model.
"""

import copy

import pytest
import torch
from convert_tools import batch_of, blocks_of, model_of, plain_logits, shaken
from hub_tools import library
from torch import nn
from torch.nn.utils import parametrize, prune

from tools import seeded

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
LAYER = {
    "llama": "model.layers.1",
    "gpt2": "transformer.h.1",
    "bert-classes": "bert.encoder.layer.3",
    "vit": "vit.layers.1",
    "timm": "blocks.1",
}
MLP = {"llama": "mlp", "gpt2": "mlp", "bert-classes": "intermediate", "vit": "mlp", "timm": "mlp"}
NORM = {
    "llama": "input_layernorm", "gpt2": "ln_1", "bert-classes": "output.LayerNorm",
    "vit": "layernorm_before", "timm": "norm1",
}  # fmt: skip
ATTENTION = {
    "llama": "self_attn", "gpt2": "attn", "bert-classes": "attention.self",
    "vit": "attention", "timm": "attn",
}  # fmt: skip


def converted(kind, num_blocks=1, **options):
    blocks = blocks_of(kind, num_blocks, **options).eval()
    return blocks, blocks.base_model.model


def layer_of(kind, model):
    path = LAYER[kind]
    if kind == "vit" and not hasattr(model.vit, "layers"):  # transformers 4
        path = "vit.encoder.layer.1"
    return path, model.get_submodule(path)


def logits(kind, blocks, batch):
    """Of one block at z = 0, in the order of the plain model's."""
    given = {name: value for name, value in batch.items() if name != "labels"}
    N, D = 3, 16
    if "labels" not in batch:
        T = batch["tokens"].shape[1]
        return blocks.logits(torch.zeros(N, T, D), 1.0, **given)[:, 1:]
    return blocks.logits(torch.zeros(N, D), 1.0, **given)


def check_honoured(kind, blocks):
    batch, model = batch_of(kind), blocks.base_model.model
    before = plain_logits(kind, model_of(kind), batch)
    own = plain_logits(kind, model, batch)
    assert not torch.allclose(own[..., : before.shape[-1]], before, rtol=1e-2)
    own = own[:, :-1] if "labels" not in batch else own
    torch.testing.assert_close(logits(kind, blocks, batch), own, rtol=1e-4, atol=1e-5)


def halved(module, args, out):
    return (out[0] / 2, *out[1:]) if isinstance(out, tuple) else out / 2


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def weight_of(module):
    return next(m for m in module.modules() if isinstance(getattr(m, "weight", None), nn.Parameter))


# Inside of layers


@pytest.mark.parametrize("part", [MLP, NORM, ATTENTION], ids=["mlp", "norm", "attention"])
@pytest.mark.parametrize("kind", LAYER)
def test_hooks_on_parts_are_honoured(kind, part):
    blocks, model = converted(kind)
    blocks.loss(batch_of(kind), 0)
    layer, path = layer_of(kind, model)[1], part[kind]
    path = path if kind != "vit" or hasattr(layer, path) else "intermediate"  # transformers 4
    hook = layer.get_submodule(path).register_forward_hook(halved)
    check_honoured(kind, blocks)
    hook.remove()
    torch.testing.assert_close(
        logits(kind, blocks, batch_of(kind)), logits(kind, converted(kind)[0], batch_of(kind))
    )


@pytest.mark.parametrize("how", ["forward", "parametrized", "pruned", "replaced", "rescaled"])
@pytest.mark.parametrize("part", [MLP, NORM], ids=["mlp", "norm"])
@pytest.mark.parametrize("kind", ["llama", "bert-classes", "timm"])
def test_changed_parts_are_honoured(kind, part, how):
    blocks, model = converted(kind)
    blocks.loss(batch_of(kind), 0)
    layer = layer_of(kind, model)[1]
    module = layer.get_submodule(part[kind])
    if how == "forward":
        own_forward = module.forward
        module.forward = lambda x: 3 * own_forward(x)
    elif how == "parametrized":
        parametrize.register_parametrization(weight_of(module), "weight", Doubled())
    elif how == "pruned":
        prune.random_unstructured(weight_of(module), "weight", 0.5)
    elif how == "replaced":
        path, _, name = part[kind].rpartition(".")
        other = copy.deepcopy(module)
        with torch.no_grad():
            weight_of(other).weight.mul_(2)
        setattr(layer.get_submodule(path), name, other)
    else:
        with torch.no_grad():
            weight_of(module).weight.mul_(2)
    check_honoured(kind, blocks)


@pytest.mark.parametrize("rows", ["single", "doubled"])
def test_attributes_of_an_attention_are_honoured(rows):
    blocks, model = converted("llama", rows=rows)
    blocks.loss(batch_of("llama"), 0)
    model.model.layers[0].self_attn.scaling = 5.0
    blocks.before_use()
    own, ours = blocks.base_model.compare()
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    other, _ = converted("llama", rows=rows)[0].base_model.compare()
    assert not torch.allclose(own, other, rtol=1e-2)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "bert-classes"])
def test_the_function_that_attends(kind, name):
    blocks, model = converted(kind)
    before = logits(kind, blocks, batch_of(kind))
    model.set_attn_implementation(name)
    torch.testing.assert_close(logits(kind, blocks, batch_of(kind)), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "timm"])
def test_dtype_mode_and_checkpointing_of_the_inner_model(kind):
    blocks, model = converted(kind)
    batch = batch_of(kind)
    model.train()
    assert layer_of(kind, model)[1].training
    blocks.loss(batch, 0)
    model.eval().to(torch.float64)
    given = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    own = plain_logits(kind, model, given)
    own = own[:, :-1] if kind == "llama" else own
    ours = logits(kind, blocks, given)
    torch.testing.assert_close(ours.double(), own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "timm"])
def test_frozen_layers_get_no_gradients(kind):
    blocks, model = converted(kind)
    layer_of(kind, model)[1].requires_grad_(False)
    blocks.loss(batch_of(kind), 0).loss.backward()
    assert all(p.grad is None for p in layer_of(kind, model)[1].parameters())
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "bert-classes"])
def test_an_adapter_that_comes_later_is_honoured(kind):
    peft = library("peft")
    blocks, model = converted(kind, 2)
    blocks.loss(batch_of(kind), 0)
    targets = ["q_proj", "up_proj"] if kind == "llama" else ["query"]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets, r=2), model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=seeded(3)))
    model.eval()
    blocks.before_use()
    own, ours = blocks.base_model.compare()
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    blocks.loss(batch_of(kind), 1).loss.backward()
    lora = {n: p.grad for n, p in model.named_parameters() if "lora_A" in n}
    assert [n for n, g in lora.items() if g is not None] == [
        n for n in lora if ".2." in n or ".3." in n
    ]


# What is not called


def on_layer(kind, model):
    return layer_of(kind, model)


def above(kind, model):
    path = layer_of(kind, model)[0].rpartition(".")[0]
    path = path if kind in ("timm",) else path.partition(".")[0]
    return path, model.get_submodule(path)


HOOKS = ["forward", "forward_pre", "full_backward", "full_backward_pre"]


@pytest.mark.parametrize("where", [on_layer, above])
@pytest.mark.parametrize("kind", LAYER)
@pytest.mark.parametrize("taken", [False, True], ids=["whole", "block"])
def test_hooks_that_would_not_run_are_refused(kind, where, taken):
    blocks, model = converted(kind, 2)
    batch, name = batch_of(kind), HOOKS[len(kind) % len(HOOKS)]
    path, module = where(kind, model)
    block = int(kind == "bert-classes")  # the one with the layer
    used = blocks.block(block) if taken else blocks
    used.loss(batch, block)
    hook = getattr(module, f"register_{name}_hook")(lambda *given: None)
    if taken and where is above:
        return  # a block that is taken does not hold it
    message = (
        f"a {type(module).__name__} must have the same hooks" if taken else f"{path} must have"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            used.loss(batch, block)
    hook.remove()
    used.loss(batch, block)


@pytest.mark.parametrize("kind", ["llama", "vit", "timm"])
@pytest.mark.parametrize("taken", [False, True], ids=["whole", "block"])
@pytest.mark.parametrize("how", ["forward", "class"])
def test_a_layer_that_runs_something_else_is_refused(kind, taken, how):
    blocks, model = converted(kind, 2)
    _, module = layer_of(kind, model)
    used = blocks.block(0) if taken else blocks
    own, kind_of = module.forward, type(module)
    if how == "forward":
        module.forward = lambda *args, **kwargs: own(*args, **kwargs)
        message = "must have"
    else:

        class Other(kind_of):
            def forward(self, x, *args, **kwargs):
                return super().forward(2 * x, *args, **kwargs)

        module.__class__, message = Other, "must be a pre-norm|must have the same hooks"
    with pytest.raises(ValueError, match=message):
        used.loss(batch_of(kind), 0)


@pytest.mark.parametrize("kind", ["llama", "vit", "timm", "dit"])
@pytest.mark.parametrize("how", ["copy", "compiled"])
def test_another_layer_is_refused(kind, how):
    blocks, model = converted(kind, 2)
    path = blocks.base_model.names[1]
    place, _, number = path.rpartition(".")
    layer = model.get_submodule(path)
    other = copy.deepcopy(layer) if how == "copy" else torch.compile(layer, backend="eager")
    model.get_submodule(place)[int(number)] = other
    with pytest.raises(ValueError, match=f"{path} must stay the module that was converted"):
        blocks.loss(batch_of(kind), 0)
    model.get_submodule(place)[int(number)] = layer
    blocks.loss(batch_of(kind), 0)


@pytest.mark.parametrize("taken", [False, True], ids=["whole", "block"])
@pytest.mark.parametrize("how", ["hook", "pruned"])
@pytest.mark.parametrize(("kind", "path"), [("llama", "lm_head"), ("gpt2", "lm_head")])
def test_a_head_whose_weights_are_read(kind, path, how, taken):
    blocks, model = converted(kind, 2)
    used = blocks.block(1) if taken else blocks
    head = model.get_submodule(path)
    if how == "hook":
        head.register_forward_hook(halved)
    else:
        prune.random_unstructured(head, "weight", 0.5)
    message = "must have the same hooks" if taken else "lm_head must have no hooks"
    with pytest.raises(ValueError, match=message):
        used.loss(batch_of(kind), 1)


def test_a_parametrized_head_is_honoured():
    blocks, model = converted("llama")
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    check_honoured("llama", blocks)


def test_an_attention_that_attends_by_itself_is_refused():
    blocks, model = converted("llama")
    attention = model.model.layers[0].self_attn
    own_forward = attention.forward
    attention.forward = lambda *args, **kwargs: own_forward(*args, **kwargs)
    with pytest.raises(ValueError, match=r"attention of model\.layers\.0 must attend by"):
        blocks.loss(batch_of("llama"), 0)


@pytest.mark.parametrize("kind", ["llama", "timm"])
def test_blocks_that_come_to_share_a_parameter_are_refused(kind):
    blocks, model = converted(kind, 2)
    blocks.loss(batch_of(kind), 0)
    first, last = (model.get_submodule(blocks.base_model.names[i]) for i in (0, 3))
    weight_of(last.mlp).weight = weight_of(first.mlp).weight
    with pytest.raises(ValueError, match="must not share a parameter"):
        blocks.loss(batch_of(kind), 0)


def test_a_change_of_what_blocks_have_copies_of_is_refused():
    blocks, model = converted("llama", 2, config={"shared": "private"})
    model.model.norm.register_forward_hook(halved)
    with pytest.raises(ValueError, match=r"model\.norm \(LlamaRMSNorm\) must not be changed after"):
        blocks.loss(batch_of("llama"), 1)


def test_a_classifier_of_other_classes_is_refused():
    blocks, model = converted("vit", 2)
    model.classifier = nn.Linear(16, 9)
    model.config.num_labels = 9
    with pytest.raises(ValueError, match=r"classifier.* would add other parameters"):
        blocks.loss(batch_of("vit"), 0)


# Tokens


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", ["single", "doubled"])
def test_new_tokens_are_honoured(tied, rows):
    model = model_of("llama", tie_word_embeddings=tied)
    blocks = blocks_of("llama", 1, model=model, rows=rows).eval()
    blocks.loss(batch_of("llama"), 0)
    with pytest.raises(ValueError, match=r"0\.\.22"):
        blocks.loss({"tokens": torch.full((2, 6), 25)}, 0)
    model.resize_token_embeddings(29)
    assert blocks.loss({"tokens": torch.full((2, 6), 25)}, 0).loss.isfinite()
    own, ours = blocks.base_model.compare()
    assert own.shape[-1] == 29
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"0\.\.28"):
        blocks.loss({"tokens": torch.full((2, 6), 29)}, 0)


def test_new_tokens_of_a_frozen_embedding_are_frozen():
    blocks, model = converted("llama", 2, config={"shared": "frozen"})
    model.resize_token_embeddings(29)
    blocks.loss({"tokens": torch.full((2, 6), 25)}, 0).loss.backward()
    assert model.lm_head.weight.grad is None
    assert model.model.embed_tokens.weight.grad is None


# What does not count as a change


def test_nothing_is_verified_again_without_a_change(monkeypatch):
    from dblocks.integrations.convert import blocks as module

    blocks, model = converted("llama", 2)
    monkeypatch.setattr(module, "convert_again", None)
    blocks.loss(batch_of("llama"), 0)
    model(input_ids=batch_of("llama")["tokens"], output_hidden_states=True)
    model.gradient_checkpointing_enable()
    blocks.train().eval().zero_grad()
    shaken(blocks)
    blocks.load_state_dict(blocks.state_dict())
    blocks.loss(batch_of("llama"), 1)


def test_a_change_draws_no_random_numbers():
    blocks, model = converted("llama", 2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model.model.layers[0].mlp.register_forward_hook(lambda *given: None)
    blocks.before_use()
    assert torch.get_rng_state().equal(state)


def test_a_copy_is_verified():
    blocks = copy.deepcopy(converted("llama", 2)[0])
    blocks.loss(batch_of("llama"), 0)
    hook = blocks.base_model.model.model.layers[0].register_forward_hook(halved)
    with pytest.raises(ValueError, match="must have no hooks"):
        blocks.loss(batch_of("llama"), 0)
    hook.remove()
    blocks.loss(batch_of("llama"), 0)
