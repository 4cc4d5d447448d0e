"""The attention that transformers' layers call: what it is handed is read or refused by name."""

import pytest
import torch
from convert_tools import (
    CAUSAL,
    PUBLISHED,
    SINGLE,
    WINDOWS,
    batch_of,
    blocks_of,
    model_of,
    plain_logits,
    shaken,
)
from torch import nn

from dblocks.functional import doubled_attention
from dblocks.integrations.convert import row_attention
from dblocks.integrations.convert.row_attention import causal, doubled
from dblocks.kernels.reference import doubled_mask
from tools import normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")
MODULE = nn.Identity()


def rows(heads=2, T=8, seed=0):
    return normal(2, heads, 2 * T, 16, seed=seed)


Q, K, V = rows(4), rows(seed=1), rows(seed=2)


def clean_logits(kind, model):
    """The model's own head over the clean rows."""
    blocks, tokens = blocks_of(kind, model=model, **PUBLISHED), batch_of(kind)["tokens"]
    network = blocks.base_model
    condition = network.embed_condition({"tokens": tokens})
    level = blocks.config.schedule.level(torch.ones(3, 8))
    x = torch.cat([condition.clean, condition.noisy], dim=1)
    cond = network.noise_embedding(level.c_noise)
    for layer in network.layers:
        x = layer(x, cond, condition.attention, clean=cond.shape[1])
    clean = x.chunk(2, dim=1)[0]
    return network.family.head(network.model)(network.family.leave(network.model, clean))


@pytest.mark.parametrize("kind", WINDOWS)
def test_clean_rows_have_the_window_of_the_model(kind):
    model = model_of(kind, **WINDOWS[kind])
    batch = batch_of(kind)
    found = clean_logits(kind, model)
    torch.testing.assert_close(found, plain_logits(kind, model, batch))
    assert not torch.allclose(found, clean_logits(kind, model_of(kind)), atol=1e-4)


@pytest.mark.parametrize("kind", WINDOWS)
def test_dropout_keeps_the_window(kind, monkeypatch):
    batch = batch_of(kind)
    options = [WINDOWS[kind] | {"attention_dropout": p} for p in (0.0, 1e-12)]
    models = [model_of(kind, **o) for o in options]
    none, tiny = (shaken(blocks_of(kind, model=m, **PUBLISHED).train()) for m in models)
    expected = none.loss(batch, 1, generator=seeded()).loss
    monkeypatch.setattr("dblocks.functional.doubled_attention", None)
    torch.testing.assert_close(tiny.loss(batch, 1, generator=seeded()).loss, expected)


@pytest.mark.parametrize("form", [PUBLISHED, SINGLE], ids=lambda form: form["rows"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_what_the_layers_hand_over_is_read(kind, form, monkeypatch):
    """A model's own layers call it with nothing that it refuses, and with no mask."""
    calls = []
    name = {"single": "CAUSAL", "doubled": "DOUBLED"}[form["rows"]]
    function = {"single": causal, "doubled": doubled}[form["rows"]]

    def recorded(module, *arguments, **options):
        calls.append(options)
        return function(module, *arguments, **options)

    from transformers import AttentionInterface

    interface = AttentionInterface()
    monkeypatch.setitem(interface._global_mapping, getattr(row_attention, name), recorded)
    blocks_of(kind, **form).loss(batch_of(kind), 0)
    assert calls
    assert all("scaling" in options or kind == "gpt2" for options in calls)


def test_options_are_passed_on():
    expected = doubled_attention(Q, K, V, scale=0.3, window=3, softcap=2.0)
    got, weights = doubled(
        MODULE, Q, K, V, None, scaling=0.3, sliding_window=3, softcap=2.0, dropout=0.0,
        is_causal=True, output_attentions=False, use_cache=True, head_mask=None, s_aux=None,
        position_bias=None, position_ids=None,
    )  # fmt: skip
    assert weights is None
    torch.testing.assert_close(got, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"head_mask": torch.ones(4)}, "head_mask"),
        ({"position_ids": torch.arange(16)[None]}, "position_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 16])}, "cu_seq_lens_q"),
        ({"output_attentions": True}, "output_attentions"),
        ({"is_causal": False}, "is_causal=False"),
        ({"a": 0, "b": 0.0}, "a, b;"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_read_is_refused(options, named):
    for function in (doubled, causal):
        with pytest.raises(ValueError, match=f"does not do what Identity asks for with {named}"):
            function(MODULE, Q, K, V, None, **options)


def test_other_refusals():
    with pytest.raises(ValueError, match="asks for with attention_mask; a model that needs it"):
        doubled(MODULE, Q, K, V, torch.ones(2, 1, 16, 16))
    module = nn.Identity()
    module.is_causal = False
    for function in (doubled, causal):
        with pytest.raises(ValueError, match="is_causal=False"):
            function(module, Q, K, V, None)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("window", [None, 1, 3, 16])
def test_the_attention_of_a_single_stream(window, softcap):
    """Against softmax written out; a mask narrows what the window leaves."""
    R = Q.shape[2]
    row = torch.arange(R)
    back = row[:, None] - row
    for given in (None, (back >= 0) & ((row[:, None] < 7) == (row < 7))):
        seen = (back >= 0) if given is None else given
        seen = seen if window is None else seen & (back < window)
        scores = 0.3 * Q.double() @ K.repeat_interleave(2, 1).double().mT
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        expected = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        expected = expected @ V.repeat_interleave(2, 1).double()
        options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
        found, weights = causal(MODULE, Q, K, V, given, **options)
        assert weights is None
        torch.testing.assert_close(found, expected.transpose(1, 2).float())
    dropped = causal(MODULE, Q, K, V, None, dropout=0.5, softcap=softcap)[0]
    assert not torch.allclose(dropped, causal(MODULE, Q, K, V, None)[0], atol=0.1)


SINKS = normal(4, seed=4)
BIASES = (None, normal(1, 4, 1, 16, seed=3), normal(2, 4, 16, 16, seed=3))


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
@pytest.mark.parametrize("bias", BIASES, ids=["", "of-keys", "of-pairs"])
def test_biases_and_sinks(bias, sinks, softcap):
    """Outputs and gradients of both functions, against softmax written out."""
    leaves = [x for x in (Q, K, V, bias, sinks) if x is not None]
    for function, seen in (
        (causal, torch.ones(16, 16, dtype=torch.bool).tril() & near(16, 5)),
        (doubled, doubled_mask(8, window=5)),
    ):
        given = [x.clone().requires_grad_() for x in leaves]
        exact = [x.double().requires_grad_() for x in leaves]
        found, _ = called(function, given, bias, sinks, softcap)
        expected = written_out(exact, bias, sinks, softcap, seen)
        weight = normal(*found.shape, seed=9)
        for got, right in zip(
            [found, *torch.autograd.grad((found * weight).sum(), given)],
            [expected, *torch.autograd.grad((expected * weight).sum(), exact)],
            strict=True,
        ):
            torch.testing.assert_close(got, right.float(), rtol=1e-4, atol=1e-5)


def near(rows, window):
    row = torch.arange(rows)
    return row[:, None] - row < window


def parts(given, bias, sinks):
    q, k, v, *added = given
    return q, k, v, None if bias is None else added[0], None if sinks is None else added[-1]


def called(function, given, bias, sinks, softcap):
    q, k, v, bias, sinks = parts(given, bias, sinks)
    options = {"scaling": 0.3, "sliding_window": 5, "softcap": softcap}
    return function(MODULE, q, k, v, None, position_bias=bias, s_aux=sinks, **options)


def written_out(given, bias, sinks, softcap, seen):
    q, k, v, bias, sinks = parts(given, bias, sinks)
    scores = 0.3 * q @ k.repeat_interleave(2, 1).mT
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks[:, None, None].expand(2, 4, 16, 1)
        scores = torch.cat([scores, column], dim=-1)
    return (scores.softmax(-1)[..., :16] @ v.repeat_interleave(2, 1)).transpose(1, 2)


def test_bounded_scores_and_dropout_of_doubled_rows():
    expected = doubled(MODULE, Q, K, V, None, softcap=0.5, sliding_window=3)[0]
    found = doubled(MODULE, Q, K, V, None, softcap=0.5, sliding_window=3, dropout=1e-12)[0]
    torch.testing.assert_close(found, expected)
