"""What is changed in a model reaches blocks that were taken before, and private copies.

What cannot reach them is refused by name at the next call.
"""

import copy

import pytest
import torch
from convert_tools import batch_of, blocks_of, model_of
from torch import nn

from dblocks.blocks import make_optimizers, train_step
from tools import DEVICE, seeded

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def converted(kind, num_blocks=1, **options):
    blocks = blocks_of(kind, num_blocks, **options).eval()
    return blocks, blocks.base_model.model


# A block that was taken before


def new_head(model):
    model.lm_head = nn.Linear(16, model.config.vocab_size, bias=False)


def new_embedding(model):
    model.model.embed_tokens = nn.Embedding(model.config.vocab_size, 16)


def new_norm(model):
    model.model.norm = nn.Identity()


def new_layer(model):
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])


REPLACED = {
    "lm_head": new_head, "model.embed_tokens": new_embedding, "model.norm": new_norm,
    "model.layers.0": new_layer, "the embeddings": lambda model: model.resize_token_embeddings(29),
}  # fmt: skip


@pytest.mark.parametrize("shared", ["train", "private"])
@pytest.mark.parametrize("num_blocks", [1, 2])
@pytest.mark.parametrize("path", REPLACED)
def test_a_block_refuses_what_was_replaced_after_it_was_taken(path, num_blocks, shared):
    blocks, model = converted("llama", num_blocks, config={"shared": shared})
    block, other = blocks.block(0), blocks.block(num_blocks - 1)
    block.loss(batch_of("llama"))
    REPLACED[path](model)
    named = "(the embeddings|lm_head)" if path == "the embeddings" else path.replace(".", r"\.")
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^{named} must stay .*; take the block anew"):
            block.loss(batch_of("llama"))
    if path != "model.layers.0":  # a layer of another block does not matter
        with pytest.raises(ValueError, match="take the block anew"):
            other.loss(batch_of("llama"))
    elif num_blocks > 1:
        other.loss(batch_of("llama"))
    if shared == "train" and path != "model.layers.0":
        again = blocks.block(0).loss(batch_of("llama"), generator=seeded())
        whole = blocks.loss(batch_of("llama"), 0, generator=seeded())
        assert again.loss.equal(whole.loss)


@pytest.mark.parametrize("tied", [False, True])
def test_a_block_refuses_new_tokens_of_its_own_model(tied):
    model = model_of("llama", tie_word_embeddings=tied)
    block = blocks_of("llama", 2, model=model).eval().block(0)
    block.base_model.resize_token_embeddings(29)
    with pytest.raises(ValueError, match="take the block anew"):
        block.loss(batch_of("llama"))


def test_a_block_honours_parts_of_its_layers_replaced_after_it_was_taken():
    blocks, model = converted("llama", 2)
    block = blocks.block(0)
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[3].mlp)
    model.model.layers[0].input_layernorm = nn.LayerNorm(16)
    own = block.loss(batch_of("llama"), generator=seeded()).loss
    assert own.equal(blocks.loss(batch_of("llama"), 0, generator=seeded()).loss)


# Private copies of what blocks share


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def private(kind="llama", shared="private", **options):
    blocks = blocks_of(kind, 2, config={"shared": shared}, **options)
    return blocks, blocks.base_model.model


@pytest.mark.parametrize("shared", ["private", "reduce"])
@pytest.mark.parametrize("taken", [False, True], ids=["whole", "block"])
def test_copies_follow_freezing(shared, taken):
    blocks, model = private(shared=shared)
    used = blocks.block(1) if taken else blocks
    model.model.norm.weight.requires_grad_(False)
    used.loss(batch_of("llama"), 1).loss.backward()
    norm = blocks.copies[0].model.model.norm.weight
    assert not norm.requires_grad
    assert norm.grad is None
    norm.requires_grad_(True)  # for this copy alone
    used.loss(batch_of("llama"), 1).loss.backward()
    assert norm.grad is not None
    model.model.norm.weight.requires_grad_(True)
    used.loss(batch_of("llama"), 1)
    assert norm.requires_grad


def test_what_is_unfrozen_in_copies_is_trained():
    blocks, model = private()
    norm = model.model.norm.weight
    norm.requires_grad_(False)
    optimizers = make_optimizers(blocks, adamw)
    train_step(blocks, batch_of("llama"), optimizers, block=1)
    norm.requires_grad_(True)
    with pytest.raises(ValueError, match="were added or unfrozen later"):
        train_step(blocks, batch_of("llama"), optimizers, block=1)
    blocks, model = private()
    model.model.norm.weight.requires_grad_(False)
    blocks.loss(batch_of("llama"), 1)
    model.model.norm.weight.requires_grad_(True)
    copied = blocks.copies[0].model.model.norm.weight
    before = copied.detach().clone()
    train_step(blocks, batch_of("llama"), make_optimizers(blocks, adamw), block=1)
    assert not torch.equal(copied, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("taken", [False, True], ids=["whole", "block"])
def test_copies_follow_the_dtype(dtype, taken):
    blocks, model = private()
    used, twin = (blocks.block(1) if taken else blocks), private()[0]
    twin.base_model.model.to(dtype)
    for part in twin.copies:
        part.model.to(dtype)
    model.to(dtype)
    own = used.loss(batch_of("llama"), 1, generator=seeded()).loss
    assert own.equal(twin.loss(batch_of("llama"), 1, generator=seeded()).loss)
    assert {p.dtype for p in blocks.copies[0].model.parameters()} == {dtype}


@pytest.mark.parametrize("moved", [False, True])
def test_copies_follow_the_device(moved):
    blocks, model = private()
    model.model.norm.to("meta")  # which has no values: the copy stays
    blocks.copies[0].follow_original_(moved=True)
    assert {p.device.type for p in blocks.copies[0].model.parameters()} == {"cpu"}
    if DEVICE.type == "cpu":
        return
    blocks, model = private()
    model.to(DEVICE)
    blocks.copies[0].follow_original_(moved=moved)
    types = {p.device.type for p in blocks.copies[0].model.parameters()}
    assert types == {DEVICE.type if moved else "cpu"}


@pytest.mark.parametrize("taken", [False, True], ids=["whole", "block"])
def test_copies_follow_mode_and_dropout(taken):
    blocks, model = private("gpt2")
    blocks.train()
    used, drop = (blocks.block(1) if taken else blocks), blocks.copies[0].model.transformer.drop
    model.transformer.drop.p = 0.25
    used.loss(batch_of("gpt2"), 1)
    assert drop.p == 0.25
    assert drop.training
    model.eval()
    first, second = (used.loss(batch_of("gpt2"), 1, generator=seeded()).loss for _ in range(2))
    assert first.equal(second)
    assert not drop.training
    blocks.copies[0].train()  # for this copy alone
    used.loss(batch_of("gpt2"), 1)
    assert drop.training


@pytest.mark.parametrize("taken", [False, True], ids=["whole", "block"])
def test_numbers_of_modules_with_copies_are_refused(taken):
    blocks, model = private()
    used = blocks.block(1) if taken else blocks
    model.model.norm.variance_epsilon = 1.0
    for _ in range(2):
        with pytest.raises(ValueError, match=r"variance_epsilon of model\.norm .* got 1\.0 where"):
            used.loss(batch_of("llama"), 1)
    model.model.norm.variance_epsilon = blocks.copies[0].model.model.norm.variance_epsilon
    used.loss(batch_of("llama"), 1)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "bert-classes"])
def test_copies_follow_the_function_that_attends(kind, name):
    blocks, model = private(kind)
    blocks.eval()
    before = blocks.loss(batch_of(kind), 1, generator=seeded()).loss
    model.set_attn_implementation(name)
    after = blocks.loss(batch_of(kind), 1, generator=seeded()).loss
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert blocks.copies[0].model.config is model.config
