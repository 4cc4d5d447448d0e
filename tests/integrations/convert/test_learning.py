"""Converted models learn, a block at a time."""

import math

import pytest
import torch
from convert_tools import FORMS, SINGLE, blocks_of, model_of
from hub_tools import library

from dblocks import make_optimizers, train_step
from dblocks.recipes.metrics.classes import accuracy
from dblocks.sampling import (
    denoising_bound,
    next_token_nll,
    product_logits,
    product_nll,
    sample_logits,
)
from tools import seeded

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def trained(blocks, batch_at, steps, lr=5e-3):
    optimizers = make_optimizers(blocks, lambda p: torch.optim.AdamW(p, lr=lr))
    generator = seeded()
    for step in range(steps):
        train_step(
            blocks, batch_at(step), optimizers, block=step % blocks.config.num_blocks,
            generator=generator, clip_grad_norm=1.0,
        )  # fmt: skip
    return blocks.eval()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["rows"])
def test_llama_learns_a_text_that_repeats(form):
    """Each token follows from the two before it; by itself each is as likely as any."""
    model = model_of("llama", hidden_size=32, intermediate_size=64)
    blocks = blocks_of("llama", 2, model=model, **form)
    period = torch.randint(0, 11, (40,), generator=seeded(5))
    text = period.repeat(30)

    def batch_at(step):
        starts = torch.randint(0, 40, (16,), generator=seeded(100 + step))
        return {"tokens": torch.stack([text[s : s + 16] for s in starts.tolist()])}

    trained(blocks, batch_at, 150)
    tokens = batch_at(999)["tokens"]
    for score in (next_token_nll, product_nll):
        assert score(blocks, tokens, generator=seeded())[:, 3:].mean() < 0.5 * math.log(11)
    if form is SINGLE:
        bound = denoising_bound(blocks, tokens, generator=seeded())
        assert bound.nll[:, 3:].mean() < 0.5 * math.log(11)


def test_vit_learns_digits():
    data = library("sklearn").datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_labels": 10}
    sizes["initializer_range"] = 0.1
    blocks = blocks_of("vit", 2, model=model_of("vit", **sizes))

    def batch_at(step):
        rows = torch.randint(0, 1500, (32,), generator=seeded(step))
        return {"images": images[rows], "labels": labels[rows]}

    trained(blocks, batch_at, 250)
    z = torch.zeros(297, 32)
    steps = sample_logits(blocks, z, blocks.config.schedule.steps(2), images=images[1500:])
    product = product_logits(blocks, z, images=images[1500:])
    for logits in (steps, product):
        assert accuracy(logits, labels[1500:]) > 0.5  # 0.1 by chance
