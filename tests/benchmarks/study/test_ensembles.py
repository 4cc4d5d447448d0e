"""Ensembles of denoisers: members are trained alone and predict together."""

import dataclasses

import pytest
import torch

from benchmarks.study.ensembles.networks import EnsembleDiT, EnsembleMaskedLM
from benchmarks.study.ensembles.runs import EnsembleDiTRun, EnsembleMaskedRun
from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.models.dit import DiT, DiTConfig
from dblocks.models.masked_lm import MaskedLM, MaskedLMConfig
from dblocks.recipes.records import train
from dblocks.schedules import MASKED, MaskSchedule

pytestmark = pytest.mark.usefixtures("one_thread")
DIT = EnsembleDiTRun(
    end_to_end=True, steps=7, members=3, depth=3, width=8, heads=2, patch_size=4, batch_size=8,
    samples=40, sampling_steps=3, points=1,
)  # fmt: skip


@pytest.fixture
def masked(tmp_path):
    story = tmp_path / "story.txt"
    story.write_text("".join(f"{i} is followed by {i + 1}. " for i in range(60)))
    return EnsembleMaskedRun(
        end_to_end=True, steps=7, members=3, depth=3, width=8, heads=2, batch_size=2, points=1,
        data=str(story), context=40, windows=2,
    )  # fmt: skip


def trained(network):
    """Random weights everywhere: zero ones would hide what is mixed up."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
    return network


def member_of(ensemble, kind, member):
    """The same network as one of the members, on its own."""
    alone = kind(ensemble.config)
    state = ensemble.members[member].state_dict()
    alone.load_state_dict({k: v for k, v in state.items() if not k.startswith("others.")})
    return alone


def test_images_are_denoised_by_the_mean_of_the_members():
    config = DiTConfig(
        image_size=8, channels=1, patch_size=4, width=8, depth=3, heads=2, num_classes=3
    )
    network = trained(EnsembleDiT(config, 3)).double()
    blocks = BlocksConfig(1)
    z, sigma = torch.randn(5, 1, 8, 8).double(), torch.linspace(0.1, 50, 5).double()
    labels = torch.tensor([0, 1, 2, 0, 1])

    def denoised(network, scale):
        model = DiffusionBlocks(network.double(), blocks)
        return model(z, sigma, block=0, labels=labels, guidance_scale=scale)

    for scale in (1.0, 2.0):
        found = [denoised(member_of(network, DiT, i), scale) for i in range(3)]
        mean = torch.stack(found).mean(0)
        torch.testing.assert_close(denoised(network, scale), mean, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(found[0], found[1])


def test_masked_tokens_have_the_normalised_geometric_mean_of_the_members():
    config = MaskedLMConfig(vocab_size=7, context=6, width=8, depth=3, heads=2)
    network = trained(EnsembleMaskedLM(config, 3)).double()
    tokens = torch.tensor([[0, 3, MASKED, 6, MASKED, 1]])
    t = torch.tensor([0.4]).double()

    def log_probabilities(network):
        model = DiffusionBlocks(network.double(), BlocksConfig(1, schedule=MaskSchedule()))
        return model.logits(tokens, t, block=0).log_softmax(-1)[:, [2, 4]]

    found = [log_probabilities(member_of(network, MaskedLM, i)) for i in range(3)]
    expected = torch.stack(found).mean(0).log_softmax(-1)
    torch.testing.assert_close(log_probabilities(network), expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("kind", ["dit", "masked"])
def test_a_step_changes_its_member_alone(kind, masked):
    trainer = (DIT if kind == "dit" else masked).trainer()
    network = trainer.network
    for step in range(4):
        before = [[p.detach().clone() for p in network.parameters_of(i)] for i in range(3)]
        trainer.step(step)
        for member in range(3):
            after = network.parameters_of(member)
            moved = any(not torch.equal(a, b) for a, b in zip(before[member], after, strict=True))
            assert moved == (member == step % 3)
    ids = [id(p) for i in range(3) for p in network.parameters_of(i)]
    assert sorted(ids) == sorted(map(id, network.parameters()))


@pytest.mark.parametrize("kind", ["dit", "masked"])
def test_a_run_counts_the_layers_of_a_member_and_the_state_of_one(kind, masked):
    run = DIT if kind == "dit" else masked
    record = train(run).record
    assert record["layer_evaluations"] == run.steps * run.depth // 3
    # Of each member parameters and two moments, and of one its gradients: 3 * 3 + 1 for 4.
    assert record["process_mib"] == pytest.approx(10 / 4 * record["state_mib"], rel=0.01)
    small = {f.name: getattr(run, f.name) for f in dataclasses.fields(run) if f.name != "members"}
    (plain,) = (base for base in type(run).__mro__ if base.__name__ in ("DiTRun", "MaskedLMRun"))
    alone = train(plain(**small | {"depth": 1})).record
    assert record["activations_mib"] == pytest.approx(alone["activations_mib"])
    if kind == "dit":
        per_image = alone["layer_evaluations_per_image"]
        assert record["layer_evaluations_per_image"] == 3 * per_image


def test_what_is_no_ensemble_is_refused():
    for change in ({"members": 1}, {"members": 2}, {"end_to_end": False}):
        with pytest.raises(ValueError, match="2 or more members that divide the layers"):
            dataclasses.replace(DIT, **change)
    with pytest.raises(ValueError, match="ema and sharding must be left out"):
        dataclasses.replace(DIT, ema=0.9)
