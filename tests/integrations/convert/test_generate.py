"""Text of converted models with a cache of keys and values, against all rows at every call."""

import pytest
import torch
from convert_tools import FORMS, model_of
from convert_tools import blocks_of as any_blocks_of
from convert_tools import shaken as all_shaken
from family_models import CAUSAL, V, causal_model

from dblocks import BlocksConfig, NoiseSchedule
from dblocks.integrations.convert import convert
from dblocks.sampling import generate
from dblocks.sampling.cache import Slots
from dblocks.sampling.rows import CachedRows, WholeRows
from dblocks.sampling.writers import ProductWriter, StepWriter
from tools import normal, seeded

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:not fused"),  # norms of a class of their own
]
# Rotary and learned positions, windows, softcap, shared keys, another value width, ALiBi, sinks.
QUICK = ("gpt2", "opt", "llama", "phi3", "gemma2", "gemma3_text", "gptj", "deepseek_v3", "bloom")
QUICK += ("gpt_oss", "falcon")
# At the usual sigma_min logits are as large as 250,000, so that rounding shows.
SCHEDULE = NoiseSchedule(sigma_min=0.1)
LENGTHS, NEW = (7, 2, 1), 4  # longer than windows, and so short that a row sees nothing but itself


def shaken(blocks):
    """With noise that matters, whose factor starts at 0."""
    all_shaken(blocks)
    with torch.no_grad():
        blocks.base_model.noise_scale.fill_(0.5)
    return blocks


def family_blocks(kind, rows, **options):
    config = BlocksConfig(2, schedule=SCHEDULE)
    return shaken(convert(causal_model(kind, **options), config, task="tokens", rows=rows))


def log_probabilities(blocks, rows_class, product=False, lengths=LENGTHS, new=NEW):
    """Of each next token of the same texts, [new, N, V]; `rows_class` says how rows run."""
    slots = Slots(list(lengths), max(lengths) + new, torch.device("cpu"))
    rows = rows_class(blocks, slots)
    sigmas = blocks.config.schedule.steps(4)
    owners = blocks.config.schedule.block_of(sigmas, 2).tolist()
    writer = ProductWriter(blocks, rows) if product else StepWriter(blocks, rows, sigmas, owners)
    noise = normal(len(lengths), *writer.noise_shape)
    tokens = torch.randint(3, V, (len(lengths), slots.capacity), generator=seeded(2))
    with torch.no_grad():
        found = [writer.next_logits(tokens[:, : slots.prompt + j], noise, j) for j in range(new)]
    return torch.cat(found, dim=1).log_softmax(-1)


def cached(blocks, slots):
    return CachedRows(blocks, [0, 1], slots, cache=True)


def check_the_same(blocks, **options):
    expected = log_probabilities(blocks, WholeRows, **options)
    assert expected.std() > 0.1
    found = log_probabilities(blocks, cached, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", ["single", "doubled"])
@pytest.mark.parametrize("kind", QUICK)
def test_a_cache_changes_nothing(kind, rows):
    check_the_same(family_blocks(kind, rows))


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(CAUSAL) - set(QUICK)))
def test_a_cache_changes_nothing_in_any_family(kind):
    for rows in ("single", "doubled"):
        check_the_same(family_blocks(kind, rows))


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=["published", "single"])
@pytest.mark.parametrize("lengths", [(3, 3), (1,), (2, 5)])
def test_heads_blocks_and_prompts(form, product, lengths):
    """With parameters of each block, and levels of known rows that differ from block to block."""
    config = {"shared": "private", "top_share": 0.6 if product else 0.0}
    blocks = shaken(any_blocks_of("llama", config=config, **form))
    check_the_same(blocks, product=product, lengths=lengths)


@pytest.mark.parametrize("form", FORMS, ids=["published", "single"])
def test_text_is_the_same(form):
    blocks = shaken(any_blocks_of("mistral", model=model_of("mistral", sliding_window=3), **form))
    for how in ({"num_steps": 1}, {"num_steps": 4, "temperature": 0.7}, {"product": True}):
        texts = [
            generate(
                blocks, [[5, 6, 7, 8], [9]], max_new_tokens=5, generator=seeded(), cache=c, **how
            )
            for c in (True, False)
        ]
        assert all(one.equal(other) for one, other in zip(*texts, strict=True))


def test_text_of_a_model_without_a_longest_one():
    blocks = family_blocks("bloom", "single")
    texts = [
        generate(blocks, [[5, 6, 7, 8], [9]], max_new_tokens=4, generator=seeded(), cache=c)
        for c in (True, False)
    ]
    assert all(one.equal(other) for one, other in zip(*texts, strict=True))


def test_without_a_cache_all_rows_run(monkeypatch):
    blocks = any_blocks_of("llama")
    network = type(blocks.base_model)
    monkeypatch.setattr(network, "run_cached", None)
    generate(blocks, [[5]], max_new_tokens=2, cache=False)
    monkeypatch.undo()
    monkeypatch.setattr(network, "run_layers", None)
    generate(blocks, [[5]], max_new_tokens=2)


def test_a_network_that_keeps_nothing_is_refused(monkeypatch):
    blocks = any_blocks_of("llama")
    monkeypatch.delattr(type(blocks.base_model), "run_cached")
    with pytest.raises(ValueError, match="cache must be False for the blocks of a ConvertedCausal"):
        generate(blocks, [[5]], max_new_tokens=2)
    generate(blocks, [[5]], max_new_tokens=2, cache=False)


def test_half_precision():
    for form in FORMS:
        blocks = shaken(any_blocks_of("llama", model=model_of("llama").bfloat16(), **form))
        (new,) = generate(blocks, [[5, 6]], max_new_tokens=3, generator=seeded())
        assert new.shape == (3,)


# What cannot be kept


LONG = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [4.0], "rope_theta": 1e4}


def long_blocks(rows):
    rope = LONG | {
        "original_max_position_embeddings": 8,
        "factor": 4.0,
        "partial_rotary_factor": 0.5,
    }
    options = {"rope_parameters": rope, "original_max_position_embeddings": 8}
    blocks = family_blocks("phi3", rows, **options)
    assert blocks.base_model.model.model.rotary_emb.rope_type == "longrope"
    return blocks


@pytest.mark.parametrize("lengths", [(3,), (8,), (9,), (7, 2, 1), (5, 8)])
def test_rotations_that_change_while_text_is_written(lengths):
    """Beyond 8 tokens all rotations are others, so that all rows run again."""
    for product in (False, True):
        check_the_same(long_blocks("single"), lengths=lengths, new=7, product=product)


@pytest.mark.parametrize("rows", ["single", "doubled"])
@pytest.mark.parametrize("lengths", [(5,), (7, 2)])
def test_rows_run_again_once(rows, lengths, monkeypatch):
    blocks = long_blocks(rows)
    found = log_probabilities(blocks, cached, lengths=lengths, new=6)
    # A cache for each call is a row for each token.
    expected = log_probabilities(
        blocks, lambda blocks, slots: CachedRows(blocks, [0, 1], slots, cache=False),
        lengths=lengths, new=6,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # As many rows as tokens, but for those of the one call in which the limit is crossed.
    sizes, run = [], blocks.base_model.run_cached

    def counted(layers, z_in, level, tokens, cache, table):
        sizes.append(tokens.shape[1])
        return run(layers, z_in, level, tokens, cache, table)

    monkeypatch.setattr(blocks.base_model, "run_cached", counted)
    generate(blocks, [[5] * n for n in lengths], max_new_tokens=6, generator=seeded())
    P = max(lengths)
    assert sorted(size for size in sizes if size > 1) == [P, P, 9, 9]
    # What changes is seen: rotations of the short kind alone give other logits.
    for layer in (blocks.base_model.model.model.rotary_emb,):
        layer.config.rope_parameters["original_max_position_embeddings"] = 32
    others = log_probabilities(blocks, cached, lengths=lengths, new=6)
    assert torch.equal(others[:, : 9 - P], found[:, : 9 - P])
    assert not torch.allclose(others[:, 9 - P :], found[:, 9 - P :], atol=1e-3)
