"""Who sees what in a single stream, and in blocks of tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.sampling import denoising_bound, next_token_nll, product_nll
from lm_tools import CLOSE, SINGLE, lm_of, recurrent_of, tokens_of
from tools import DEVICE, normal, randomized, seeded

T = 8


def model_of(kind="causal", num_blocks=2, **options):
    """Blocks of a `CausalLM` of k tokens at once, or of a `RecurrentLM`."""
    options = {**SINGLE, "tokens_per_sigma": options.get("tokens_per_block", 1), **options}
    if kind == "recurrent":
        lm = recurrent_of(**{**options, "core": 2})
    else:
        lm = lm_of(**{"depth": 4, "context": 16, **options})
    return DiffusionBlocks(randomized(lm), BlocksConfig(num_blocks))


MODELS = (
    ("causal", {}),
    ("causal", {"conditioning": "none"}),
    ("causal", {"head": "learned"}),
    ("causal", {"tied": False}),
    ("causal", {"tied": False, "head": "learned", "conditioning": "none"}),
    ("causal", {"tokens_per_block": 2}),
    ("causal", {"tokens_per_block": 4, "conditioning": "none"}),
    ("causal", {"tokens_per_block": 4, "head": "learned", "tied": False}),
    ("causal", {"tokens_per_block": 8}),
    ("causal", {"tokens_per_block": 2, "rows": "doubled"}),
    ("causal", {"tokens_per_block": 4, "rows": "doubled", "head": "learned"}),
    ("recurrent", {}),
    ("recurrent", {"conditioning": "none", "tied": False}),
    ("recurrent", {"head": "learned"}),
)  # fmt: skip
models = pytest.mark.parametrize(("kind", "options"), MODELS)


def levels(rows=T, k=1, seed=0):
    """A level for each block of tokens, of the second of two blocks."""
    u = torch.rand(1, rows // k, generator=seeded(seed)) * 0.2 + 0.1
    return u.repeat_interleave(k, 1).to(DEVICE)


def changed(before, after):
    """Which rows of [1, T, V] are not bit for bit the same, [T]."""
    return (before != after).any(-1)[0].cpu()


# What rows depend on


@models
@pytest.mark.parametrize("block", [0, 1])
def test_a_token_changes_later_blocks_of_rows_only(kind, options, block):
    model, k = model_of(kind, **options), options.get("tokens_per_block", 1)
    tokens, z, sigma = tokens_of(1, T), normal(1, T, 16), levels(k=k)
    before = model.logits(z, sigma, block=block, tokens=tokens)
    rows = torch.arange(T) // k
    for j in range(T):
        other = tokens.clone()
        other[0, j] = (other[0, j] + 1) % 11
        after = model.logits(z, sigma, block=block, tokens=other)
        assert torch.equal(changed(before, after), rows > j // k)


@models
def test_noise_changes_its_own_block_and_later_ones_only(kind, options):
    model, k = model_of(kind, **options), options.get("tokens_per_block", 1)
    tokens, z, sigma = tokens_of(1, T), normal(1, T, 16), levels(k=k)
    before = model.logits(z, sigma, block=1, tokens=tokens)
    rows, single = torch.arange(T) // k, model.base_model.config.rows == "single"
    for j in range(T):
        other = z.clone()
        other[0, j] += normal(16, seed=3)
        after = model.logits(other, sigma, block=1, tokens=tokens)
        # Doubled rows are predicted from clean ones, so that noise stays in its block.
        expected = rows >= j // k if single else rows == j // k
        assert torch.equal(changed(before, after), expected)


def embeddings_as_leaf(model, tokens):
    """For gradients with respect to each token of a sequence, as no batch can give them."""
    lm = model.base_model
    e = lm._embed(tokens, lm.target_embedding.rows()).detach().requires_grad_()
    lm._embed = lambda tokens, rows: e
    return e


@models
def test_nothing_leaks_when_the_noisy_embeddings_are_given(kind, options):
    """The gradient of a row's logits to tokens of its own block and of later ones is exactly 0."""
    model, k = model_of(kind, **options), options.get("tokens_per_block", 1)
    tokens, z = tokens_of(1, T), normal(1, T, 16).requires_grad_()
    e = embeddings_as_leaf(model, tokens)
    logits = model.logits(z, levels(k=k), block=1, tokens=tokens)
    rows, single = torch.arange(T) // k, model.base_model.config.rows == "single"
    for i in range(T):
        to_tokens, to_noise = torch.autograd.grad(
            logits[:, i].sin().sum(), (e, z), retain_graph=True
        )
        seen = to_tokens[0].abs().sum(-1).cpu() > 0
        assert torch.equal(seen, rows < i // k)
        noise = to_noise[0].abs().sum(-1).cpu() > 0
        assert torch.equal(noise, rows <= i // k if single else rows == i // k)


@models
def test_noise_about_a_token_does_not_reach_its_block_through_other_rows(kind, options):
    """Earlier noise tells later rows of tokens that they know: z there is of earlier blocks."""
    if options.get("rows") == "doubled":
        return
    model, k = model_of(kind, **options), options.get("tokens_per_block", 1)
    y_tokens, sigma = tokens_of(1, T), levels(k=k)
    rows = torch.arange(T) // k
    for b in range(T // k):
        # Two texts that agree before block b, as training makes their noisy embeddings.
        other = y_tokens.clone()
        other[0, b * k :] = (other[0, b * k :] + 1) % 11
        z = [
            model.base_model.target.embed({"tokens": t}) + sigma[..., None] * normal(1, T, 16)
            for t in (y_tokens, other)
        ]
        mixed = torch.where(rows[:, None].to(DEVICE) == b, z[0], z[1])
        logits = [
            model.logits(noisy, sigma, block=1, tokens=t)
            for noisy, t in ((z[0], y_tokens), (mixed, other))
        ]
        # Given the block's own noisy embeddings, nothing else differs up to it.
        assert torch.equal(changed(*logits), rows > b)


# Where it is what it looks like


@models
@settings(max_examples=4)
@given(data=st.data())
def test_packed_documents_equal_separate_sequences(kind, options, data):
    model, k = model_of(kind, **options), options.get("tokens_per_block", 1)
    lengths = data.draw(st.lists(st.integers(0, 8 // k), min_size=1, max_size=3).filter(any))
    lengths = [k * length for length in lengths]
    lengths[0] = max(lengths[0], 2 if k == 1 else k)  # one document is scored
    documents = [tokens_of(1, length, seed=i) for i, length in enumerate(lengths) if length]
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    packed = {"tokens": torch.cat(documents, dim=1), "cu_seqlens": ends}
    rows = packed["tokens"].shape[1]
    z, sigma = normal(1, rows, 16), levels(rows, k)
    got = model.logits(z, sigma, block=1, **packed)
    start = 0
    for document in documents:
        part = slice(start, start := start + document.shape[1])
        alone = model.logits(z[:, part], sigma[:, part], block=1, tokens=document)
        torch.testing.assert_close(got[:, part], alone, **CLOSE)
    if k == 1:  # what is not scored: the first token of each document
        losses = model.loss(packed, 0, generator=seeded()).losses[0].cpu()
        starts = {sum(lengths[:i]) for i, length in enumerate(lengths) if length}
        assert set((losses == 0).nonzero().flatten().tolist()) == starts


@pytest.mark.parametrize("rows", ["single", "doubled"])
def test_documents_end_with_a_block_of_tokens(rows):
    model = model_of(tokens_per_block=4, rows=rows)
    ends = torch.tensor([0, 3, 8], dtype=torch.int32)
    batch = {"tokens": tokens_of(1, 8), "cu_seqlens": ends}
    message = r"multiples of tokens_per_block=4 long, got ends \[0, 3, 8\]; pad each, with a loss"
    with pytest.raises(ValueError, match=message):
        model.loss(batch, 0)
    with pytest.raises(ValueError, match=message):
        model.logits(normal(1, 8, 16), 0.3, **batch)


@pytest.mark.parametrize("rows", ["single", "doubled"])
@pytest.mark.parametrize("each", [None, 4])
@pytest.mark.parametrize("length", [3, 7])
def test_sequences_end_with_a_block_of_tokens(rows, each, length):
    """Row i holds token i - k, so that rows of a shorter block would not see the last tokens."""
    model = model_of(tokens_per_block=4, tokens_per_sigma=each, rows=rows)
    batch = {"tokens": tokens_of(1, length)}
    message = f"multiples of tokens_per_block=4 long, got {length}; pad them, with a loss_mask"
    for call in (
        lambda: model.loss(batch, 0),
        lambda: model.logits(normal(1, length, 16), 0.3, **batch),
        lambda: next_token_nll(model, batch["tokens"]),
        lambda: product_nll(model, batch["tokens"]),
        lambda: denoising_bound(model, batch["tokens"]),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert model.base_model(batch["tokens"]).shape == (1, length, 11)  # the plain model


@models
def test_padding_at_the_end_changes_nothing_before_it(kind, options):
    model, k = model_of(kind, **options), options.get("tokens_per_block", 1)
    kept = T - k if k < T else T
    tokens, other, z = tokens_of(1, T), tokens_of(1, T), normal(1, T, 16)
    other[:, kept:] = 0
    sigma = levels(k=k)
    one, two = (model.logits(z, sigma, block=1, tokens=t) for t in (tokens, other))
    assert torch.equal(one[:, :kept], two[:, :kept])
    mask = torch.arange(T, device=DEVICE).expand(1, T) < kept
    draw = model.draw({"tokens": tokens}, 1, generator=seeded())
    one, two = (
        model.loss_at({"tokens": t, "loss_mask": mask}, 1, draw).loss for t in (tokens, other)
    )
    assert torch.equal(one, two)


@models
def test_the_loss_is_the_mean_over_tokens_that_are_scored(kind, options):
    model, k = model_of(kind, **options), options.get("tokens_per_block", 1)
    tokens = tokens_of(2, T)
    mask = torch.rand(2, T, generator=seeded()).to(DEVICE) < 0.6
    draw = model.draw({"tokens": tokens}, 1, generator=seeded())
    got = model.loss_at({"tokens": tokens, "loss_mask": mask}, 1, draw)
    level = model.config.noise_schedule.level(draw.sigma)
    z = model.config.schedule.corrupt(model.base_model.target.embed({"tokens": tokens}), level,
                                      draw.seed).z  # fmt: skip
    logits = model.logits(z, draw.sigma, block=1, tokens=tokens)
    ce = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    scored = mask & (torch.arange(T, device=DEVICE) > 0)
    assert got.losses.shape == (2, T // k)
    torch.testing.assert_close(got.losses.mean(), ce[scored].mean(), **CLOSE)


@models
def test_every_parameter_of_a_block_gets_a_gradient(kind, options):
    model = model_of(kind, **options)
    model.loss({"tokens": tokens_of(4, T)}, 1, generator=seeded()).loss.backward()
    first, _ = model.layer_ranges[1]
    for name, parameter in model.base_model.named_parameters():
        of_another = name.startswith(tuple(f"layers.{i}." for i in range(first)))
        assert (parameter.grad is None) == of_another, name


@pytest.mark.parametrize("k", [1, 4])
def test_a_loss_compiles_as_one_graph(k):
    model = model_of(tokens_per_block=k, depth=2)
    batch = {"tokens": tokens_of(2, T)}
    draw = model.draw(batch, 1, generator=seeded())
    compiled = torch.compile(model.loss_at, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch, 1, draw).loss, model.loss_at(batch, 1, draw).loss)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rows": "triple"}, r"rows must be one of \('single', 'doubled'\), got 'triple'"),
        ({"head": "both"}, r"head must be one of \('posterior', 'learned'\), got 'both'"),
        ({"tokens_per_block": 0}, "tokens_per_block must be positive, got 0"),
        ({"tokens_per_block": 4}, "None or a multiple of tokens_per_block=4, .* got 1"),
        ({"tokens_per_block": 4, "tokens_per_sigma": 6}, "tokens_per_block=4, whose .* got 6"),
    ],
)  # fmt: skip
def test_config_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        lm_of(**values)
