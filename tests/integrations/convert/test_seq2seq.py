"""T5's decoder in blocks, with what its encoder makes of another text as condition."""

import copy

import pytest
import torch
import torch.nn.functional as nnf
from convert_tools import check_family, shaken
from family_models import SEQ2SEQ, T, V, clean_logits, seq2seq_model

from dblocks import BlocksConfig
from dblocks.integrations.convert import convert
from dblocks.sampling import denoising_bound, generate, next_token_nll, product_nll
from dblocks.testing import assert_within_budget
from tools import seeded

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:not fused"),  # norms of a class of their own
]
TOKENS = torch.randint(3, V, (2, T), generator=seeded(2))
TOKENS[:, 0] = 0  # decoder_start_token_id
ENCODER = torch.randint(3, V, (2, 5), generator=seeded(3))
SHOWN = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
MORE = {"encoder_tokens": ENCODER, "encoder_attention_mask": SHOWN}
BATCH = {"tokens": TOKENS, **MORE}


def own_logits(model, tokens=TOKENS, **more):
    given = {"input_ids": ENCODER, "attention_mask": SHOWN, "use_cache": False, **more}
    return model(decoder_input_ids=tokens, **given).logits


def blocks_of(kind, rows="single", **options):
    return convert(seq2seq_model(kind), BlocksConfig(2), task="tokens", rows=rows, **options)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_families(kind, tmp_path):
    model = seq2seq_model(kind)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        own = own_logits(model)
        for rows in ("single", "doubled"):
            ours = clean_logits(copy.deepcopy(model), TOKENS, rows, **MORE)
            assert (ours - own[:, : ours.shape[1]]).abs().max() < 2e-5 * own.abs().max(), rows
    check_family(model, fresh, BATCH, own_logits, tmp_path, task="tokens")


def test_rows_that_are_not_scaled():
    """As in the published T5 of version 1.1."""
    model = seq2seq_model("t5", tie_word_embeddings=False)
    with torch.no_grad():
        own = own_logits(model)
        ours = clean_logits(model, TOKENS, "single", **MORE)
        assert (ours - own[:, :-1]).abs().max() < 2e-5 * own.abs().max()
        assert not torch.allclose(own, own_logits(seq2seq_model("t5")), rtol=0.1)


def cost(logits):
    return nnf.cross_entropy(logits[:, : T - 1].float().flatten(0, 1), TOKENS[:, 1:].flatten())


@pytest.mark.parametrize("kind", ["t5", "umt5"])
@pytest.mark.parametrize("rows", ["single", "doubled"])
def test_gradients(kind, rows):
    """Of every parameter, the encoder's too; the bias of all layers has that of its copy."""
    model = seq2seq_model(kind)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(cost(own_logits(model)), parameters)
    ours = copy.deepcopy(model)
    loss = cost(clean_logits(ours, TOKENS, rows, **MORE))
    found = torch.autograd.grad(loss, tuple(ours.parameters()), allow_unused=True)
    largest = max(g.abs().max() for g in expected)
    for name, got, right in zip(names, found, expected, strict=True):
        if kind == "t5" and name.startswith("decoder") and "relative_attention_bias" in name:
            assert got is None
            continue
        assert (got - right).abs().max() <= 2e-4 * right.abs().max() + 2e-6 * largest, name


def test_the_bias_of_all_layers_is_trained():
    blocks = shaken(blocks_of("t5"))
    blocks.loss(BATCH, 1, generator=seeded()).loss.backward()
    network = blocks.base_model
    assert network.relative_bias.weight.grad.any()
    assert network.family.table(network.model).weight.grad is None
    assert network.model.encoder.block[0].layer[0].SelfAttention.q.weight.grad.any()
    shared = {id(p) for p in blocks.shared_parameters()}
    assert id(network.relative_bias.weight) in shared


def test_a_bias_of_each_layer_belongs_to_its_block():
    blocks = shaken(blocks_of("umt5"))
    blocks.loss(BATCH, 1, generator=seeded()).loss.backward()
    layers = [layer.layer for layer in blocks.base_model.layers]
    tables = [layer.layer[0].SelfAttention.relative_attention_bias.weight for layer in layers]
    assert [table.grad is not None and bool(table.grad.any()) for table in tables] == [
        False, False, True, True
    ]  # fmt: skip
    assert blocks.base_model.relative_bias is None
    shared = {id(p) for p in blocks.shared_parameters()}
    assert not shared.intersection(map(id, tables))


@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_clean_loss(kind):
    blocks = blocks_of(kind, clean_loss_weight=1.0)
    model = blocks.base_model.model
    draw = blocks.draw(BATCH, 1, generator=seeded())
    loss, own = blocks.clean_loss(BATCH, 1, draw), cost(own_logits(model))
    torch.testing.assert_close(loss, own)
    parameters = [p for b in (0, 1) for p in blocks.base_model.layers[2 * b].layer.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected = torch.autograd.grad(own, parameters)
    half = len(list(blocks.base_model.layers[0].layer.parameters()))
    assert all(g is None for g in found[:half])
    for got, right in zip(found[half:], expected[half:], strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "rows"), [("mt5", "single"), ("mt5", "doubled"), ("umt5", "single")]
)
def test_padding_of_either_text_changes_nothing(kind, rows):
    blocks = shaken(blocks_of(kind, rows))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
    z, sigma = torch.randn(2, T, 16, generator=seeded(4)), torch.tensor(1.0)
    tokens = TOKENS.clone()
    tokens[0, 3] = 0  # where its text begins
    batch = BATCH | {"tokens": tokens}
    with torch.no_grad():
        found = blocks.logits(z, sigma, block=0, attention_mask=mask, **batch)
        for n, (of_text, of_encoder) in enumerate(
            ((slice(3, 8), slice(2, 5)), (slice(6), slice(4)))
        ):
            one = slice(n, n + 1)
            alone = blocks.logits(
                z[one, of_text], sigma, block=0, tokens=tokens[one, of_text],
                encoder_tokens=ENCODER[one, of_encoder],
            )  # fmt: skip
            error = (found[one, of_text][:, 1:] - alone[:, 1:]).abs().max()
            assert error < 1e-5 * alone.abs().max()
        other = blocks.logits(z, sigma, block=0, attention_mask=mask, **(batch | {
            "encoder_tokens": torch.where(SHOWN == 1, ENCODER, (ENCODER + 5) % V)
        }))  # fmt: skip
        torch.testing.assert_close(other, found)
        changed = batch | {"encoder_tokens": (ENCODER + 1) % V}
        assert not torch.allclose(
            blocks.logits(z, sigma, block=0, attention_mask=mask, **changed), found
        )


@pytest.mark.parametrize("kind", ["t5", "umt5"])
def test_bfloat16(kind):
    model = seq2seq_model(kind).bfloat16()
    with torch.no_grad():
        exact = own_logits(copy.deepcopy(model).float()).double()
        eager = own_logits(model)
        for rows in ("single", "doubled"):
            found = clean_logits(copy.deepcopy(model), TOKENS, rows, **MORE).bfloat16()
            last = found.shape[1]
            assert_within_budget(found, exact[:, :last], eager[:, :last].contiguous(), rows)
    blocks = shaken(convert(model, BlocksConfig(2), task="tokens", clean_loss_weight=1.0))
    loss = blocks.loss(BATCH, 1, generator=seeded()).loss
    loss.backward()
    assert loss.isfinite()


def test_what_is_refused():
    blocks = blocks_of("t5")
    with pytest.raises(ValueError, match="must hold a tensor 'encoder_tokens'"):
        blocks.loss({"tokens": TOKENS}, 0)
    with pytest.raises(ValueError, match="encoder_tokens must have as many samples as tokens, 2"):
        blocks.loss({"tokens": TOKENS, "encoder_tokens": ENCODER[:1]}, 0)
    with pytest.raises(ValueError, match="'position_ids' too"):
        blocks.loss(BATCH | {"position_ids": torch.arange(T).expand(2, T)}, 0)
    ends = torch.tensor([0, 3, T], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens must be None for an encoder and a decoder"):
        blocks.loss({k: v[:1] for k, v in BATCH.items()} | {"cu_seqlens": ends}, 0)
    for cache in (True, False):
        with pytest.raises(ValueError, match=r"written by its own generate|'encoder_tokens'"):
            generate(blocks, [[0]], max_new_tokens=2, cache=cache)


def test_tokens_that_do_not_begin_as_the_decoder_does_are_refused():
    blocks = blocks_of("t5")
    with pytest.raises(ValueError, match=r"must begin with .*decoder_start_token_id 0"):
        blocks.loss(BATCH | {"tokens": TOKENS[:, 1:]}, 0, generator=seeded())


def test_likelihoods_take_the_encoders_text():
    # All layers in one block are the model.
    one = convert(seq2seq_model("t5"), BlocksConfig(1), task="tokens")
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            own_logits(one.base_model.model)[:, :-1].transpose(1, 2), TOKENS[:, 1:],
            reduction="none",
        )  # fmt: skip
    for nll in (next_token_nll, product_nll):
        found = nll(one, TOKENS, generator=seeded(), **MORE)
        # At sigma_max = 80 the noisy embedding still says |z E|/80^2, some hundredths.
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.05)
    assert denoising_bound(one, TOKENS, generator=seeded(), **MORE).nll.isfinite().all()
    with pytest.raises(ValueError, match="encoder_token'"):
        next_token_nll(one, TOKENS, encoder_token=ENCODER)
