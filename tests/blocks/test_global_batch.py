"""Processes that have a part of a batch each draw what one process draws for all of it."""

import copy

import pytest
import torch
from convert_tools import blocks_of as converted
from convert_tools import shaken, without_dropout
from dit_tools import batch_of as images_of
from dit_tools import dit_of
from hub_tools import library
from masked_tools import lm_of as masked_lm_of

from dblocks import functional as F
from dblocks.blocks import BlocksConfig, DiffusionBlocks, sharding
from dblocks.blocks.sharding import Replicas
from dblocks.schedules import MaskSchedule, NoiseSchedule
from dblocks.schedules.random import uniforms
from lm_tools import lm_of, recurrent_of
from tools import DEVICE, batch, randomized, seeded, vit

pytestmark = pytest.mark.usefixtures("one_thread")
N = 8


def tokens(low=0, high=11):
    return {"tokens": torch.randint(low, high, (N, 8), generator=seeded(1)).to(DEVICE)}


def padded(low=0):
    """Texts of 8 to 1 tokens, so that processes have other numbers of them."""
    seen = torch.arange(8) < torch.arange(N, 0, -1)[:, None]
    return tokens(low) | {"loss_mask": seen.to(DEVICE)}


def in_blocks(network, **config):
    return DiffusionBlocks(randomized(network), BlocksConfig(2, **config))


CASES = {
    "vit": lambda: (in_blocks(vit()), batch(N)),
    "vit, mean of weights": lambda: (in_blocks(vit(), weighting="batch_mean"), batch(N)),
    "dit, labels dropped": lambda: (in_blocks(dit_of()), images_of(N)),
    "lm": lambda: (in_blocks(lm_of(rows="single", head="posterior")), padded()),
    "lm, doubled": lambda: (in_blocks(lm_of()), tokens()),
    "masked": lambda: (in_blocks(masked_lm_of(), schedule=MaskSchedule()), padded()),
    "recurrent": lambda: (in_blocks(recurrent_of()), padded()),
    "llama": lambda: _converted("llama", padded(5)),
    "bert": lambda: _converted("bert", tokens(5, 23)),
    "llama, clean loss": lambda: _converted("llama", padded(5), clean_loss_weight=0.5),
}


def _converted(kind, given, **options):
    library("transformers")
    options.setdefault("clean_loss_weight", 0.0)
    return without_dropout(shaken(converted(kind, **options))), given


def part(given, rank, count):
    each = N // count
    return {name: values[rank * each : (rank + 1) * each] for name, values in given.items()}


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_parts_are_those_of_the_batch(monkeypatch, case, count):
    model, given = CASES[case]()
    parts = [part(given, rank, count) for rank in range(count)]
    counts = [model.base_model.target.scored(model.base_model.target.check(p)) for p in parts]
    # What the processes would tell each other: sums are of what is scored.
    monkeypatch.setattr(
        sharding, "reduced", lambda value, _, op: value if op == "max" else sum(counts).float()
    )
    for block in range(2):
        model.zero_grad()
        whole = model.loss(given, block, generator=seeded(7))
        whole.loss.backward()
        wanted = gradients(model)
        model.zero_grad()
        losses = []
        for rank, mine in enumerate(parts):
            replicas = Replicas(rank, count, ())
            found = model.loss(mine, block, generator=seeded(7), replicas=replicas)
            (found.loss / count).backward()
            losses.append(found)
        assert torch.cat([x.sigma for x in losses]).equal(whole.sigma)
        torch.testing.assert_close(torch.cat([x.weight for x in losses]), whole.weight)
        torch.testing.assert_close(torch.stack([x.loss for x in losses]).mean(), whole.loss)
        assert gradients(model).keys() == wanted.keys()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["lm", "masked", "recurrent", "llama", "llama, clean loss"])
def test_a_part_without_scored_tokens_is_taken_if_others_have_some(monkeypatch, case):
    model, given = CASES[case]()
    given = {**part(given, 0, 4), "loss_mask": torch.zeros(2, 8, dtype=torch.bool, device=DEVICE)}
    total = [torch.tensor(5.0, device=DEVICE)]
    monkeypatch.setattr(
        sharding, "reduced", lambda value, _, op: value if op == "max" else total[0]
    )
    model.loss(given, 0, generator=seeded(), replicas=Replicas(1, 4, ())).loss.backward()
    assert all(not g.any() for g in gradients(model).values())
    total[0] = torch.tensor(0.0, device=DEVICE)
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match="at least one token that is scored, got none"):
            model.loss(given, 0, generator=seeded(), replicas=Replicas(1, 4, ()))


def test_an_offset_seed_goes_on_where_the_samples_before_ended():
    y, f = (torch.randn(6, 5, generator=seeded(i)).to(DEVICE) for i in (1, 2))
    sigma = torch.rand(6, generator=seeded(3)).to(DEVICE) + 0.1
    for seed in (3, torch.tensor(3, device=DEVICE)):
        later = F.OffsetSeed(seed, 20)
        whole, rest = F.noise_inject(y, sigma, seed), F.noise_inject(y[4:], sigma[4:], later)
        assert rest.z.equal(whole.z[4:])
        assert rest.z_in.equal(whole.z_in[4:])
        losses = F.edm_loss(f, y, sigma, seed), F.edm_loss(f[4:], y[4:], sigma[4:], later)
        assert losses[1].equal(losses[0][4:])
        more = F.OffsetSeed(seed, 15)
        assert F.noise_inject(y[4:], sigma[4:], more, offset=5).z.equal(rest.z)
        assert uniforms((2, 5), later, DEVICE).equal(uniforms((6, 5), seed, DEVICE)[4:])
    with pytest.raises(ValueError, match="offset must be >= 0"):
        F.noise_inject(y, sigma, F.OffsetSeed(3, -1))
    with pytest.raises(TypeError, match="seed must be an int"):
        F.noise_inject(y, sigma, F.OffsetSeed(1.5, 0))


def test_a_schedule_of_ones_own_and_a_target_get_the_noise_of_the_batch():
    """What scores by the seed that it is given needs to know nothing of processes."""

    class Louder(NoiseSchedule):
        def corrupt(self, y, level, seed):
            return F.noise_inject(y, 2 * level.sigma, seed, sigma_data=self.sigma_data)

    model, given = in_blocks(dit_of(), schedule=Louder()), images_of(N)
    whole = model.loss(given, 0, generator=seeded(7)).losses
    found = [
        model.loss(part(given, r, 2), 0, generator=seeded(7), replicas=Replicas(r, 2, ())).losses
        for r in range(2)
    ]
    torch.testing.assert_close(torch.cat(found), whole)


def test_batches_of_other_shapes_are_refused(monkeypatch):
    model, other = in_blocks(lm_of()), [None]

    def reduced(value, _, op):
        other.append(value.clone())
        return value if other[-2] is None else torch.maximum(value, other[-2])

    monkeypatch.setattr(sharding, "reduced", reduced)
    for given in (part(tokens(), 0, 4), {"tokens": tokens()["tokens"][:2, :6]}):
        other[:] = [None]
        model.draw(part(tokens(), 0, 4), 0, replicas=Replicas(0, 2, ()))
        if given["tokens"].shape == (2, 8):
            model.draw(given, 0, replicas=Replicas(1, 2, ()))
            continue
        with pytest.raises(ValueError, match=r"the same shapes.*\[2, 6\].*in process 1"):
            model.draw(given, 0, replicas=Replicas(1, 2, ()))


def test_one_process_draws_as_ever():
    model, given = in_blocks(vit()), batch(N)
    drawn = model.draw(given, 1, generator=seeded(7))
    assert drawn.whole is None
    assert drawn.seed_of(torch.ones(3)) is drawn.seed
    alone = copy.deepcopy(model).draw(given, 1, generator=seeded(7), replicas=None)
    assert alone.sigma.equal(drawn.sigma)
