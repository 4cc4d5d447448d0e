"""What is planned without data, beside what a real step on the CPU saves and holds."""

import pytest
import torch
from convert_tools import batch_of, blocks_of, model_of
from torch import nn

from dblocks.blocks import DiffusionBlocks, make_optimizers
from dblocks.blocks.memory import SavedActivations
from dblocks.models import (
    CausalLM,
    CausalLMConfig,
    DiT,
    DiTConfig,
    MaskedLM,
    MaskedLMConfig,
    RecurrentConfig,
    RecurrentLM,
    ViT,
    ViTConfig,
)
from dblocks.scale.planner.costs import Costs
from dblocks.scale.planner.step import checkpointed
from dblocks.scale.planner.subject import block_loss, of_model, of_network, without_data
from dblocks.scale.planner.trace import saved_bytes, trace

SIZES = {"width": 16, "depth": 3, "heads": 2}
TEXT = {"vocab_size": 13, "context": 8, "width": 16, "heads": 2}
NETWORKS = {
    "vit": (ViT, ViTConfig(image_size=8, channels=1, **SIZES)),
    "dit": (DiT, DiTConfig(image_size=8, channels=1, num_classes=3, **SIZES)),
    "causal-lm": (CausalLM, CausalLMConfig(depth=3, **TEXT)),
    "doubled": (
        CausalLM,
        CausalLMConfig(depth=3, rows="doubled", head="learned", conditioning="dit", **TEXT),
    ),
    "masked-lm": (MaskedLM, MaskedLMConfig(depth=3, **TEXT)),
    "recurrent": (
        RecurrentLM,
        RecurrentConfig(mean_recurrence=4, backprop_depth=2, rows="doubled", **TEXT),
    ),
}
CONVERTED = ("llama", "qwen3", "vit", "dit")
SAMPLES = 3


def counted(dm, batch, block):
    """Bytes of a real step: parameters, gradients, optimizer, saved activations."""
    optimizers = make_optimizers(dm, lambda p: torch.optim.AdamW(p, fused=True))
    held = [*dm.block_parameters(block), *dm.shared_parameters()]
    saved = saved_bytes(lambda: block_loss(dm, batch, block), dm.parameters())
    dm.loss(batch, block).loss.backward()
    gradients = sum(p.grad.nbytes for p in held if p.grad is not None)
    for optimizer in optimizers.of_block(block):
        optimizer.step()
    states = [o.state[p] for o in optimizers.of_block(block) for p in o.state]
    state = sum(x.nbytes for s in states for x in s.values())
    return sum(p.nbytes for p in held), gradients, state, saved


def planned(costs, layers):
    cost = costs.block(*layers)
    return cost.held.parameters, cost.held.trained, cost.held.optimizer, cost.activations


def check(costs, dm, batch):
    for block, layers in enumerate(dm.layer_ranges):
        got, real = planned(costs, layers), counted(dm, batch, block)
        # Asked for are 3 %. A gradient is absent where nothing reaches a parameter.
        assert got == pytest.approx(real, rel=0.03)
        assert got[0] == real[0]
        assert got[3] == real[3]


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_of_the_networks(name):
    kind, config = NETWORKS[name]
    subject = of_network(config)
    torch.manual_seed(0)
    dm = DiffusionBlocks(kind(config), subject.config(2, "train"))
    check(Costs(subject, SAMPLES), dm, subject.batch(SAMPLES))


@pytest.mark.parametrize("shared", ["train", "frozen", "private"])
def test_shared_parameters(shared):
    kind, config = NETWORKS["causal-lm"]
    subject = of_network(config)
    torch.manual_seed(0)
    dm = DiffusionBlocks(kind(config), subject.config(3, shared))
    costs = Costs(subject, SAMPLES, shared=shared)
    check(costs, dm, subject.batch(SAMPLES))
    own = sum(p.nbytes for p in dm.block_parameters(1))
    assert costs.travels(*dm.layer_ranges[1]).parameters == own


@pytest.mark.parametrize("kind", CONVERTED)
def test_blocks_of_converted_models(kind, tmp_path):
    model = model_of(kind)
    config = model if kind == "dit" else model.config
    (config.save_config if kind == "dit" else config.save_pretrained)(tmp_path)
    batch = batch_of(kind, SAMPLES)
    subject = of_model(str(tmp_path), length=8 if "tokens" in batch else None)
    assert {key: x.shape for key, x in subject.batch(SAMPLES).items()} == {
        key: x.shape for key, x in batch.items()
    }
    costs = Costs(subject, SAMPLES)
    check(costs, blocks_of(kind), batch)
    if kind != "dit":
        network = blocks_of(kind).base_model
        real = saved_bytes(lambda: network.plain_loss(batch), network.model.parameters())
        assert costs.end_to_end.activations == real
        assert costs.end_to_end.held.parameters == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("name", ["vit", "causal-lm", "recurrent"])
def test_end_to_end(name):
    kind, config = NETWORKS[name]
    subject = of_network(config)
    model, _, loss = subject.whole()
    assert isinstance(model, kind)
    batch = subject.batch(SAMPLES)
    cost = Costs(subject, SAMPLES).end_to_end
    assert cost.activations == saved_bytes(lambda: loss(batch), model.parameters())
    loss(batch).backward()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    state = sum(x.nbytes for s in optimizer.state.values() for x in s.values())
    assert cost.held.optimizer == pytest.approx(state, rel=0.03)


def test_autocast_is_counted():
    kind, config = NETWORKS["causal-lm"]
    subject = of_network(config)
    torch.manual_seed(0)
    dm, batch = DiffusionBlocks(kind(config), subject.config(1, "train")), subject.batch(2)
    with torch.autocast("cpu", torch.bfloat16):
        real = saved_bytes(lambda: block_loss(dm, batch), dm.parameters())
    assert Costs(subject, 2, bf16=True).block(0, 3).activations == real


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def test_checkpointing_keeps_the_inputs_of_layers():
    layers = [nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(3)]
    model = nn.Sequential(*layers)
    x = torch.randn(5, 4, requires_grad=True)
    found = trace(lambda: model(x).sum(), model, layers)
    assert [part.inputs for part in found.layers] == [5 * 4 * 4] * 3
    assert [part.kept for part in found.layers] == [5 * 4 * 4] * 3
    assert found.saved(0, 3) == saved_bytes(lambda: model(x).sum(), model.parameters())
    outside = nn.Sequential(*map(Checkpointed, layers))
    planned = sum(checkpointed(part).saved for part in found.layers)
    assert planned == saved_bytes(lambda: outside(x).sum(), model.parameters())


def test_the_count_is_that_of_saved_activations():
    kind, config = NETWORKS["vit"]
    subject = of_network(config)
    dm, batch = DiffusionBlocks(kind(config), subject.config(1, "train")), subject.batch(2)
    with SavedActivations(dm.parameters()) as saved:
        loss = block_loss(dm, batch)
    assert saved.bytes == saved_bytes(lambda: block_loss(dm, batch), dm.parameters())
    assert loss.requires_grad


def test_layers_that_are_alike_run_once_and_count_each():
    kind, config = NETWORKS["doubled"]
    subject = of_network(config)
    dm, batch = DiffusionBlocks(kind(config), subject.config(1, "train")), subject.batch(2)
    layers = list(dm.base_model.layers)
    every = trace(lambda: block_loss(dm, batch), dm, layers)
    with without_data():
        fake = DiffusionBlocks(kind(config), subject.config(1, "train"))
        given = subject.batch(2)
        once = trace(lambda: block_loss(fake, given), fake, list(fake.base_model.layers), once=True)
    for got, full in zip(once.parts(0, 3), every.parts(0, 3), strict=True):
        assert (got.saved, got.gradients, got.flops) == (full.saved, full.gradients, full.flops)
    assert once.last[0].saved < once.layers[0].saved
    assert "forward" not in vars(layers[0])


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("vit", {"images": torch.zeros(2, 1, 8, 8), "labels": torch.tensor([0, 99])}),
        ("causal-lm", {"tokens": torch.tensor([[0, 99]])}),
        ("masked-lm", {"tokens": torch.tensor([[0, 99]])}),
        ("dit", {"images": torch.zeros(2, 1, 8, 8), "labels": torch.tensor([0, 99])}),
    ],
)
def test_checks_look_at_real_values_and_not_at_fake_ones(name, batch):
    kind, config = NETWORKS[name]
    target = kind(config).target
    with pytest.raises(ValueError, match=r"must be in 0\.\..*99"):
        target.check(batch)
    with without_data():
        assert target.check({key: torch.empty_like(x) for key, x in batch.items()})
