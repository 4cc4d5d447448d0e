"""The attention that transformers' layers call: what it is handed is read or refused by name."""

import pytest
import torch
from convert_tools import CAUSAL, batch_of, blocks_of, model_of, plain_logits, shaken
from torch import nn

from dblocks.adapters.transformers import DOUBLED, doubled
from dblocks.functional import doubled_attention
from tools import normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = {
    "mistral": {"sliding_window": 3},
    "qwen2": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 2},
}
MODULE = nn.Identity()


def rows(heads=2, T=8, seed=0):
    return normal(2, heads, 2 * T, 16, seed=seed)


Q, K, V = rows(4), rows(seed=1), rows(seed=2)


def clean_logits(kind, model):
    """The model's own head over the clean rows."""
    blocks, tokens = blocks_of(kind, model=model), batch_of(kind)["tokens"]
    network = blocks.base_model
    condition = network.embed_condition({"tokens": tokens})
    level = blocks.config.schedule.level(torch.ones(3, 8))
    x = torch.cat([condition.clean, condition.noisy], dim=1)
    for layer in network.layers:
        x = layer(x, network.noise_embedding(level.c_noise), condition.attention, clean=True)
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
    none, tiny = (shaken(blocks_of(kind, model=model_of(kind, **o)).train()) for o in options)
    expected = none.loss(batch, 1, generator=seeded()).loss
    monkeypatch.setattr("dblocks.functional.doubled_attention", None)
    torch.testing.assert_close(tiny.loss(batch, 1, generator=seeded()).loss, expected)


@pytest.mark.parametrize("kind", CAUSAL)
def test_what_the_layers_hand_over_is_read(kind, monkeypatch):
    """A model's own layers call it with nothing that it refuses, and with no mask."""
    calls = []

    def recorded(module, *arguments, **options):
        calls.append(options)
        return doubled(module, *arguments, **options)

    from transformers import AttentionInterface

    interface = AttentionInterface()
    monkeypatch.setitem(interface._global_mapping, DOUBLED, recorded)
    blocks_of(kind).loss(batch_of(kind), 0)
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
    with pytest.raises(ValueError, match=f"does not do what Identity asks for with {named}"):
        doubled(MODULE, Q, K, V, None, **options)


def test_other_refusals():
    with pytest.raises(ValueError, match="asks for with attention_mask; a model that needs it"):
        doubled(MODULE, Q, K, V, torch.ones(2, 1, 16, 16))
    with pytest.raises(ValueError, match="takes softcap or dropout, got softcap=2"):
        doubled(MODULE, Q, K, V, None, softcap=2.0, dropout=0.1)
    module = nn.Identity()
    module.is_causal = False
    with pytest.raises(ValueError, match="is_causal=False"):
        doubled(module, Q, K, V, None)
