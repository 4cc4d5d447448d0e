"""Models whose layers are quantised, as by bitsandbytes and torchao, of which these stand in."""

import pytest
import torch
from convert_tools import adamw, batch_of, blocks_of, model_of, plain_logits
from hub_tools import library
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from dblocks import make_optimizers, train_step

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
FORMS = pytest.mark.parametrize("rows", ["single", "doubled"])
WHEN = pytest.mark.parametrize("when", ["before", "after"])


class Packed(nn.Linear):
    """A linear layer of integers, as bitsandbytes' are."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        factor = linear.weight.detach().abs().amax() / 127
        packed = (linear.weight.detach() / factor).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("factor", factor)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.factor.to(x.dtype))


def packed(model, head=False):
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (head or "lm_head" not in name):
            place, _, own = name.rpartition(".")
            setattr(model.get_submodule(place), own, Packed(module))
    return model


def tensors_in_tensors(module):
    """As torchao's `quantize_`: the module stays, its weight is a tensor of another class."""
    weight = module.weight.detach()
    module.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)


def converted(quantise, when, rows):
    model = model_of("llama")
    if when == "before":
        quantise(model)
    blocks = blocks_of("llama", model=model, rows=rows)
    if when == "after":
        blocks.loss(batch_of("llama"), 0)
        quantise(model)
    return blocks, model


def used(quantise, when):
    converted(quantise, when, "single")[0].loss(batch_of("llama"), 0)


@FORMS
@WHEN
def test_layers_of_integers_are_honoured(when, rows):
    blocks, model = converted(packed, when, rows)
    blocks.eval().before_use()
    own, ours = blocks.base_model.compare()
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)
    assert not own.equal(blocks_of("llama", rows=rows).base_model.compare()[0])
    held = model.model.layers[0].mlp.up_proj.weight.clone()
    result = train_step(blocks, batch_of("llama"), make_optimizers(blocks, adamw), block=0)
    assert result.loss.isfinite()
    assert model.model.layers[0].mlp.up_proj.weight.equal(held)


@FORMS
def test_an_adapter_on_layers_of_integers_trains(rows):
    peft = library("peft")
    blocks, model = converted(packed, "before", rows)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], r=2), model)
    before = plain_logits("llama", model, batch_of("llama"))
    for _ in range(2):  # its second matrix begins at zero
        train_step(blocks, batch_of("llama"), make_optimizers(blocks, adamw), block=1)
    assert not plain_logits("llama", model, batch_of("llama")).equal(before)
    own, ours = blocks.eval().base_model.compare()
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-5)


@WHEN
def test_a_head_of_integers_is_refused(when):
    with pytest.raises(ValueError, match=r"lm_head must be an nn\.Linear|must have plain weights"):
        used(lambda model: packed(model, head=True), when)


@WHEN
@pytest.mark.parametrize("path", ["lm_head", "model.embed_tokens"])
def test_read_weights_that_pack_others_are_refused(when, path):
    def quantise(model):
        tensors_in_tensors(model.get_submodule(path))

    with pytest.raises(ValueError, match=f"{path} must have plain weights, .* a TwoTensor"):
        used(quantise, when)


@pytest.mark.parametrize("kind", [Packed, TwoTensor])
def test_quantised_weights_are_not_saved(kind, tmp_path):
    blocks, model = converted(lambda model: model, "before", "single")
    if kind is Packed:
        packed(model)
    else:
        tensors_in_tensors(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match=r"must be plain to be saved, .* model\.layers\.\d\."):
        blocks.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
