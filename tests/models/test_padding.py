"""Texts in a padded batch are trained on, scored and continued as if each were alone."""

import pytest
import torch

from dblocks.models import RecurrentLM
from dblocks.sampling import generate
from lm_tools import SINGLE, blocks_of, lm_of, recurrent_blocks_of, recurrent_of, tokens_of
from tools import DEVICE, randomized, seeded

T = 8
RANGES = ((0, 8), (3, 8), (0, 5), (2, 6))
IN_FOURS = ((0, 8), (4, 8), (0, 4), (4, 8))
TOKENS = tokens_of(4, T, seed=2)
HOLES = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]], device=DEVICE).expand(4, T)
FOURS = {"tokens_per_block": 4, "tokens_per_sigma": 4}

MODELS = {
    "single": lambda: blocks_of(**SINGLE),
    "single with levels as rows": lambda: blocks_of(**SINGLE, conditioning="none"),
    "doubled": lambda: blocks_of(),
    "four at once, single": lambda: blocks_of(**SINGLE, **FOURS),
    "four at once": lambda: blocks_of(**FOURS),
    "recurrent, single": lambda: recurrent_blocks_of(2, **SINGLE),
    "recurrent": lambda: recurrent_blocks_of(2),
}
PLAIN = {"plain": lm_of, "plain recurrent": recurrent_of}


def mask_of(ranges=RANGES):
    return torch.tensor([[int(a <= j < b) for j in range(T)] for a, b in ranges], device=DEVICE)


MASK = mask_of()


def ranges_of(name):
    return IN_FOURS if "four" in name else RANGES


def state(blocks, n=4):
    """A noisy embedding and a level for each token, that of a block of tokens the same."""
    z = torch.randn(n, T, blocks.base_model.width, generator=seeded(3)).to(DEVICE)
    k = blocks.base_model.block_size
    levels = torch.rand(n, T // k, generator=seeded(4)).to(DEVICE)
    return z, 1 + levels.repeat_interleave(k, 1)


def scores(blocks, batch, z, sigma):
    """The losses of the tokens at a given state."""
    network, schedule = blocks.base_model, blocks.config.schedule
    given = network.target.check(batch)
    level, condition = schedule.level(sigma), network.embed_condition(given)
    z_in = schedule.scale_in(z, level)
    hidden = network.run_layers(blocks.parts(0)[1], z_in, level, condition)
    y = network.target.embed(given)
    return network.target.score(
        network.features(hidden), z, level, y, torch.tensor(0, device=DEVICE), given
    )


def gradients(blocks, loss):
    held = list(blocks.parameters())
    found = torch.autograd.grad(loss, held, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(held, found, strict=True)]


def mean_alone(ranges, batch, loss_of):
    """The mean over scored tokens of texts alone; `loss_of(part, place, count)` adds one's."""
    total, count = 0, 0
    for n, (a, b) in enumerate(ranges):
        place = slice(n, n + 1), slice(a, b)
        part = {key: value[place] for key, value in batch.items()}
        scored = part.get("loss_mask", torch.ones_like(part["tokens"], dtype=torch.bool))
        number = scored[:, 1:].sum()
        total, count = total + loss_of(part, place) * number, count + number
    return total / count


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_each_text_alone(name):
    blocks, ranges = MODELS[name](), ranges_of(name)
    z, sigma = state(blocks)
    with torch.no_grad():
        for mask in (mask_of(ranges), mask_of(ranges).bool()):
            found = blocks.logits(z, sigma, block=1, tokens=TOKENS, attention_mask=mask)
            for n, (a, b) in enumerate(ranges):
                one, part = slice(n, n + 1), slice(a, b)
                alone = blocks.logits(
                    z[one, part], sigma[one, part], block=1, tokens=TOKENS[one, part]
                )
                error = (found[one, part] - alone).abs().max()
                assert error < 1e-5 * alone.abs().max()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("masked", [False, True])
def test_losses_and_gradients_are_those_of_texts_alone(name, masked):
    blocks, ranges = MODELS[name](), ranges_of(name)
    z, sigma = state(blocks)
    batch = {"tokens": TOKENS}
    if masked:
        batch["loss_mask"] = torch.rand(4, T, generator=seeded(5)).to(DEVICE) < 0.8
    mask = mask_of(ranges)
    if "four" in name:
        sigma = sigma[:, ::4]
    found = scores(blocks, {**batch, "attention_mask": mask}, z, sigma)

    def loss_of(part, place):
        levels = (place[0], slice(place[1].start // 4, place[1].stop // 4))
        return scores(blocks, part, z[place], sigma[levels if "four" in name else place]).mean()

    expected = mean_alone(ranges, batch, loss_of)
    torch.testing.assert_close(found.mean(), expected, rtol=1e-5, atol=1e-6)
    pairs = zip(gradients(blocks, found.mean()), gradients(blocks, expected), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_what_stands_at_padding_changes_nothing(name):
    blocks, mask = MODELS[name](), mask_of(ranges_of(name))
    other = torch.where(mask == 1, TOKENS, 10 - TOKENS)
    losses = [
        blocks.loss({"tokens": t, "attention_mask": mask}, 0, generator=seeded()).loss
        for t in (TOKENS, other)
    ]
    torch.testing.assert_close(losses[0], losses[1])
    # A mask of ones says nothing; leaving padding out says something.
    plain = blocks.loss({"tokens": TOKENS}, 0, generator=seeded()).loss
    ones = {"tokens": TOKENS, "attention_mask": torch.ones_like(mask)}
    torch.testing.assert_close(blocks.loss(ones, 0, generator=seeded()).loss, plain)
    assert not torch.allclose(losses[0], plain)


@pytest.mark.parametrize("each", [4, None])
@pytest.mark.parametrize("rows", ["single", "doubled"])
def test_levels_of_several_tokens(rows, each):
    blocks = blocks_of(rows=rows, head="posterior", tokens_per_sigma=each)
    z, _ = state(blocks)
    sigma = torch.tensor([1.0, 2.0, 3.0, 4.0], device=DEVICE)
    if each is not None:
        sigma = sigma[:, None] * torch.tensor([1.0, 0.5], device=DEVICE)
    by_token = sigma.view(4, -1).repeat_interleave(T // sigma.view(4, -1).shape[1], 1)
    given = {"block": 0, "tokens": TOKENS, "attention_mask": MASK}
    found, expected = blocks.logits(z, sigma, **given), blocks.logits(z, by_token, **given)
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-5, atol=1e-5)
    assert blocks.loss({"tokens": TOKENS, "attention_mask": MASK}, 1).loss.isfinite()


@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_model_is_that_of_each_text_alone(name, monkeypatch):
    lm = randomized(PLAIN[name]())
    normal = torch.randn(T, lm.width, generator=seeded(6)).to(DEVICE)
    # The same state for a place in any text.
    monkeypatch.setattr(
        RecurrentLM, "_drawn", lambda lm, t, _: normal[: t.shape[1]].expand(len(t), -1, -1)
    )
    batch = {"tokens": TOKENS, "loss_mask": torch.rand(4, T, generator=seeded(5)).to(DEVICE) < 0.8}
    options = {"num_recurrences": 3} if "recurrent" in name else {}
    logits = lm(TOKENS, attention_mask=MASK, **options)
    for n, (a, b) in enumerate(RANGES):
        alone = lm(TOKENS[n : n + 1, a:b], **options)[0]
        assert (logits[n, a:b] - alone).abs().max() < 1e-5 * alone.abs().max()
    found = lm.next_token_loss({**batch, "attention_mask": MASK}, **options)
    expected = mean_alone(RANGES, batch, lambda part, _: lm.next_token_loss(part, **options))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*MODELS, *PLAIN])
def test_prompts_with_padding_are_continued_as_without(name):
    model = MODELS[name]() if name in MODELS else randomized(PLAIN[name]())
    options = {"max_new_tokens": 4, "temperature": 0.0}
    found = generate(model, TOKENS, attention_mask=MASK, generator=seeded(), **options)
    rows = [TOKENS[n, a:b] for n, (a, b) in enumerate(RANGES)]
    alone = generate(model, rows, generator=seeded(), **options)
    for ours, expected in zip(found, alone, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("mask", "message"),
    [(HOLES, "no holes"), (MASK[:, None, None] * MASK[:, None, :, None], "each text a row of its"),
     (0 * MASK, "no row of padding"), (MASK[:, :5], "the shape of the tokens"),
     ((1 - MASK.float()) * -1e9, "0 or 1")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["single", "doubled", "recurrent", *PLAIN])
def test_masks_are_checked(name, mask, message):
    batch = {"tokens": TOKENS, "attention_mask": mask}
    if name in PLAIN:
        calls = [lambda: lm(**batch), lambda: lm.next_token_loss(batch)]
        lm = PLAIN[name]()
    else:
        blocks = MODELS[name]()
        calls = [lambda: blocks.loss(batch, 0), lambda: blocks.bind(**batch)(*state(blocks))]
        calls += [lambda: blocks.base_model.next_token_loss(batch)]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_documents_have_no_padding():
    ends = torch.tensor([0, 3, 8], dtype=torch.int32, device=DEVICE)
    batch = {"tokens": TOKENS[:1], "attention_mask": MASK[:1], "cu_seqlens": ends}
    with pytest.raises(ValueError, match="attention_mask must be None with cu_seqlens"):
        MODELS["single"]().loss(batch, 0)


def test_blocks_of_tokens_begin_and_end_with_texts():
    blocks = MODELS["four at once"]()
    for ranges in (RANGES, ((0, 8), (4, 8), (0, 4), (2, 6)), ((0, 8), (0, 8), (0, 8), (5, 8))):
        batch = {"tokens": TOKENS, "attention_mask": mask_of(ranges)}
        with pytest.raises(ValueError, match=r"begin and end at multiples of tokens_per_block=4"):
            blocks.loss(batch, 0)
