"""What is around the layers of a model is honoured, or refused by name."""

import copy

import pytest
import torch
from convert_tools import (
    ALL,
    CAUSAL,
    CLASSES,
    FORMS,
    MASK,
    V,
    batch_of,
    blocks_of,
    model_of,
    plain_logits,
    task_of,
)
from hub_tools import library
from torch import nn

from dblocks import BlocksConfig, MaskSchedule
from dblocks.integrations.convert import ConvertedBlocks, convert
from dblocks.integrations.convert.whole import check_whole
from tools import seeded

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of peft, on the models that it is given here
]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "vocab_size": V, "max_position_embeddings": 34}


def adapted(kind, targets, **options):
    peft = library("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=targets, r=2, **options)
    model = peft.get_peft_model(model_of(kind), config)
    with torch.no_grad():  # new adapters are zero
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=seeded(3)))
    return model.eval()


def bert(name, **options):
    transformers = library("transformers")
    return getattr(transformers, name)(transformers.BertConfig(**SIZES, **options))


# The comparison


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ALL)
def test_parts_are_the_whole(kind, dtype):
    for form in FORMS if kind in CAUSAL else ({},):
        model = model_of(kind).to(dtype).train()
        state = torch.get_rng_state()
        blocks = blocks_of(kind, model=model, **form)
        assert blocks.base_model.whole_checked
        assert all(m.training for m in model.modules())
        own, ours = blocks.base_model.eval().compare()
        assert own.shape == ours.shape
        assert own.float().std() > 0
        torch.manual_seed(0)
        before = torch.get_rng_state()
        assert check_whole(blocks.base_model)
        assert torch.get_rng_state().equal(before)
        torch.set_rng_state(state)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "bert-classes", "vit", "timm", "dit"])
def test_a_forward_that_does_more_is_refused(kind):
    model = model_of(kind)
    if kind == "timm":
        hook = model.register_forward_hook(lambda module, args, out: 1.1 * out)
    else:
        name = "sample" if kind == "dit" else "logits"
        hook = model.register_forward_hook(
            lambda module, args, out: type(out)(**{name: 1.1 * getattr(out, name)})
        )
    with pytest.raises(ValueError, match=r"must compute what .* differs from theirs by 0\.09"):
        blocks_of(kind, model=model)
    assert blocks_of(kind, model=model, check=False).base_model.whole_checked
    hook.remove()
    blocks_of(kind, model=model)


def test_an_earlier_end_and_a_scale_of_logits_are_refused():
    class Scaled(type(model_of("llama"))):
        def forward(self, **kwargs):
            out = super().forward(**kwargs)
            out.logits = 30 * torch.tanh(out.logits / 0.01)
            return out

    model = model_of("llama")
    model.__class__ = Scaled
    with pytest.raises(ValueError, match="Scaled must compute what its embedding"):
        blocks_of("llama", model=model)


@pytest.mark.parametrize("kind", ["llama", "timm"])
def test_a_model_without_data_is_checked_when_it_has_some(kind):
    def broken(model):
        return model.register_forward_hook(
            lambda m, a, out: -out if isinstance(out, torch.Tensor) else type(out)(logits=-out[0])
        )

    real = model_of(kind)
    model = copy.deepcopy(real).to("meta")
    broken(model)
    blocks = blocks_of(kind, model=model)
    assert not blocks.base_model.whole_checked
    blocks.to_empty(device="cpu")
    with torch.no_grad():
        for p in blocks.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=seeded()))
        for b in blocks.buffers():
            b.fill_(1)
    with pytest.raises(ValueError, match="must compute what"):
        blocks.loss(batch_of(kind), 0)
    batch = {k: v for k, v in batch_of(kind).items() if k != "labels"}
    with pytest.raises(ValueError, match="must compute what"):
        blocks.logits(
            torch.zeros(3, 8, 16) if kind == "llama" else torch.zeros(3, 16), 1.0, **batch
        )


def test_a_saved_model_is_checked_after_it_is_read(tmp_path):
    blocks_of("llama").save_pretrained(tmp_path)
    again = ConvertedBlocks.from_pretrained(tmp_path, model_of("llama"))
    assert not again.base_model.whole_checked
    again.loss(batch_of("llama"), 0)
    assert again.base_model.whole_checked


# Adapters


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("llama", ["q_proj", "lm_head"]), ("gpt2", ["c_attn", "lm_head"])],
)
def test_an_adapter_of_the_output_head_is_refused(kind, targets):
    with pytest.raises(ValueError, match=r"lm_head must be an nn\.Linear, .* a peft Linear; merge"):
        blocks_of(kind, model=adapted(kind, targets))


@pytest.mark.parametrize(("kind", "targets"), [("llama", ["embed_tokens"]), ("gpt2", ["wte"])])
def test_an_adapter_of_the_embedding_is_refused(kind, targets):
    message = rf"{targets[0]} must be an nn\.Embedding, .* a peft Embedding; merge"
    with pytest.raises(ValueError, match=message):
        blocks_of(kind, model=adapted(kind, targets))


def test_a_head_that_peft_copies_is_refused():
    with pytest.raises(ValueError, match=r"lm_head must be an nn\.Linear, .* ModulesToSaveWrapper"):
        blocks_of("llama", model=adapted("llama", ["q_proj"], modules_to_save=["lm_head"]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "targets"), [("llama", ["q_proj", "up_proj"]), ("gpt2", ["wpe"])])
def test_other_adapters_are_honoured(kind, targets, form):
    model = adapted(kind, targets)
    blocks, tokens = blocks_of(kind, 1, model=model, **form), batch_of(kind)["tokens"]
    assert not torch.allclose(
        plain_logits(kind, model, {"tokens": tokens}),
        plain_logits(kind, model_of(kind), {"tokens": tokens}),
    )
    own, ours = blocks.base_model.compare()
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "bert-classes"])
def test_a_classifier_that_peft_copies_is_honoured(kind):
    names = {n.rpartition(".")[2] for n, _ in model_of(kind).named_modules()}
    targets = [n for n in ("query", "q_proj") if n in names]  # transformers 4, and 5 of ViT
    model = adapted(kind, targets, modules_to_save=["classifier"])
    blocks = blocks_of(kind, 1, model=model)
    blocks.loss(batch_of(kind), 0).loss.backward()
    assert model.base_model.model.classifier.modules_to_save.default.weight.grad.any()


@pytest.mark.parametrize(
    "name", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"]
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_virtual_tokens_are_refused(kind, name):
    peft = library("peft")
    config = getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=f"no virtual tokens, .* got {name}"):
        blocks_of(kind, model=peft.get_peft_model(model_of(kind), config))


# Hooks and forwards put in place


@pytest.mark.parametrize(
    ("kind", "path"),
    [("llama", "model.layers.1.input_layernorm"), ("timm", "blocks.0.norm2"),
     ("bert", "bert.encoder.layer.2.output.LayerNorm")],
)  # fmt: skip
@pytest.mark.parametrize("how", ["hook", "forward"])
def test_hooks_on_norms_are_honoured(kind, path, how):
    model = model_of(kind)
    norm = model.get_submodule(path)
    if how == "hook":
        norm.register_forward_hook(lambda module, args, out: 2 * out)
    else:
        own_forward = norm.forward
        norm.forward = lambda x: 2 * own_forward(x)
    own, ours = blocks_of(kind, model=model).base_model.compare()
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    other, _ = blocks_of(kind).base_model.compare()
    assert not torch.allclose(own, other)


@pytest.mark.parametrize(
    ("kind", "path"),
    [("llama", "model.layers.1"), ("vit", "vit.layers.3"), ("llama", "lm_head")],
)
def test_hooks_that_would_not_run_are_refused(kind, path):
    model = model_of(kind)
    try:
        module = model.get_submodule(path)
    except AttributeError:  # ViT of transformers 4
        path = "vit.encoder.layer.3"
        module = model.get_submodule(path)
    hook = module.register_forward_hook(lambda module, args, out: out)
    with pytest.raises(ValueError, match=rf"{path} must have no hooks"):
        blocks_of(kind, model=model)
    hook.remove()
    own_forward = module.forward
    module.forward = lambda *args, **kwargs: own_forward(*args, **kwargs)
    with pytest.raises(ValueError, match=rf"{path} must have no hooks and no replaced forward"):
        blocks_of(kind, model=model)


def test_a_model_that_records_its_hidden_states_is_taken():
    model = model_of("llama")
    for layer in model.model.layers:  # what transformers 4 leaves there
        layer.forward, layer.self_attn.forward = layer.forward, layer.self_attn.forward
    model(input_ids=batch_of("llama")["tokens"], output_hidden_states=True, output_attentions=True)
    model.enable_input_require_grads()
    blocks_of("llama", model=model)


# Heads with another target


@pytest.mark.parametrize(
    "name",
    ["BertForTokenClassification", "BertForMultipleChoice", "BertForQuestionAnswering",
     "BertForNextSentencePrediction"],
)  # fmt: skip
def test_heads_of_another_target_are_refused(name):
    with pytest.raises(ValueError, match=rf"must tell one class .* {name}, whose target is"):
        convert(bert(name), BlocksConfig(2), task="classes")


def test_two_targets_at_once_are_refused():
    config = BlocksConfig(2, schedule=MaskSchedule())
    with pytest.raises(ValueError, match="BertForPreTraining, whose target is two"):
        convert(bert("BertForPreTraining"), config, task="tokens", mask_token_id=MASK)


@pytest.mark.parametrize(
    "options",
    [{"num_labels": 1}, {"num_labels": 4, "problem_type": "multi_label_classification"},
     {"num_labels": 4, "problem_type": "regression"}],
)  # fmt: skip
def test_numbers_and_several_labels_are_refused(options):
    model = bert("BertForSequenceClassification", **options)
    with pytest.raises(ValueError, match=r"must choose one .* problem_type="):
        convert(model, BlocksConfig(2), task="classes")


def test_timm_models_of_two_heads_or_one_class():
    timm = library("timm")
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=CLASSES, img_size=32, depth=2
    )
    with pytest.raises(ValueError, match="must have one head, got head_dist beside head"):
        convert(model, BlocksConfig(2), task="classes")
    with pytest.raises(
        ValueError, match="must choose one of at least two classes, got num_labels=1"
    ):
        blocks_of("timm", model=model_of("timm", num_classes=1))
    assert task_of("timm") == "classes"
    assert isinstance(model.head_dist, nn.Linear)
