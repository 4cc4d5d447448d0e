"""In training, converted models draw the dropouts of the model itself."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as nnf
from family_models import CAUSAL, TEXT, VISION, T, V, causal_model, encoder_model

from dblocks import BlocksConfig, MaskSchedule
from dblocks.integrations.convert import convert
from tools import seeded

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:not fused"),  # norms of a class of their own
]
TOKENS = torch.randint(5, V, (2, T), generator=seeded(2))
IMAGES = torch.randn(2, 1, 8, 8, generator=seeded(3))
OWN_NAMES = {"tokens": "input_ids", "images": "pixel_values"}
OTHER = ("layerdrop", "drop_path_rate")  # of whole layers


@pytest.fixture
def drawn(monkeypatch):
    """Counts the dropouts that are drawn, by their rate; nothing is dropped."""
    counts, attention = Counter(), nnf.scaled_dot_product_attention

    def dropout(x, p=0.5, training=True, inplace=False):
        counts.update([round(p, 6)] if training and p else [])
        return x

    def attended(*args, dropout_p=0.0, **options):
        counts.update([round(dropout_p, 6)] if dropout_p else [])
        return attention(*args, **options)

    monkeypatch.setattr(nnf, "dropout", dropout)
    monkeypatch.setattr(nnf, "scaled_dot_product_attention", attended)
    return counts


def rates(model):
    """A rate of its own for every dropout of the model's config."""
    given = model.config.to_dict()
    names = [
        name
        for name, value in given.items()
        if ("drop" in name or name.endswith("pdrop"))
        and name not in OTHER
        and (value is None or (isinstance(value, float | int) and value is not True))
    ]
    return {name: (i + 1) / 32 for i, name in enumerate(sorted(names))}


def drawn_by(counts, call):
    counts.clear()
    call()
    return Counter(counts)


def check(counts, model, batch, config, same=Counter, **options):
    own = {name: batch[key] for key, name in OWN_NAMES.items() if key in batch}
    plain = drawn_by(counts, lambda: model(**own))
    dm = convert(model, config, **options)
    assert model.training
    assert same(drawn_by(counts, lambda: dm.loss(batch, 0))) == same(plain)
    return plain


@pytest.mark.parametrize("rows", ["single", "doubled"])
@pytest.mark.parametrize("kind", [kind for kind in CAUSAL if kind != "falcon"])  # refused
def test_models_of_the_next_token(kind, rows, drawn):
    plain = causal_model(kind)
    model = causal_model(kind, **rates(plain)).train()
    # Clean and noisy rows of a doubled sequence are dropped one after the other.
    same = Counter if rows == "single" else set
    check(drawn, model, {"tokens": TOKENS}, BlocksConfig(1), same, task="tokens", rows=rows)


@pytest.mark.parametrize("kind", TEXT)
def test_models_of_masked_tokens(kind, drawn):
    model = encoder_model(kind, "masks")
    model = encoder_model(kind, "masks", **rates(model)).train()
    config, options = BlocksConfig(1, schedule=MaskSchedule()), {"mask_token_id": 4}
    assert check(drawn, model, {"tokens": TOKENS}, config, task="tokens", **options)


@pytest.mark.parametrize("kind", [*TEXT, *VISION])
def test_models_of_classes(kind, drawn):
    model = encoder_model(kind, "classes")
    model = encoder_model(kind, "classes", **rates(model)).train()
    inputs = {"images": IMAGES} if kind in VISION else {"tokens": TOKENS}
    check(drawn, model, {**inputs, "labels": torch.tensor([0, 1])}, BlocksConfig(1), task="classes")


def test_a_rate_in_place_of_a_module_is_one_of_the_models():
    """Starcoder2 drops rows of its embedding without a module."""
    model = causal_model("starcoder2", embedding_dropout=0.5).train()
    blocks = convert(model, BlocksConfig(1), task="tokens")
    network = blocks.base_model
    rows = torch.ones(1, T, 16)
    positions = torch.arange(T)
    dropped = network.family.enter(model, rows, positions)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    model.eval()
    assert torch.equal(network.family.enter(model, rows, positions), rows)
