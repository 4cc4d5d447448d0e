"""Batches of texts in which nothing is to be predicted are refused, before anything is drawn."""

import convert_tools
import masked_tools
import pytest
import torch

import lm_tools
from dblocks.blocks import make_optimizers, train_step
from tools import seeded

UNSCORED = "at least one token that is scored, got none"
NOT_SCORED = torch.zeros(2, 8, dtype=torch.bool)
FIRST = torch.arange(8).expand(2, 8) == 0
ENDS = torch.arange(9, dtype=torch.int32)  # packed documents of one token each


def masked(**more):
    return {"tokens": masked_tools.tokens_of(), **more}


def text(length=8, n=2, **more):
    return {"tokens": lm_tools.tokens_of(n, length), **more}


def llama(**options):
    return convert_tools.blocks_of("llama", **options)


BERT = convert_tools.batch_of("bert", 2) | {"loss_mask": NOT_SCORED}
CASES = {
    "one-token": (lm_tools.blocks_of, text(1)),
    "one-token-document": (lm_tools.blocks_of, text(1, 1, cu_seqlens=ENDS[:2])),
    "documents-of-one-token": (lm_tools.blocks_of, text(n=1, cu_seqlens=ENDS)),
    "loss-mask": (lm_tools.blocks_of, text(loss_mask=NOT_SCORED)),
    "loss-mask-of-first": (lm_tools.blocks_of, text(loss_mask=FIRST)),
    "padding": (lm_tools.blocks_of, text(attention_mask=FIRST.int())),
    "single-rows": (lambda: lm_tools.blocks_of(**lm_tools.SINGLE), text(1)),
    "recurrent": (lm_tools.recurrent_blocks_of, text(1)),
    "recurrent-loss-mask": (lm_tools.recurrent_blocks_of, text(loss_mask=NOT_SCORED)),
    "masked": (masked_tools.blocks_of, masked(loss_mask=NOT_SCORED)),
    "masked-padding": (
        masked_tools.blocks_of,
        masked(loss_mask=~FIRST, attention_mask=FIRST.int()),
    ),
    "converted": (llama, text(1)),
    "converted-loss-mask": (llama, text(loss_mask=NOT_SCORED)),
    "converted-padding": (llama, text(attention_mask=FIRST.int())),
    "converted-clean-loss": (lambda: llama(clean_loss_weight=1.0), text(1)),
    "converted-masked": (lambda: convert_tools.blocks_of("bert"), BERT),
}


@pytest.mark.parametrize("case", CASES)
def test_a_batch_without_a_scored_token_is_refused(case):
    make, batch = CASES[case]
    dm = make()
    generator = seeded()
    state = generator.get_state()
    parameters = [p.detach().clone() for p in dm.parameters()]
    optimizers = make_optimizers(dm, lambda params: torch.optim.SGD(params, lr=0.1))
    with pytest.raises(ValueError, match=UNSCORED):
        dm.loss(batch, 0, generator=generator)
    with pytest.raises(ValueError, match=UNSCORED):
        train_step(dm, batch, optimizers, block=0, generator=generator)
    assert generator.get_state().equal(state)
    assert all(p.equal(q) for p, q in zip(dm.parameters(), parameters, strict=True))


@pytest.mark.parametrize("make", [lm_tools.lm_of, lm_tools.recurrent_of])
def test_end_to_end_losses_refuse_them_too(make):
    model = make()
    for batch in (text(1), text(loss_mask=FIRST), text(attention_mask=FIRST.int())):
        with pytest.raises(ValueError, match=UNSCORED):
            model.next_token_loss(batch)


def test_texts_of_one_token_among_longer_ones_are_left_out_of_the_mean():
    """The loss is that of the longer document alone, packed or padded."""
    model = lm_tools.lm_of()
    tokens = lm_tools.tokens_of(1, 8)
    ends = torch.tensor([0, 1, 7, 8], dtype=torch.int32)
    alone = model.next_token_loss({"tokens": tokens[:, 1:7]})
    packed = model.next_token_loss({"tokens": tokens, "cu_seqlens": ends})
    torch.testing.assert_close(packed, alone)
    both = torch.cat([tokens, tokens])
    padded = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(
        model.next_token_loss({"tokens": both, "attention_mask": padded}), alone
    )
    dm = lm_tools.blocks_of()
    assert dm.loss({"tokens": tokens, "cu_seqlens": ends}, 0).loss > 0


def test_a_draw_that_masks_nothing_is_a_loss_of_zero():
    """Only a batch that never masks anything is refused: draws are random."""
    dm = masked_tools.blocks_of()
    batch = masked(loss_mask=torch.arange(8).expand(2, 8) == 7)
    drawn = dm.draw(batch, 2, generator=seeded())
    drawn = drawn._replace(sigma=torch.full_like(drawn.sigma, 1e-4))
    assert dm.loss_at(batch, 2, drawn).loss == 0


def test_counts_on_other_devices_are_asserted_there():
    from torch._subclasses import FakeTensorMode

    from dblocks.blocks.targets.entries import check_scored

    with FakeTensorMode():
        check_scored(torch.zeros((), dtype=torch.int64))
    check_scored(torch.zeros((), dtype=torch.int64, device="meta"))
