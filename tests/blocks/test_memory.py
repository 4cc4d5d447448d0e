import pytest
import torch
from torch import nn

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.blocks.memory import SavedActivations, state_bytes
from dblocks.models import ViT, ViTConfig


def test_each_storage_counts_once_and_parameters_do_not():
    x = torch.randn(8, 4, requires_grad=True)
    weight = nn.Parameter(torch.randn(4, 4))
    with SavedActivations([weight]) as saved:
        y = (x @ weight).sin() + x[:2].cos().sum() + x.view(-1).exp().sum()
    assert y.requires_grad
    # x (for three ops, once), x @ weight (for sin), and exp's result.
    assert saved.bytes == 3 * 8 * 4 * 4
    with SavedActivations() as saved:
        y = x @ weight
    assert saved.bytes == 8 * 4 * 4 + 4 * 4 * 4


def test_only_what_is_saved_within_modules_counts():
    inner, outer = nn.Sigmoid(), nn.Sigmoid()
    x = torch.randn(8, 4, requires_grad=True)
    with SavedActivations(within=[inner]) as saved:
        y = outer(inner(x))
    assert y.requires_grad
    assert saved.bytes == x.nbytes
    assert not inner._forward_hooks
    assert not inner._forward_pre_hooks


@pytest.mark.parametrize("num_blocks", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", ["dit", "official"])
def test_a_block_step_saves_its_share_of_the_end_to_end_step(num_blocks, kind):
    config = ViTConfig(image_size=8, patch_size=2, width=48, depth=12, heads=3, conditioning=kind)
    vit = ViT(config)
    batch = {"images": torch.randn(4, 3, 8, 8), "labels": torch.arange(4)}
    with SavedActivations(vit.parameters(), within=vit.layers) as whole:
        logits = vit(batch["images"])
    model = DiffusionBlocks(vit, BlocksConfig(num_blocks))
    for b in range(num_blocks):
        with SavedActivations(vit.parameters(), within=vit.layers) as saved:
            loss = model.loss(batch, b).loss
        assert loss.requires_grad
        assert 0 < saved.bytes <= 1.15 / num_blocks * whole.bytes
    assert logits.requires_grad


def test_state_bytes():
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    optimizer = torch.optim.AdamW(layers.parameters())
    assert state_bytes(layers.parameters()) == 2 * 20 * 4
    layers[0](torch.ones(4)).sum().backward()
    assert state_bytes(layers.parameters(), optimizer) == 3 * 20 * 4
    optimizer.step()
    steps = 2 * 4  # AdamW's count of steps, of weight and of bias
    assert state_bytes(layers.parameters(), optimizer) == (3 + 2) * 20 * 4 + steps
    assert state_bytes(layers[1].parameters(), optimizer) == 20 * 4
