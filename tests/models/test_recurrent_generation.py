import pytest
import torch
from hub_tools import library
from hypothesis import given, settings
from hypothesis import strategies as st

from dblocks import functional as F
from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import load_model, save_model
from dblocks.sampling import generate, sample_logits, stream
from dblocks.sampling.cache import Slots
from lm_tools import CLOSE, recurrent_of, tokens_of
from tools import DEVICE, normal, randomized, seeded

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


def model_of(plain, num_blocks=1, **options):
    lm = randomized(recurrent_of(**options))
    return lm if plain else DiffusionBlocks(lm, BlocksConfig(num_blocks))


def written(model, prompts=PROMPTS, seed=0, **options):
    options = {"max_new_tokens": 5, **options}
    return [t.tolist() for t in generate(model, prompts, generator=seeded(seed), **options)]


# Against the whole sequence


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    calls=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    block=st.integers(0, 1),
    conditioning=st.sampled_from(["dit", "official", "none"]),
)
def test_the_cache_equals_the_doubled_forward(lengths, calls, block, conditioning):
    """Every prefix, called any number of times; ragged; tokens that a block did not see wait."""
    model, new = model_of(False, 2, core=2, conditioning=conditioning), len(calls)
    lm, layers = model.parts(block)
    N, P = len(lengths), max(lengths)
    tokens = torch.randint(11, (N, P + new), generator=seeded()).to(DEVICE)
    z = normal(N, new, len(calls), 16, seed=1)
    cache = lm.new_cache(Slots(lengths, P + new, DEVICE), layers)
    for j, times in enumerate(calls):
        for i in range(times):
            sigma = torch.full((N,), 0.2 + 0.1 * i, device=DEVICE)
            level, noisy = model.config.schedule.level(sigma), z[:, j, i : i + 1]
            hidden = lm.run_cached(
                layers, level.c_in[:, None, None] * noisy, level,
                tokens[:, cache.committed : P + j], cache, lm.target.rows(),
            )  # fmt: skip
            got = lm.target.predict(lm.features(hidden), noisy, level)[:, 0]
            for n, length in enumerate(lengths):
                row = torch.cat([tokens[n, :length], tokens[n, P : P + j + 1]])[None]
                full = torch.zeros(1, row.shape[1], 16, device=DEVICE)
                full[:, -1] = noisy[n]
                expected = model.logits(full, sigma[:1], block=block, tokens=row)[0, -1]
                torch.testing.assert_close(got[n], expected, **CLOSE)


@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3), recurrences=st.integers(1, 4))
def test_the_cache_of_the_plain_model_equals_its_forward(lengths, recurrences):
    lm, P = model_of(True, core=2), max(lengths)
    N, noise = len(lengths), normal(len(lengths), P + 4, 16, seed=1)
    tokens = torch.randint(11, (N, P + 4), generator=seeded()).to(DEVICE)
    cache = lm.new_plain_cache(Slots(lengths, P + 4, DEVICE), recurrences)
    for j in range(4):
        got = lm.next_logits(
            tokens[:, cache.committed : P + j], cache, lm.target.fixed(),
            num_steps=recurrences, normals=noise,
        )  # fmt: skip
        for n, length in enumerate(lengths):
            row = torch.cat([tokens[n, :length], tokens[n, P : P + j]])[None]
            expected = lm(
                row, num_recurrences=recurrences, normals=noise[n : n + 1, : row.shape[1]]
            )
            torch.testing.assert_close(got[n], expected[0, -1], **CLOSE)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_generation_is_euler_from_noise(num_steps):
    """One token, from the same noise, by the sampler over the whole sequence."""
    model, prompt = model_of(False), [1, 2, 3]
    (token,) = written(model, [prompt], max_new_tokens=1, num_steps=num_steps, temperature=0.0)
    drawn = int(torch.randint(2**63 - 1, (), generator=seeded()))
    eps = F.noise_inject(torch.zeros(1, 16, device=DEVICE), torch.ones((), device=DEVICE), drawn).z
    z = torch.zeros(1, 4, 16, device=DEVICE)
    z[:, -1] = 80 * eps
    tokens = torch.tensor([[*prompt, 0]], device=DEVICE)
    logits = sample_logits(model, z, model.config.schedule.steps(num_steps), tokens=tokens)
    assert token == [int(logits[0, -1].argmax())]


# What runs


def rows_of(lm):
    """Rows that each call of each part's first attention sees; the hooks stay."""
    rows = {"prelude": [], "layers": [], "coda": []}
    for name, seen in rows.items():
        getattr(lm, name)[0].attention.qkv.register_forward_hook(
            lambda _, args, __, seen=seen: seen.append(args[0].shape[1])
        )
    return rows


def test_a_token_passes_the_prelude_once_and_is_committed_with_the_first_step():
    model = model_of(False)
    rows = rows_of(model.base_model)
    written(model, [[1, 2, 3]], max_new_tokens=3, num_steps=4)
    assert rows["prelude"] == [3, 1, 1]
    assert rows["layers"] == rows["coda"] == [4, 1, 1, 1] + 2 * [2, 1, 1, 1]


def test_the_plain_model_computes_each_row_once():
    lm = model_of(True)
    rows = rows_of(lm)
    written(lm, [[1, 2, 3]], max_new_tokens=3, num_steps=4)
    assert rows["prelude"] == rows["coda"] == [3, 1, 1]
    assert rows["layers"] == 4 * [3] + 8 * [1]


def test_by_default_the_plain_model_recurs_as_in_training():
    lm = model_of(True)
    assert written(lm) == written(lm, num_steps=lm.config.mean_recurrence)
    assert written(lm) != written(lm, num_steps=1)


# What is written


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 3},
        {"num_steps": 1},
        {"num_steps": 3, "temperature": 0.0},
        {"num_steps": 3, "stop_token": 3},
        {"sigmas": [80.0, 0.3, 0.1]},
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_the_same_with_and_without_cache_alone_and_in_a_batch(options, plain):
    if plain and "sigmas" in options:
        return
    model = model_of(plain)
    tokens = written(model, **options)
    assert tokens == written(model, **options)
    assert tokens == written(model, cache=False, **options)
    # Shorter, and beside other prompts; the place in the batch decides the noise.
    alone = written(model, PROMPTS[:1], **{"max_new_tokens": 3, **options})
    assert alone[0] == tokens[0][:3]


@pytest.mark.parametrize("shared", ["train", "private"])
def test_several_blocks_write_the_same_with_and_without_cache(shared):
    model = DiffusionBlocks(randomized(recurrent_of()), BlocksConfig(2, shared=shared))
    for copy in model.copies:
        randomized(copy)
    assert written(model, num_steps=4) == written(model, num_steps=4, cache=False)


@pytest.mark.parametrize("plain", [False, True])
def test_the_seed_decides(plain):
    model = model_of(plain)
    assert written(model, seed=0) != written(model, seed=1)
    same = written(model, [[1, 2]] * 4, num_steps=2)
    assert len({tuple(row) for row in same}) > 1


@pytest.mark.parametrize("plain", [False, True])
def test_bfloat16(plain):
    model = model_of(plain).bfloat16()
    assert [len(row) for row in written(model, num_steps=2)] == [5, 5, 5]


@pytest.mark.parametrize(
    ("plain", "num_blocks", "shared"),
    [(True, 1, "train"), (False, 1, "train"), (False, 1, "private"), (False, 2, "private")],
)
def test_checkpoints(tmp_path, plain, num_blocks, shared):
    library("safetensors")
    lm = recurrent_of(tied=False)
    model = lm if plain else DiffusionBlocks(lm, BlocksConfig(num_blocks, shared=shared))
    randomized(model)  # private copies of the shared parts too
    save_model(tmp_path, model)
    loaded = load_model(tmp_path).to(DEVICE)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    tokens, z = tokens_of(), normal(2, 8, 16)

    def logits(model, block):
        if plain:
            return model(tokens, num_recurrences=3, normals=z)
        return model.logits(z, 0.5, block=block, tokens=tokens)

    for block in range(num_blocks):
        assert torch.equal(logits(loaded, block), logits(model, block))
    for num_steps in (num_blocks, 3):
        assert written(loaded, num_steps=num_steps) == written(model, num_steps=num_steps)


# Errors


@pytest.mark.parametrize(
    ("plain", "options", "message"),
    [
        (True, {"sigmas": [80.0]}, "sigmas must be None for a plain RecurrentLM, .* got"),
        (True, {"num_steps": 0}, "number of recurrences must be a positive integer, got 0"),
        (False, {"num_steps": 0}, "number of steps must be a positive integer, got 0"),
        (False, {"max_new_tokens": 20}, "context of 24 tokens, got 5 and 20; shorten one"),
    ],
)
def test_arguments_are_checked(plain, options, message):
    options = {"max_new_tokens": 1, **options}
    with pytest.raises(ValueError, match=message):
        stream(model_of(plain), PROMPTS, **options)  # at the call, not at the first token
