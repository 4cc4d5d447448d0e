"""Every family of diffusers' denoisers that can be converted, beside the plain model."""

import copy

import pytest
import torch
from convert_tools import adamw
from denoiser_models import MODELS, denoiser_batch, denoiser_model
from denoiser_tools import (
    SCHEDULE,
    chain_of,
    close,
    condition,
    cut,
    left_names,
    over,
    owner_of,
    plain_denoised,
    renamed_by,
)

from dblocks import BlocksConfig, make_optimizers, train_step
from dblocks.integrations.convert import ConvertedBlocks, convert
from tools import normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", MODELS)
def test_denoisers(kind, tmp_path):
    model, batch = denoiser_model(kind), denoiser_batch(kind)
    fresh, cond = copy.deepcopy(model), condition(batch)
    half = {"timestep": torch.full((2,), 0.5), "return_dict": False}
    with torch.no_grad():
        before = model(batch["images"], **half, **cond)[0]
        blocks = convert(model, BlocksConfig(2, schedule=SCHEDULE), task="images")
        assert model(batch["images"], **half, **cond)[0].equal(before)
        assert blocks.base_model(batch["images"], **half, **cond)[0].equal(before)
        whole = convert(copy.deepcopy(model), BlocksConfig(1, schedule=SCHEDULE), task="images")
        z, sigma = normal(*batch["images"].shape), torch.tensor([0.05, 7.0])
        close(whole(z, sigma, block=0, **cond), plain_denoised(kind, model, z, sigma, cond))

    lists = blocks.base_model.family.lists
    for block, (first, last) in enumerate(blocks.layer_ranges):
        part = cut(fresh, lists, first, last)
        draw = blocks.draw(batch, block, generator=seeded())
        result = blocks.loss_at(batch, block, draw)
        level = SCHEDULE.level(draw.sigma)
        z = SCHEDULE.corrupt(batch["images"], level, draw.seed).z
        denoised = plain_denoised(kind, part, z, draw.sigma, cond)
        error = (denoised - batch["images"]) / over(level.c_out, z)
        losses = error.square().flatten(1).mean(1)
        close(result.losses, losses)
        close(result.loss, losses.mean())
        result.loss.backward()
        losses.mean().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        names = dict(zip(blocks.base_model.names[first:last], left_names(part, lists), strict=True))
        expected = {n: p.grad for n, p in part.named_parameters() if p.grad is not None}
        renamed = {renamed_by(names, n): n for n in found}
        assert set(renamed) == set(expected)
        largest = max(grad.abs().max() for grad in expected.values())
        for name, grad in expected.items():
            difference = (found[renamed[name]] - grad).abs().max()
            assert difference <= 2e-4 * grad.abs().max() + 2e-6 * largest, name
        model.zero_grad()

    state = {name: value.clone() for name, value in blocks.state_dict().items()}
    optimizers = make_optimizers(blocks, lambda p: adamw(p, weight_decay=0.1))
    train_step(blocks, batch, optimizers, block=1, generator=seeded())
    moved = {n for n, value in blocks.state_dict().items() if not value.equal(state[n])}
    owners = {n: owner_of(blocks, p) for n, p in blocks.named_parameters()}
    assert {owners[name] for name in moved} == {1, None}
    assert 2 * sum(owners[n] == 1 for n in moved) > list(owners.values()).count(1)

    blocks.save_pretrained(tmp_path)
    again = ConvertedBlocks.from_pretrained(tmp_path, fresh)
    for b in range(2):
        losses = [m.loss(batch, b, generator=seeded()).loss for m in (blocks, again)]
        assert losses[0].equal(losses[1])


@pytest.mark.parametrize("kind", MODELS)
def test_layers_are_a_chain_whichever_run(kind):
    """What `convert` relies on: layers see what the one before returned, and else the same."""
    model = denoiser_model(kind)
    family = convert(model, BlocksConfig(2), task="images").base_model.family
    assert not chain_of(kind, model, family.lists)


def test_every_family_is_tested():
    from dblocks.integrations.convert.denoiser_families import FAMILIES

    assert set(MODELS) == set(FAMILIES)
