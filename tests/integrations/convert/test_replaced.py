"""What took the place of a part of a model is honoured, or refused by name."""

import pytest
import torch
from family_models import TEXT, T, V, causal_model
from hub_tools import library
from torch import nn

from dblocks import BlocksConfig
from dblocks.integrations.convert import convert
from tools import seeded

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
ROWS = ("single", "doubled")
TOKENS = torch.randint(3, V, (2, T), generator=seeded(4))


def converted(model, rows="single"):
    return convert(model, BlocksConfig(2), task="tokens", rows=rows)


# An attention that attends by itself: clean rows are right, and noisy ones see later clean ones.


def own_forward(self, hidden_states, position_embeddings=None, **others):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key, value = (
        linear(hidden_states).view(shape).transpose(1, 2)
        for linear in (self.q_proj, self.k_proj, self.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    o = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    return self.o_proj(o.transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("how", ["class", "forward", "one layer"])
def test_an_attention_that_attends_by_itself_is_refused(how, rows):
    model = causal_model("llama")
    for layer in list(model.model.layers)[3 if how == "one layer" else 0 :]:
        own = layer.self_attn
        if how == "forward":
            own.forward = own_forward.__get__(own)
        else:
            own.__class__ = type("Patched", (type(own),), {"forward": own_forward})
    name = "model.layers.3" if how == "one layer" else "model.layers.0"
    with pytest.raises(ValueError, match=f"attention of {name} must attend by the function"):
        converted(model, rows)


@pytest.mark.parametrize("rows", ROWS)
def test_hooks_on_an_attention_are_honoured(rows):
    model = causal_model("llama")
    attention = model.model.layers[1].self_attn
    attention.register_forward_hook(lambda module, args, out: (3 * out[0], *out[1:]))
    own, ours = converted(model, rows).base_model.compare()
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    other, _ = converted(causal_model("llama"), rows).base_model.compare()
    assert not torch.allclose(own, other, rtol=1e-2)


def test_an_adapter_in_place_of_the_attention_is_refused():
    peft = library("peft")
    config = peft.AdaptionPromptConfig(adapter_layers=2, adapter_len=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(causal_model("llama"), config)
    with pytest.raises(ValueError, match="got a peft AdaptedAttention without a config"):
        converted(model)


@pytest.mark.parametrize("name", ["IA3Config", "LNTuningConfig", "LoraConfig", "FourierFTConfig"])
def test_adapters_inside_layers_are_honoured(name):
    peft = library("peft")
    options = {
        "IA3Config": {
            "target_modules": ["k_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        },
        "LNTuningConfig": {"target_modules": ["input_layernorm", "norm"]},
        "LoraConfig": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
        "FourierFTConfig": {"target_modules": ["q_proj"], "n_frequency": 5},
    }[name]
    model = peft.get_peft_model(causal_model("llama"), getattr(peft, name)(**options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=seeded(2)))
    blocks = converted(model)
    own, ours = blocks.base_model.compare()
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    blocks.loss({"tokens": TOKENS}, 0).loss.backward()
    trained = [n for n, p in model.named_parameters() if p.requires_grad and ".layers." in n]
    moved = [n for n, p in model.named_parameters() if p.grad is not None and ".layers." in n]
    assert moved == [n for n in trained if ".layers.0." in n or ".layers.1." in n]


# Around the model


def test_wrappers_of_torch_are_refused():
    model = causal_model("llama")
    with pytest.raises(ValueError, match=r"got a OptimizedModule; convert model\._orig_mod"):
        converted(torch.compile(model, backend="eager"))
    with pytest.raises(ValueError, match=r"got a DataParallel; convert model\.module"):
        converted(nn.DataParallel(model))
    model.compile(backend="eager")  # which puts nothing around it
    converted(model)


def test_layers_left_out_at_random_are_refused():
    with pytest.raises(ValueError, match=r"layerdrop=0.5 \(layers left out at random"):
        converted(causal_model("opt", layerdrop=0.5))
    converted(causal_model("opt", layerdrop=0.0))


@pytest.mark.parametrize("tied", [False, True])
def test_another_number_of_tokens(tied):
    model = causal_model("llama", tie_word_embeddings=tied)
    model.resize_token_embeddings(V + 6)
    blocks = converted(model)
    own, ours = blocks.base_model.compare()
    assert own.shape[-1] == V + 6
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    assert blocks.loss({"tokens": torch.full((2, T), V + 5)}, 0).loss.isfinite()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointing_repeats_dropout(when, reentrant):
    def gradients(checkpointing):
        model = causal_model("gpt2", attn_pdrop=0.2, resid_pdrop=0.2, embd_pdrop=0.1)
        if checkpointing and when == "before":
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        blocks = converted(model, "doubled").train()
        if checkpointing and when == "after":
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        blocks.loss({"tokens": TOKENS}, 1).loss.backward()
        return [p.grad for p in blocks.parameters() if p.grad is not None]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-5, atol=1e-6)


def test_old_versions_are_refused_by_name():
    transformers = library("transformers")
    if not transformers.__version__.startswith("4."):
        pytest.skip("these are known in transformers 5")
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "vocab_size": V}
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes))
    with pytest.raises(ValueError, match="'gptj' must be of transformers 5"):
        converted(model)
    config = transformers.DistilBertConfig(**TEXT["distilbert"])
    model = transformers.DistilBertForSequenceClassification(config)
    with pytest.raises(ValueError, match="'distilbert' must be of transformers 5"):
        convert(model, BlocksConfig(2), task="classes")
