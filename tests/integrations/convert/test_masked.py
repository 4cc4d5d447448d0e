"""Converted masked language models: what is masked, predicted, scored and written."""

import math

import pytest
import torch
import torch.nn.functional as nnf
from convert_tools import MASK, MASKED, V, batch_of, blocks_of, plain_logits, shaken

from dblocks.sampling import bound_terms, unmask
from dblocks.schedules.mask import MASKED as HIDDEN
from tools import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


def state_of(blocks, batch, block=1):
    draw = blocks.draw(batch, block, generator=seeded())
    schedule = blocks.config.schedule
    z = schedule.corrupt(batch["tokens"], schedule.level(draw.sigma), draw.seed).z
    return draw, z


@pytest.mark.parametrize("kind", MASKED)
def test_the_mask_is_never_predicted_and_known_tokens_stay(kind):
    blocks, batch = shaken(blocks_of(kind)), batch_of(kind)
    _, z = state_of(blocks, batch, 0)
    assert (z == HIDDEN).any()
    logits = blocks.logits(z, torch.tensor(0.7), block=0)
    assert (logits[..., MASK] == -math.inf).all()
    assert logits[..., MASK + 1 :].isfinite().all()
    estimate = blocks(z, torch.tensor(0.7), block=0)
    torch.testing.assert_close(estimate.sum(-1), torch.ones(3, 8))
    known = z != HIDDEN
    assert estimate[known].argmax(-1).equal(z[known])
    assert (estimate[known].max(-1).values == 1).all()


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_is_that_of_the_logits(kind, masked):
    blocks, batch = shaken(blocks_of(kind)), batch_of(kind)
    tokens, scored = batch["tokens"], torch.ones(3, 8, dtype=torch.bool)
    if masked:
        scored = torch.arange(8) < torch.tensor([[8], [5], [2]])
        batch["loss_mask"] = scored
    draw, z = state_of(blocks, batch)
    result = blocks.loss_at(batch, 1, draw)
    given = torch.where(scored, z, tokens)
    logits = blocks.logits(given, draw.sigma, block=1)
    costs = nnf.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    expected = costs.where((z == HIDDEN) & scored, 0).sum(1) / (scored.sum() / 3)
    torch.testing.assert_close(result.losses, expected)
    result.loss.backward()
    own = blocks.base_model.plain_loss(batch, given)
    hidden = given == HIDDEN
    plain = plain_logits(kind, blocks.base_model, {"tokens": given.masked_fill(hidden, MASK)})
    torch.testing.assert_close(own, nnf.cross_entropy(plain[hidden], tokens[hidden]))


@pytest.mark.parametrize("kind", MASKED)
def test_text_is_unmasked_and_its_bound_estimated(kind):
    blocks = shaken(blocks_of(kind))
    tokens = torch.full((2, 8), HIDDEN)
    tokens[:, 2] = 7
    written = unmask(blocks, tokens, num_steps=5, generator=seeded())
    assert (written.tokens[:, 2] == 7).all()
    assert ((written.tokens >= 0) & (written.tokens < V) & (written.tokens != MASK)).all()
    terms = bound_terms(blocks, batch_of(kind)["tokens"], points=4)
    assert terms.nats.shape == (3, 4)
    per_token = terms.nats.sum() / 24
    assert 0.5 * math.log(V) < per_token < 2 * math.log(V)


def test_what_does_not_fit():
    blocks, tokens = blocks_of("bert"), batch_of("bert")["tokens"]
    holds_mask = tokens.clone()
    holds_mask[0, 0] = MASK
    for batch, message in (
        ({"tokens": holds_mask}, "tokens must not hold the mask, 4"),
        (
            {"tokens": tokens[:1], "cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)},
            "must not hold 'cu_seqlens'",
        ),
        ({"tokens": torch.zeros(1, 40, dtype=torch.int64)}, "at most context=34 long, got 40"),
        ({"labels": tokens}, "must hold a tensor 'tokens'"),
    ):
        with pytest.raises(ValueError, match=message):
            blocks.loss(batch, 0)
    with pytest.raises(ValueError, match="so guidance_scale must be 1"):
        blocks.bind(guidance_scale=2.0)(tokens, torch.tensor(0.7), block=0)
    assert blocks_of("roberta").base_model.sizes.context == 32
    with pytest.raises(TypeError, match="must be the DiffusionBlocks of a MaskedLM, got a Conv"):
        unmask(blocks.base_model, tokens)
    with pytest.raises(ValueError, match="needs z, to say what is masked"):
        blocks.base_model.plain_loss({"tokens": tokens})
