"""A change before a copy is honoured in it or refused, as at the next call; and what has copies."""

import copy
import io

import pytest
import torch
from convert_tools import batch_of, blocks_of, model_of
from torch import nn

from dblocks import make_optimizers, train_step
from dblocks.scale import resident

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def pickled(blocks):
    file = io.BytesIO()
    torch.save(blocks, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def made(num_blocks=2, shared="train", **options):
    """A converted Llama that was used, and the model itself."""
    blocks = blocks_of(
        "llama", num_blocks, model=model_of("llama", **options), config={"shared": shared}
    ).eval()
    blocks.loss(batch_of("llama"), 0)
    return blocks, blocks.base_model.model


def halved(module, args, out):
    return out / 2


def tripled_in_training(module, args, out):
    return out * 3 if module.training else out


def loss_of(blocks, block=0):
    torch.manual_seed(5)
    return blocks.loss(batch_of("llama"), block).loss.item()


def replace_layer(model):
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])


def share_parameter(model):
    model.model.layers[3].mlp = model.model.layers[0].mlp


def hook_head(model):
    model.lm_head.register_forward_hook(tripled_in_training)


def hook_layer(model):
    model.model.layers[1].register_forward_hook(halved)


REFUSED = {
    replace_layer: r"model\.layers\.1 must stay the module that was converted",
    share_parameter: "must not share a parameter",
    hook_head: "lm_head must have no hooks",
    hook_layer: r"model\.layers\.1 must have no hooks",
}


@pytest.mark.parametrize("how", [copy.deepcopy, pickled, copy.copy])
@pytest.mark.parametrize("change", REFUSED)
def test_a_copy_does_not_hide_a_change(change, how):
    blocks, model = made()
    blocks.train()
    change(model)
    with pytest.raises(ValueError, match=REFUSED[change]):
        how(blocks)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
@pytest.mark.parametrize("change", REFUSED)
def test_a_copy_notices_a_change_before_its_first_call(change, how):
    other = how(made()[0])
    change(other.base_model.model)
    with pytest.raises(ValueError, match=REFUSED[change]):
        other.loss(batch_of("llama"), 0)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_an_honoured_change_is_honoured_in_a_copy(how):
    blocks, model = made()
    before = loss_of(blocks)
    model.model.layers[0].mlp.register_forward_hook(halved)
    other = how(blocks)
    assert loss_of(other) == loss_of(blocks) != before
    hook_layer(other.base_model.model)
    with pytest.raises(ValueError, match="must have no hooks"):
        loss_of(other)
    loss_of(blocks)


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_what_is_frozen_in_a_copy(how):
    blocks, model = made(shared="frozen")
    model.set_input_embeddings(nn.Embedding(23, 16))
    other = how(blocks)
    loss_of(other)
    assert not other.base_model.model.model.embed_tokens.weight.requires_grad
    model.lm_head.requires_grad_(True)  # by hand
    other = how(blocks)
    loss_of(other)
    assert other.base_model.model.lm_head.weight.requires_grad


def test_a_change_of_what_has_copies_is_not_hidden():
    blocks, model = made(shared="private")
    model.model.norm.register_forward_hook(halved)
    with pytest.raises(ValueError, match=r"model\.norm .* must not be changed after convert"):
        copy.deepcopy(blocks)


class Refers:
    """A hook of the model that refers to its blocks."""

    def __init__(self, blocks):
        self.blocks = blocks

    def __call__(self, module, args):
        return None


def test_blocks_that_their_model_refers_to():
    blocks, model = made()
    model.register_forward_pre_hook(Refers(blocks))
    loss = loss_of(blocks)
    for how in (copy.deepcopy, pickled):
        other = next(iter(how(model)._forward_pre_hooks.values())).blocks
        assert loss_of(other) == loss
        other = next(iter(how(model)._forward_pre_hooks.values())).blocks
        hook_head(other.base_model.model.train())
        with pytest.raises(ValueError, match="lm_head must have no hooks"):
            loss_of(other)


# Copies of what blocks share


@pytest.mark.parametrize("shared", ["private", "reduce"])
@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_of_what_has_copies_are_refused(shared, tied):
    blocks, model = made(shared=shared, tie_word_embeddings=tied)
    model.resize_token_embeddings(29)
    for block in range(2):
        with pytest.raises(ValueError, match=f"must not be changed after convert with.*{shared}"):
            blocks.loss(batch_of("llama"), block)


@pytest.mark.parametrize("shared", ["private", "reduce"])
def test_a_hook_on_the_model_is_of_its_own_calls(shared):
    blocks, model = made(shared=shared)
    loss = loss_of(blocks, 1)
    met = []
    hook = model.register_forward_hook(lambda *given: met.append(0))
    assert loss_of(blocks, 1) == loss
    met.clear()
    loss_of(blocks, 0)
    assert not met
    model(input_ids=batch_of("llama")["tokens"])
    assert met
    model.model.norm.register_forward_hook(halved)
    with pytest.raises(ValueError, match=r"model\.norm"):
        loss_of(blocks)
    model.model.norm._forward_hooks.clear()
    hook.remove()
    assert loss_of(blocks, 1) == loss


def test_a_hook_on_a_resident_model_is_of_its_own_calls():
    blocks, model = made()
    optimizers = make_optimizers(blocks, lambda p: torch.optim.SGD(p, lr=0.1))
    residency = resident(blocks, optimizers, "cpu", host="pinned")
    hook = model.register_forward_hook(lambda *given: None)
    train_step(blocks, batch_of("llama"), optimizers)
    model.model.layers[0].mlp.register_forward_hook(halved)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp .* while the model is sharded or resid"):
        train_step(blocks, batch_of("llama"), optimizers)
    hook.remove()
    residency.close()
