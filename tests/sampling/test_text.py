import math

import pytest
import torch
from hub_tools import library
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel

from dblocks import functional as F
from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import load_model, save_model
from dblocks.models import CausalLM, CausalLMConfig, ViT, ViTConfig
from dblocks.sampling import generate, sample_logits, stream
from dblocks.sampling.cache import KVCache, Slots
from dblocks.sampling.choice import Choice
from lm_tools import PUBLISHED
from tools import DEVICE, Elsewhere, normal, randomized, seeded

SIZES = {"vocab_size": 11, "context": 24, "width": 16, "depth": 6, "heads": 4, "kv_heads": 2}
SIZES |= PUBLISHED
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


pytestmark = pytest.mark.usefixtures("one_thread")


def lm_of(**options):
    torch.manual_seed(0)
    return randomized(CausalLM(CausalLMConfig(**{**SIZES, **options})).to(DEVICE))


def blocks_of(num_blocks=3, shared="train", **options):
    return DiffusionBlocks(lm_of(**options), BlocksConfig(num_blocks, shared=shared))


def written(model, prompts=PROMPTS, seed=0, **options):
    options = {"max_new_tokens": 9, **options}
    return [t.tolist() for t in generate(model, prompts, generator=seeded(seed), **options)]


# Against the doubled forward


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    block=st.integers(0, 2),
    calls=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    conditioning=st.sampled_from(["dit", "official", "none"]),
)
def test_the_cache_equals_the_doubled_forward(lengths, block, calls, conditioning):
    """Every prefix, called any number of times; ragged; tokens that a block did not see wait."""
    model, new = blocks_of(conditioning=conditioning), len(calls)
    lm, layers = model.parts(block)
    N, P = len(lengths), max(lengths)
    tokens = torch.randint(11, (N, P + new), generator=seeded()).to(DEVICE)
    z = normal(N, new, len(calls), 16, seed=1)
    cache = KVCache(Slots(lengths, P + new, DEVICE), len(layers))
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


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    kv_heads=st.sampled_from([None, 1, 2]),
)
def test_the_cache_of_the_plain_model_equals_its_forward(lengths, kv_heads):
    lm, P = lm_of(kv_heads=kv_heads, depth=2), max(lengths)
    tokens = torch.randint(11, (len(lengths), P + 4), generator=seeded()).to(DEVICE)
    cache = KVCache(Slots(lengths, P + 4, DEVICE), 2)
    for j in range(4):
        got = lm.next_logits(tokens[:, cache.committed : P + j], cache, lm.target.fixed())
        for n, length in enumerate(lengths):
            row = torch.cat([tokens[n, :length], tokens[n, P : P + j]])[None]
            torch.testing.assert_close(got[n], lm(row)[0, -1], **CLOSE)


@pytest.mark.parametrize("shared", ["train", "private"])
@pytest.mark.parametrize("num_steps", [1, 3, 5])
def test_generation_is_euler_from_noise(num_steps, shared):
    """One token, from the same noise, by the sampler over the whole sequence."""
    model, prompt = blocks_of(shared=shared), [1, 2, 3]
    for copy in model.copies:
        randomized(copy)
    for seed in range(3):
        (token,) = written(
            model, [prompt], seed, max_new_tokens=1, num_steps=num_steps, temperature=0.0
        )
        drawn = int(torch.randint(2**63 - 1, (), generator=seeded(seed)))
        zeros, one = torch.zeros(1, 16, device=DEVICE), torch.ones((), device=DEVICE)
        eps = F.noise_inject(zeros, one, drawn).z
        z = torch.zeros(1, 4, 16, device=DEVICE)
        z[:, -1] = 80 * eps
        tokens = torch.tensor([[*prompt, 0]], device=DEVICE)
        if num_steps == 1:
            logits = model.logits(z, 80.0, block=0, tokens=tokens)
        else:
            logits = sample_logits(model, z, model.config.schedule.steps(num_steps), tokens=tokens)
        assert token == [int(logits[0, -1].argmax())]


def calls_of(model, **options):
    """(layer, rows) of every call of an MLP while two tokens are written."""
    calls = []
    hooks = [
        layer.mlp.register_forward_hook(
            lambda _, args, __, i=i: calls.append((i, args[0].shape[1]))
        )
        for i, layer in enumerate(model.base_model.layers)
    ]
    generate(model, [[1, 2, 3]], max_new_tokens=2, generator=seeded(), **options)
    for hook in hooks:
        hook.remove()
    return calls


def test_a_token_is_committed_with_the_first_call_of_each_block():
    calls = calls_of(blocks_of(), num_steps=5)
    # Levels 0 and 1 belong to block 0, level 2 to block 1, levels 3 and 4 to block 2. The first
    # layer of a block has clean rows in its MLP, the last one has noisy rows only.
    first = [(0, 3), (0, 1), (1, 1), (0, 1), (1, 1), (2, 3), (2, 1), (3, 1)]
    first += [(4, 3), (4, 1), (5, 1), (4, 1), (5, 1)]
    second = [(layer, min(rows, 1)) for layer, rows in first]
    assert calls == first + second


def test_without_a_cache_all_rows_are_computed_again():
    calls = calls_of(blocks_of(), num_steps=1, cache=False)
    assert calls == [(0, 3), (0, 1), (1, 1), (0, 4), (0, 1), (1, 1)]


# What is written


OPTIONS = (
    {},
    {"num_steps": 1},
    {"num_steps": 5},
    {"sigmas": [80.0, 0.3, 0.1]},
    {"temperature": 0.0},
    {"temperature": 0.5, "top_k": 4},
    {"top_p": 0.7},
    {"stop_token": 3},
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("plain", [False, True])
def test_the_same_with_and_without_cache_alone_and_in_a_batch(options, plain):
    if plain and {"num_steps", "sigmas"} & options.keys():
        return
    model = lm_of() if plain else blocks_of()
    tokens = written(model, **options)
    assert tokens == written(model, **options)
    assert tokens == written(model, cache=False, **options)
    # Shorter, and beside other prompts; the place in the batch decides the noise.
    alone = written(model, PROMPTS[:1], max_new_tokens=4, **options)
    assert alone[0] == tokens[0][:4]
    assert all(0 <= t < 11 for row in tokens for t in row)


def test_the_seed_decides():
    model = blocks_of()
    assert written(model, seed=0) != written(model, seed=1)
    same = written(model, [[1, 2]] * 4)
    assert len({tuple(row) for row in same}) > 1


@pytest.mark.parametrize("plain", [False, True])
def test_prompts_of_one_length_may_be_a_tensor(plain):
    model = lm_of() if plain else blocks_of()
    prompts = torch.tensor([[1, 2], [3, 4]])
    assert written(model, prompts) == written(model, [[1, 2], [3, 4]])
    assert written(model, list(prompts.to(DEVICE))) == written(model, prompts)


def test_a_stop_token_ends_a_row():
    model = blocks_of()
    free = written(model, max_new_tokens=15)
    stop = free[0][4]
    stopped = written(model, max_new_tokens=15, stop_token=stop)
    for row, end in zip(free, stopped, strict=True):
        assert end == (row[: row.index(stop) + 1] if stop in row else row)
    # The iterator ends with the last row that stops, and rows that stopped repeat the token.
    steps = torch.stack(
        list(stream(model, PROMPTS[:1] * 2, max_new_tokens=15, generator=seeded(), stop_token=stop))
    )
    ended = (steps == stop).cumsum(0) > 0
    assert torch.equal(steps == stop, ended)
    assert len(steps) == 15 or ended[-1].all()
    assert not ended[:-1].all(1).any()


def test_streaming_yields_each_step():
    model = blocks_of()
    steps = stream(model, PROMPTS, max_new_tokens=9, generator=seeded())
    tokens = [next(steps) for _ in range(9)]
    assert all(t.shape == (3,) and t.dtype == torch.int64 for t in tokens)
    assert torch.stack(tokens, dim=1).tolist() == written(model)
    assert next(steps, None) is None
    assert torch.is_grad_enabled()


def test_the_context_may_be_filled():
    model = blocks_of()
    assert [len(row) for row in written(model, max_new_tokens=19)] == [19, 19, 19]


@pytest.mark.parametrize("wrap", [AveragedModel, lambda m: torch.compile(m, backend="eager")])
def test_generate_looks_through_wrappers(wrap):
    model = blocks_of()
    assert written(wrap(model)) == written(model)


@pytest.mark.parametrize("plain", [False, True])
def test_bfloat16(plain):
    model = (lm_of() if plain else blocks_of()).bfloat16()
    assert [len(row) for row in written(model)] == [9, 9, 9]


@pytest.mark.parametrize("plain", [False, True])
def test_checkpoints(tmp_path, plain):
    library("safetensors")
    model = lm_of(tied=False) if plain else blocks_of(shared="private")
    save_model(tmp_path, model)
    loaded = load_model(tmp_path).to(DEVICE)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert written(loaded) == written(model)


def test_a_grid_that_skips_a_block_warns():
    with pytest.warns(UserWarning, match="2 sampling steps have no level of blocks"):
        written(blocks_of(), num_steps=2)


# Choosing a token


def test_draws_follow_the_probabilities():
    logits = torch.tensor([2.0, 0.0, -math.inf, 1.0]).expand(20_000, 4)
    uniform = (torch.arange(20_000).double() + 0.5) / 20_000
    for choice, kept in (
        (Choice(), [0, 1, 3]),
        (Choice(0.5), [0, 1, 3]),
        (Choice(1.0, top_k=2), [0, 3]),
        (Choice(1.0, top_p=0.6), [0]),
        (Choice(1.0, top_p=0.7), [0, 3]),
        (Choice(2.0, top_k=2, top_p=0.6), [0]),
        (Choice(2.0, top_p=0.6), [0, 3]),
        (Choice(1.0, top_k=9, top_p=1.0), [0, 1, 3]),
    ):
        expected = torch.zeros(4, dtype=torch.float64)
        expected[kept] = (logits[0, kept].double() / choice.temperature).softmax(0)
        share = choice.token(logits, uniform).bincount(minlength=4) / 20_000
        torch.testing.assert_close(share.double(), expected, rtol=0, atol=1e-4)


def test_the_ends_of_the_uniform_numbers():
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    for u, token in ((1e-12, 1), (1 - 1e-12, 2)):
        assert Choice().token(logits, torch.tensor([u], dtype=torch.float64)).item() == token
    assert Choice(0.0).token(logits, torch.tensor([0.5]).double()).item() == 2


@settings(max_examples=25)
@given(
    scores=st.lists(st.integers(-5, 5), min_size=1, max_size=8),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.none() | st.floats(0.01, 1.0),
)
def test_filters_keep_the_most_likely(scores, top_k, top_p):
    logits = torch.tensor([scores]).double()
    p = Choice(1.0, top_k, top_p).probabilities(logits)[0]
    kept = p > 0
    assert kept.any()
    assert kept.all() or logits[0][kept].min() >= logits[0][~kept].max()
    if top_k is not None:
        kth = sorted(scores, reverse=True)[:top_k][-1]
        assert not kept[logits[0] < kth].any()
        assert top_p is not None or kept[logits[0] >= kth].all()
    if top_p is not None:
        allowed = logits if top_k is None else logits.masked_fill(logits < kth, -math.inf)
        total = allowed.softmax(-1)[0]
        assert total[kept].sum() >= top_p - 1e-12
        assert total[kept].sum() - total[kept].min() < top_p


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a positive integer, got 0"),
        ({"max_new_tokens": 20}, ValueError, "context of 24 tokens, got 5 and 20; shorten one"),
        ({"prompts": [[1] * 25]}, ValueError, "context of 24 tokens, got 25 and 1"),
        ({"prompts": []}, ValueError, "prompts must hold at least one prompt, got none"),
        ({"prompts": [[1], []]}, ValueError, r"at least one token, got shape \[0\] for prompt 1"),
        ({"prompts": [[[1]]]}, ValueError, r"got shape \[1, 1\] for prompt 0"),
        ({"prompts": [[11]]}, ValueError, r"tokens must be in 0\.\.10, got 11\.\.11"),
        ({"prompts": [[0.5]]}, TypeError, "tokens must be int64, got torch.float32"),
        ({"temperature": -1.0}, ValueError, "temperature must be a finite number >= 0, got -1.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be a finite number >= 0"),
        ({"top_k": 0}, ValueError, "top_k must be a positive integer, got 0"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
        ({"stop_token": 11}, ValueError, r"stop_token must be in 0\.\.10, got 11"),
        ({"num_steps": 0}, ValueError, "number of steps must be a positive integer, got 0"),
        ({"num_steps": 2, "sigmas": [80.0]}, ValueError, "one of num_steps and sigmas must be"),
        ({"sigmas": [1.0, 2.0]}, ValueError, "sigmas must be positive and descending"),
    ],
)
def test_arguments_are_checked(options, error, message):
    options = {"prompts": PROMPTS, "max_new_tokens": 1, **options}
    with pytest.raises(error, match=message):
        stream(blocks_of(), **options)  # at the call, not at the first token


def test_models_are_checked():
    with pytest.raises(ValueError, match=r"must be 1 or None for a plain CausalLM, .* got 3"):
        written(lm_of(), num_steps=3)
    with pytest.raises(ValueError, match=r"sigmas must be None for a plain CausalLM, .* got \[80"):
        written(lm_of(), sigmas=[80.0])
    vit = ViT(ViTConfig(image_size=8, width=12, heads=2, depth=3))
    for other in (vit, DiffusionBlocks(vit, BlocksConfig(3))):
        with pytest.raises(TypeError, match=r"must be a CausalLM, a Rec.* one, got ViT; see"):
            written(other)
    with pytest.raises(ValueError, match="generator must be on the CPU, got one on meta"):
        stream(lm_of(), PROMPTS, max_new_tokens=1, generator=Elsewhere())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("plain", [False, True])
def test_generation_does_not_synchronise(plain):
    model = lm_of() if plain else blocks_of()
    written(model)  # compiles the kernels
    steps = stream(model, PROMPTS, max_new_tokens=9, generator=seeded(), top_k=3, top_p=0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = list(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(tokens) == 9


@pytest.mark.parametrize("prompts", ["text", ["text"]])
def test_text_is_no_prompt(prompts):
    with pytest.raises(TypeError, match="encode it with a tokenizer"):
        generate(blocks_of(), prompts, max_new_tokens=1)
