import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.blocks.memory import SavedActivations
from lm_tools import CLOSE, adamw, recurrent_blocks_of, recurrent_of, tokens_of
from tools import DEVICE, normal, randomized, seeded


def pattern(n=16, seed=0):
    """Sequences that count upwards from a random token, modulo 8."""
    first = torch.randint(8, (n, 1), generator=seeded(seed))
    return {"tokens": ((first + torch.arange(8)) % 8).to(DEVICE)}


def test_blocks_learn_a_pattern():
    lm = recurrent_of(gate_init=1.0, width=32, core=1, coda=1, prelude=1, logit_scale=4.0)
    model = DiffusionBlocks(lm, BlocksConfig(1, weighting="none"))
    optimizers, generator = make_optimizers(model, adamw), seeded()
    for step in range(100):
        train_step(model, pattern(seed=step), optimizers, generator=generator)
    z = 80 * normal(16, 8, 32)
    logits = model.logits(z, 80.0, **pattern(seed=1000))
    guessed = (logits[:, 1:].argmax(-1) == pattern(seed=1000)["tokens"][:, 1:]).float().mean()
    assert guessed > 0.9  # 1 in 8 by chance


def test_the_plain_model_learns_a_pattern():
    lm = recurrent_of(
        conditioning="none", width=32, core=1, coda=1, prelude=1, logit_scale=4.0,
        mean_recurrence=3, backprop_depth=2,
    )  # fmt: skip
    optimizer, generator = adamw(lm.parameters()), seeded()
    for step in range(100):
        optimizer.zero_grad()
        lm.next_token_loss(pattern(seed=step), generator=generator).backward()
        optimizer.step()
    assert lm.next_token_loss(pattern(seed=1000)) < 0.5  # log 11 = 2.4 for all tokens alike


def test_a_block_step_saves_far_less_than_the_plain_model():
    lm = recurrent_of(gate_init=1.0, width=64, heads=2, kv_heads=None)
    batch = {"tokens": tokens_of()}
    model = DiffusionBlocks(lm, BlocksConfig(1))
    saved = []
    for loss in (
        lambda: model.loss(batch, 0, generator=seeded()).loss,
        lambda: lm.next_token_loss(batch, num_recurrences=32, generator=seeded()),
        lambda: lm.next_token_loss(batch, num_recurrences=8, generator=seeded()),
    ):
        with SavedActivations(lm.parameters()) as activations:
            kept = loss()
        saved.append(activations.bytes)
        del kept
    # Layers that keep activations: 2 + 2*6 - 1 = 13 on T rows against 2 + 8*4 + 2 = 36.
    assert saved[0] < 0.5 * saved[1]
    assert saved[1] < 1.1 * saved[2]  # what is not backpropagated through is not kept


def test_every_parameter_gets_a_gradient():
    model = recurrent_blocks_of(tied=False)
    model.loss({"tokens": tokens_of()}, 0, generator=seeded()).loss.backward()
    for name, p in model.base_model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("num_recurrences", [2, 9])
def test_autocast_gives_gradients_after_recurrences_without(num_recurrences):
    lm = randomized(recurrent_of(conditioning="none"))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = lm.next_token_loss(
            {"tokens": tokens_of()}, num_recurrences=num_recurrences, generator=seeded()
        )
    loss.backward()
    without = {"noisy_row", "noise_scale"}
    for name, p in lm.named_parameters():
        assert name in without or (p.grad is not None and p.grad.abs().sum() > 0), name


def test_parameters_may_be_bfloat16():
    model = recurrent_blocks_of().bfloat16()
    loss = model.loss({"tokens": tokens_of()}, 0, generator=seeded()).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert model.base_model(tokens_of(), num_recurrences=2).dtype == torch.float32


def test_a_loss_compiles_as_one_graph():
    model, batch = recurrent_blocks_of(core=1, coda=1, prelude=1), {"tokens": tokens_of(1)}
    draw = model.draw(batch, 0, generator=seeded())
    compiled = torch.compile(model.loss_at, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch, 0, draw), model.loss_at(batch, 0, draw), **CLOSE)


@settings(max_examples=8)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
def test_packed_documents_equal_separate_sequences(lengths):
    model = recurrent_blocks_of(core=2)
    lm = model.base_model
    documents = [tokens_of(1, length, seed=i) for i, length in enumerate(lengths) if length]
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    batch = {"tokens": torch.cat(documents, dim=1), "cu_seqlens": ends}
    T = batch["tokens"].shape[1]
    z, sigma = normal(1, T, 16), torch.rand(1, T, generator=seeded()).to(DEVICE) + 0.1
    got = model.logits(z, sigma, **batch)
    plain = lm(**batch, num_recurrences=2, normals=z)
    start = 0
    for document in documents:
        part = slice(start, start := start + document.shape[1])
        alone = model.logits(z[:, part], sigma[:, part], tokens=document)
        torch.testing.assert_close(got[:, part], alone, **CLOSE)
        alone = lm(document, num_recurrences=2, normals=z[:, part])
        torch.testing.assert_close(plain[:, part], alone, **CLOSE)


def test_the_state_dict_does_not_depend_on_the_recurrences():
    lm, tokens, noise = randomized(recurrent_of()), tokens_of(), normal(2, 8, 16)
    fresh = recurrent_of(mean_recurrence=99, backprop_depth=1)
    fresh.load_state_dict(lm.state_dict())
    same = [m(tokens, num_recurrences=3, normals=noise) for m in (lm, fresh, copy.deepcopy(lm))]
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
