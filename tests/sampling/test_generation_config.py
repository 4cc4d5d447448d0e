"""Options of text under the names of transformers' GenerationConfig."""

import warnings

import pytest
import torch
from hub_tools import library
from hypothesis import given, settings
from hypothesis import strategies as st

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.sampling import generate, stream
from dblocks.sampling.choice import Choice, Repeats
from dblocks.sampling.generation_config import IGNORED, KNOWN, NEUTRAL, Writing
from lm_tools import SINGLE, lm_of
from tools import DEVICE, normal, randomized, seeded

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


@pytest.fixture(scope="module")
def model():
    lm = randomized(lm_of(**SINGLE, context=24, tokens_per_sigma=1))
    return DiffusionBlocks(lm, BlocksConfig(3))


def written(model, config=None, **options):
    rows = generate(model, PROMPTS, generation_config=config, generator=seeded(), **options)
    return [row.tolist() for row in rows]


def writing_of(config, **given):
    return Writing.of(config, stop_token=None, cache=True, **given)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {"temperature": 0.0}),
        ({"do_sample": False, "top_k": 50, "temperature": 1.0}, {"temperature": 0.0}),
        ({"do_sample": True, "top_k": 0}, {}),
        ({"do_sample": True, "top_k": 3, "temperature": 0.5}, {"top_k": 3, "temperature": 0.5}),
        ({"do_sample": True, "top_p": 0.6, "top_k": 0}, {"top_p": 0.6}),
        ({"do_sample": True, "top_k": 0, "repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
        ({"do_sample": True, "top_k": 0, "eos_token_id": 3}, {"stop_token": 3}),
        ({"do_sample": True, "top_k": 0, "eos_token_id": [3, 5]}, {"stop_token": [3, 5]}),
        ({"do_sample": True, "top_k": 0, "use_cache": False}, {"cache": False}),
    ],
)
def test_names_of_transformers_mean_what_ours_mean(model, config, options):
    expected = written(model, max_new_tokens=9, **options)
    assert written(model, config, max_new_tokens=9) == expected
    assert written(model, {**config, "max_new_tokens": 9}) == expected
    # As long as the longest prompt allows.
    assert written(model, {**config, "max_length": 14}) == expected
    assert written(model, {**config, "max_length": 20, "max_new_tokens": 9}) == expected
    transformers = library("transformers")
    given = transformers.GenerationConfig(**config, max_new_tokens=9, bos_token_id=1)
    assert written(model, given) == expected


def test_defaults_are_those_of_transformers():
    assert writing_of({}).temperature == 0
    sampled = writing_of({"do_sample": True})
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (1.0, 50, None)
    assert writing_of(None) == Writing()
    defaults = library("transformers").GenerationConfig()
    assert writing_of(defaults, max_new_tokens=1).temperature == 0


def test_arguments_stand_above_the_config(model):
    config = {"do_sample": True, "top_k": 2, "max_new_tokens": 4, "eos_token_id": 3}
    writing = Writing.of(config, stop_token=5, cache=False, top_k=7, max_new_tokens=2)
    assert (writing.top_k, writing.max_new_tokens, writing.stop_tokens) == (7, 2, (5,))
    assert not writing.cache
    assert [len(row) for row in written(model, config, max_new_tokens=2, stop_token=0)]


def test_several_stop_tokens_and_padding(model):
    free = written(model, max_new_tokens=15)
    stops = [free[0][2], free[1][3]]
    ended = written(model, max_new_tokens=15, stop_token=stops)
    config = {"do_sample": True, "top_k": 0, "eos_token_id": stops, "pad_token_id": 10}
    assert written(model, config, max_new_tokens=15) == ended
    for pad in (None, 10):
        config["pad_token_id"] = pad
        steps = stream(model, PROMPTS, max_new_tokens=15, generator=seeded(),
                       generation_config=config)  # fmt: skip
        rows = torch.stack(list(steps), 1).tolist()
        for whole, end, row in zip(free, ended, rows, strict=True):
            first = next((i for i, t in enumerate(whole) if t in stops), len(whole) - 1)
            assert end == whole[: first + 1]
            after = row[first] if pad is None else pad
            assert row == end + [after] * (len(row) - len(end))


# Refused


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"num_beams": 4}, ValueError, r"must hold supported options only, got \{'num_beams"),
        ({"min_p": 0.1}, ValueError, r"got \{'min_p': 0.1\}; leave them out"),
        ({"stop_strings": ["x"]}, ValueError, r"got \{'stop_strings': \['x'\]\}"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences"),
        ({"tempperature": 0.1}, ValueError, r"known options only, got \['tempperature'\]"),
        ({"do_sample": 1}, TypeError, "do_sample must be a bool, got int"),
        ({"eos_token_id": "x"}, TypeError, "eos_token_id must be a token or a sequence of tokens"),
        ({"eos_token_id": [3, 99]}, ValueError, r"stop_token must be in 0\.\.10, got 99"),
        ({"pad_token_id": 99}, ValueError, r"pad_token_id must be None or in 0\.\.10, got 99"),
        ({"max_new_tokens": None, "max_length": 5}, ValueError, "exceed the length of"),
        ({"max_new_tokens": None}, ValueError, "max_new_tokens must be given"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a positive integer"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty must be positive and finite"),
        ({"do_sample": True, "temperature": -1.0}, ValueError, "temperature must be"),
        (["do_sample"], TypeError, "generation_config must be a GenerationConfig"),
    ],
)
def test_what_is_not_done_is_refused_by_name(model, config, error, message):
    if isinstance(config, dict):
        config = {"max_new_tokens": 2, **config}
    with pytest.raises(error, match=message):
        stream(model, PROMPTS, generation_config=config)


def test_what_sampling_would_need_is_told(model):
    with pytest.warns(
        UserWarning, match=r"do_sample .* and \{'temperature': 0.3\} have no"
    ) as told:
        generate(model, PROMPTS, generation_config={"temperature": 0.3}, max_new_tokens=1)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written(model, {"temperature": 1.0, "top_k": 50, "top_p": 1.0}, max_new_tokens=1)


def test_every_option_of_transformers_is_known():
    options = set(vars(library("transformers").GenerationConfig()))
    assert options <= set(NEUTRAL) | IGNORED | set(KNOWN)
    assert not set(NEUTRAL) & (IGNORED | set(KNOWN))


# The penalty


@settings(max_examples=20)
@given(
    penalty=st.floats(0.2, 5.0),
    texts=st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=6), min_size=1, max_size=3),
)
def test_the_penalty_is_that_of_transformers(penalty, texts):
    texts = [torch.tensor(text) for text in texts]
    logits, N = normal(len(texts), 11, seed=1), len(texts)
    repeats = Repeats(penalty, texts, 11, logits.device)
    new = torch.arange(N) % 11
    repeats.add(new)
    found = repeats.penalised(logits)
    kind = library("transformers").RepetitionPenaltyLogitsProcessor(penalty)
    for n, text in enumerate(texts):
        expected = kind(torch.cat([text, new[n : n + 1]])[None], logits[n : n + 1].clone())[0]
        torch.testing.assert_close(found[n], expected)


def test_only_the_tokens_of_a_text_have_the_penalty(model, monkeypatch):
    """Ragged prompts: nothing that stands between a short one and what follows it."""
    seen = []

    def token(self, logits, uniform):
        seen.append(logits)
        return logits.argmax(-1)

    monkeypatch.setattr(Choice, "token", token)
    found = written(model, max_new_tokens=3, repetition_penalty=1e6)
    for prompt, new in zip(PROMPTS, found, strict=True):
        assert len(set(new) | set(prompt)) == len(new) + len(prompt)
    assert seen[0].device.type == torch.device(DEVICE).type
    # Token 0 stands in the gaps.
    seen.clear()
    written(model, max_new_tokens=1)
    plain = seen[0]
    seen.clear()
    written(model, max_new_tokens=1, repetition_penalty=2.0)
    for n, prompt in enumerate(PROMPTS):
        changed = (seen[0][n] != plain[n]).nonzero()[:, 0].tolist()
        assert changed == sorted(prompt)
