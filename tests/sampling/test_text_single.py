"""Writing text in a single stream, in blocks of tokens, and from the product of blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dblocks import functional as F
from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.models.causal_lm import Context
from dblocks.nn import rotary_of
from dblocks.sampling import generate, likelihood, next_token_nll, product_nll, stream
from dblocks.sampling import text as writing
from dblocks.sampling.choice import Choice
from dblocks.schedules import NoiseSchedule
from lm_tools import CLOSE, SINGLE, lm_of, recurrent_of
from tools import DEVICE, randomized, seeded

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 24
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
# At the usual sigma_min logits are as large as 250,000, so that rounding shows.
SCHEDULE = NoiseSchedule(sigma_min=0.1)


def model_of(kind="causal", k=1, num_blocks=3, top_share=0.6, shared="train", **options):
    options = {**SINGLE, "context": CONTEXT, "tokens_per_sigma": k, **options}
    lm = recurrent_of(**options) if kind == "recurrent" else lm_of(tokens_per_block=k, **options)
    config = BlocksConfig(num_blocks, shared=shared, top_share=top_share, schedule=SCHEDULE)
    model = DiffusionBlocks(randomized(lm), config)
    for copy in model.copies:
        randomized(copy)
    return model


def written(model, prompts=PROMPTS, seed=0, **options):
    """New tokens of each prompt, and the logits that they were drawn from, [N, new, V]."""
    logits = []

    class Recording(Choice):
        def token(self, given, uniform):
            logits.append(given.float())
            return super().token(given, uniform)

    options = {"max_new_tokens": 7, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "Choice", Recording)
        tokens = generate(model, prompts, generator=seeded(seed), **options)
    return [t.tolist() for t in tokens], torch.stack(logits, 1)


def noise_of(n, rows, k=1, seed=0):
    """The normals [1, rows, 16] of the positions of sample n."""
    drawn = int(torch.randint(2**63 - 1, (), generator=seeded(seed)))
    zeros, offset = torch.zeros(1, rows * 16, device=DEVICE), n * (CONTEXT + k - 1) * 16
    one = torch.ones((), device=DEVICE)
    return F.noise_inject(zeros, one, drawn, offset=offset).z.view(1, rows, 16)


CASES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["causal", "causal", "recurrent"]),
        "k": st.sampled_from([1, 2, 4]),
        "top_share": st.sampled_from([0.0, 0.6]),
        "shared": st.sampled_from(["train", "private"]),
        "conditioning": st.sampled_from(["dit", "none"]),
        "head": st.sampled_from(["posterior", "learned"]),
        "tied": st.booleans(),
    }
)
LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=3)
STEPS = st.sampled_from([1, 3, 4, 5, 6, "product"])


def made(case, **more):
    case = {**case, **more}
    return model_of(**{**case, "k": 1 if case["kind"] == "recurrent" else case["k"]})


def asked(steps):
    return {"product": True} if steps == "product" else {"num_steps": steps}


def prompts_of(lengths):
    return [[(3 * n + i) % 11 for i in range(length)] for n, length in enumerate(lengths)]


@settings(max_examples=20)
@given(case=CASES, rows=st.sampled_from(["single", "doubled"]), lengths=LENGTHS, steps=STEPS)
def test_the_same_with_and_without_a_cache(case, rows, lengths, steps):
    """Ragged, not multiples of a block of tokens, also shorter than one."""
    if steps == "product":
        case = {**case, "top_share": 0.6}
    model, prompts, options = made(case, rows=rows), prompts_of(lengths), asked(steps)
    tokens, logits = written(model, prompts, **options)
    again, uncached = written(model, prompts, cache=False, **options)
    assert tokens == again
    torch.testing.assert_close(logits.log_softmax(-1), uncached.log_softmax(-1), **CLOSE)


def block_logits(model, block, tokens, z, sigma, length):
    """A block's logits of rows [1, L, D], where a prompt of `length` tokens ends a block of them.

    For multiples of k it is `model.logits`; a mask says what others mean.
    """
    lm, layers = model.parts(block)
    k = lm.block_size
    if length % k == 0:
        return model.logits(z, sigma, block=block, tokens=tokens)
    level, position = model.config.noise_schedule.level(sigma), torch.arange(tokens.shape[1])
    of = (position + -length % k) // k
    mask = (of[:, None] >= of).to(DEVICE)

    def attend(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True
        )

    e = lm.target_embedding.rows()[tokens].roll(k, 1)
    before = torch.where(position[:, None].to(DEVICE) >= k, e, lm.noisy_row)
    rotary = rotary_of(position.to(DEVICE), 4, 10_000.0)
    context = Context(before, rotary, attend)
    z_in = model.config.schedule.scale_in(z, level)
    features = lm.features(lm.run_layers(layers, z_in, level, context))
    return lm.target.predict(features, z, level)


def expected_logits(model, n, prompt, tokens, steps):
    """By hand, without a cache: the logits of the `tokens` after a prompt, each given those before.

    Rows of known tokens hold noise at the top level of their block, each position its own.
    """
    k, blocks = model.base_model.block_size, model.config.num_blocks
    length, schedule = len(prompt), model.config.noise_schedule
    new = -(-len(tokens) // k) * k
    row = torch.tensor([prompt + tokens + [0] * (new - len(tokens))], device=DEVICE)
    noise, result = noise_of(n, length + new, k), []
    ends = schedule.boundaries(blocks)
    grid = [80.0] * blocks if steps == "product" else schedule.steps(steps).tolist()
    owners = range(blocks) if steps == "product" else schedule.block_of(
        torch.tensor(grid, dtype=torch.float64), blocks
    ).tolist()  # fmt: skip
    for end in range(length, length + new, k):
        z, logits = 80.0 * noise[:, end : end + k], 0.0
        for i, (sigma, block) in enumerate(zip(grid, owners, strict=True)):
            top = 80.0 if model.config.top_share > 0 else ends[block].item()
            known = top * noise[:, :end]
            if top < 80:
                known = known + model.base_model.target_embedding.rows()[row[:, :end]]
            levels = torch.full((1, end + k), top, device=DEVICE)
            levels[:, end:] = sigma
            # What is written next is not known yet, whatever stands there.
            seen = torch.cat([row[:, :end], torch.full_like(row[:, :k], 10)], 1)
            state = torch.cat([known, z], 1)
            one = block_logits(model, block, seen, state, levels, length)[:, end:]
            if steps == "product":
                logits = logits + one.log_softmax(-1) / blocks
            else:
                logits = one
                if i + 1 < len(grid):
                    denoised = one.softmax(-1) @ model.base_model.target_embedding.rows()
                    z = F.euler_step(z, denoised, sigma, grid[i + 1])
        result.append(logits)
    return torch.cat(result, 1)[:, : len(tokens)]


@settings(max_examples=15)
@given(case=CASES, lengths=LENGTHS, steps=STEPS)
def test_cached_generation_is_what_whole_sequences_give(case, lengths, steps):
    if steps == "product":
        case = {**case, "top_share": 0.6}
    model, prompts = made(case, shared="train"), prompts_of(lengths)
    tokens, logits = written(model, prompts, **asked(steps))
    for n, prompt in enumerate(prompts):
        expected = expected_logits(model, n, prompt, tokens[n], steps)[0]
        got = logits[n, : len(tokens[n])]
        torch.testing.assert_close(got.log_softmax(-1), expected.log_softmax(-1), **CLOSE)


@pytest.mark.parametrize(("kind", "k"), [("causal", 1), ("causal", 2), ("recurrent", 1)])
@pytest.mark.parametrize("product", [False, True])
def test_prices_are_those_of_what_is_written(kind, k, product, monkeypatch):
    """Teacher-forced log-probabilities with generation's noise, and those it drew from."""
    model, prompts = model_of(kind, k), prompts_of([4, 2, 6] if k == 2 else [3, 1, 5])
    options = {"product": True} if product else {"num_steps": 1}
    tokens, logits = written(model, prompts, **options, max_new_tokens=6)
    for n, prompt in enumerate(prompts):
        row = torch.tensor([prompt + tokens[n]], device=DEVICE)
        state = 80.0 * noise_of(n, row.shape[1], k)
        monkeypatch.setattr(likelihood, "_noise_at_top", lambda *_, state=state: state)
        nll = (product_nll if product else next_token_nll)(model, row)[:, len(prompt) - 1 :]
        log_p = logits[n].log_softmax(-1).gather(-1, torch.tensor(tokens[n])[:, None].to(DEVICE))
        torch.testing.assert_close(-nll[0], log_p[:, 0], **CLOSE)


@settings(max_examples=6)
@given(case=CASES, lengths=st.lists(st.integers(1, 6), min_size=2, max_size=3), steps=STEPS)
def test_a_prompt_depends_neither_on_the_others_nor_on_how_much_is_written(case, lengths, steps):
    if steps == "product":
        case = {**case, "top_share": 0.6}
    model, options = made(case), asked(steps)
    prompts = prompts_of(lengths)
    tokens, _ = written(model, prompts, **options)
    for new in (1, 6):
        fewer, _ = written(model, prompts, max_new_tokens=new, **options)
        assert fewer == [row[:new] for row in tokens]
    # The same place in the batch, beside a longer and a shorter prompt.
    for other in ([3] * 8, [7]):
        beside, _ = written(model, [other, *prompts[1:]], **options)
        assert beside[1:] == tokens[1:]


@pytest.mark.parametrize("rows", ["single", "doubled"])
@pytest.mark.parametrize("k", [1, 4])
def test_a_stop_token_inside_a_block_of_tokens(rows, k):
    model = model_of(k=k, rows=rows)
    free, _ = written(model, max_new_tokens=14)
    stop = free[0][1]
    stopped, _ = written(model, max_new_tokens=14, stop_token=stop)
    for row, end in zip(free, stopped, strict=True):
        assert end == (row[: row.index(stop) + 1] if stop in row else row)
    alone = list(stream(model, PROMPTS[:1], max_new_tokens=14, generator=seeded(), stop_token=stop))
    assert [int(t) for t in alone] == free[0][: free[0].index(stop) + 1]


@pytest.mark.parametrize("rows", ["single", "doubled"])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[6], [5, 2], [23, 1]])
def test_the_context_may_be_filled(rows, k, lengths):
    """The last block of tokens may reach beyond it."""
    model, prompts = model_of(k=k, rows=rows), prompts_of(lengths)
    new = CONTEXT - max(lengths)
    tokens, logits = written(model, prompts, num_steps=3, max_new_tokens=new)
    assert [len(row) for row in tokens] == [new] * len(prompts)
    assert logits.isfinite().all()
    with pytest.raises(ValueError, match=r"context of 24 tokens, got .*; shorten one"):
        written(model, prompts, max_new_tokens=new + 1)


def test_the_plain_model_of_blocks_of_tokens_writes_token_by_token():
    lm = model_of(k=4).base_model
    tokens, logits = written(lm)
    assert tokens == written(lm, cache=False)[0]
    row = torch.tensor([PROMPTS[2] + tokens[2]], device=DEVICE)
    torch.testing.assert_close(logits[2], lm(row)[0, 4:-1], **CLOSE)


@pytest.mark.parametrize("k", [1, 4])
def test_bfloat16(k):
    model = model_of(k=k).bfloat16()
    for options in ({"num_steps": 3}, {"product": True}):
        assert [len(row) for row in written(model, **options)[0]] == [7, 7, 7]


# The product


@pytest.mark.parametrize("kind", ["causal", "recurrent"])
def test_the_product_of_one_block_is_that_block(kind):
    model = model_of(kind, num_blocks=1, top_share=0.0)
    one, product = written(model, num_steps=1), written(model, product=True)
    assert one[0] == product[0]
    torch.testing.assert_close(one[1].log_softmax(-1), product[1], **CLOSE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 2}, "num_steps and sigmas must be None, got 2 and None"),
        ({"sigmas": [80.0]}, r"num_steps and sigmas must be None, got None and \[80.0\]"),
    ],
)
def test_the_product_has_no_steps(change, message):
    with pytest.raises(ValueError, match=message):
        stream(model_of(), PROMPTS, max_new_tokens=1, product=True, **change)


def test_the_product_needs_blocks_that_were_trained_at_the_top():
    with pytest.raises(ValueError, match=r"got BlocksConfig.top_share = 0; train with"):
        stream(model_of(top_share=0.0), PROMPTS, max_new_tokens=1, product=True)
    with pytest.raises(
        ValueError, match=r"False for a model that is not in blocks, .* for a plain CausalLM"
    ):
        stream(model_of().base_model, PROMPTS, max_new_tokens=1, product=True)
