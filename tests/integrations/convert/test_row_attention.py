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
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"sinks": torch.zeros(4)}, "sinks"),
        ({"head_mask": torch.ones(4)}, "head_mask"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
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
    with pytest.raises(ValueError, match="takes softcap or dropout, got softcap=2"):
        doubled(MODULE, Q, K, V, None, softcap=2.0, dropout=0.1)
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
