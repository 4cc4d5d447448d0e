import copy

import pytest
import torch
from dit_tools import batch_of, blocks_of, dit_of, some_labels
from hub_tools import library
from torch.optim.swa_utils import AveragedModel

from dblocks import functional as F
from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.checkpoint import load_model, save_model
from dblocks.models.dit import generate_images
from tools import DEVICE, seeded


def striped(n=32, seed=0):
    """Two classes: the upper or the lower half is bright."""
    labels = torch.arange(n) % 2
    images = -0.7 + 0.1 * torch.randn(n, 1, 4, 4, generator=seeded(seed))
    for i, label in enumerate(labels.tolist()):
        images[i, :, 2 * label : 2 * label + 2] += 1.4
    return {"images": images.to(DEVICE), "labels": labels.to(DEVICE)}


def test_blocks_learn_to_draw_classes():
    dit = dit_of(image_size=4, channels=1, num_classes=2, depth=3, gate_init=1.0)
    model = DiffusionBlocks(dit, BlocksConfig(3))
    optimizers = make_optimizers(model, lambda p: torch.optim.AdamW(p, lr=5e-3))
    generator = seeded()
    for step in range(240):
        train_step(model, striped(seed=step), optimizers, generator=generator, clip_grad_norm=1.0)
    labels = torch.arange(40, device=DEVICE) % 2
    images = generate_images(model, labels, num_steps=12, generator=seeded(1))
    halves = images.mean(dim=(1, 3)).view(40, 2, 2).mean(2)
    assert (halves.argmax(1) == labels).float().mean() > 0.9  # chance is 0.5
    bright = halves.gather(1, labels[:, None])
    assert (bright - 0.7).abs().mean() < 0.35


def test_starts_as_published():
    dit = dit_of()
    assert not dit.output_head.weight.any()
    assert not any(layer.modulation.linear.weight.any() for layer in dit.layers)
    assert 0.015 < dit.label_embedding.weight.std() < 0.025
    model, data = DiffusionBlocks(dit, BlocksConfig(3)), batch_of()
    z = data["images"]
    sigma = torch.full((4,), 0.7, device=DEVICE)
    level = model.config.schedule.level(sigma)
    c_skip = level.c_skip.view(-1, 1, 1, 1)
    torch.testing.assert_close(model(z, sigma, labels=data["labels"]), c_skip * z)


def test_the_loss_is_that_of_the_denoised():
    model, data = blocks_of(), batch_of()
    draw = model.draw(data, 1, generator=seeded())
    loss = model.loss_at(data, 1, draw)
    level = model.config.schedule.level(draw.sigma)
    z = F.noise_inject(data["images"], draw.sigma, draw.seed).z
    network, layers = model.parts(1)
    condition = network.embed_condition(data, draw.drop)
    hidden = network.run_layers(layers, level.c_in.view(-1, 1, 1, 1) * z, level, condition)
    denoised = network.target.denoise(network.features(hidden), z, level)
    mse = (denoised - data["images"]).square().mean(dim=(1, 2, 3))
    expected = mse * model.config.schedule.loss_weight(draw.sigma)
    torch.testing.assert_close(loss.losses, expected, rtol=1e-3, atol=1e-4)


def test_labels_are_dropped_as_often_as_asked():
    model = blocks_of(label_drop=0.5)
    drops = torch.stack([model.draw(batch_of(64), 0, generator=seeded(s)).drop for s in range(9)])
    assert 0.4 < drops.float().mean() < 0.6
    labels = some_labels(2)
    drop = torch.tensor([True, False], device=DEVICE)
    rows = model.base_model.embed_condition({"labels": labels}, drop)
    table = model.base_model.label_embedding.weight
    assert torch.equal(rows, table[torch.tensor([5, 1], device=DEVICE)])


def test_without_classes_and_without_dropping():
    plain = blocks_of(num_classes=0)
    assert plain.base_model.label_embedding is None
    assert plain.draw({"images": batch_of()["images"]}, 0).drop is None
    images = generate_images(plain, 4, num_steps=3, generator=seeded())
    assert images.shape == (4, 3, 4, 6)
    assert plain.loss({"images": images}, 2).loss.isfinite()
    undropped = blocks_of(label_drop=0.0)
    assert undropped.base_model.label_embedding.num_embeddings == 5
    labels = some_labels()
    default, one = (
        generate_images(undropped, labels, num_steps=3, generator=seeded(), **g)
        for g in ({}, {"guidance_scale": 1.0})
    )
    assert torch.equal(default, one)
    for model, given in ((plain, 4), (undropped, labels)):
        with pytest.raises(ValueError, match="guidance needs a model trained without some labels"):
            generate_images(model, given, num_steps=3, guidance_scale=2.0)


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_saved_and_loaded_it_draws_the_same(tmp_path, num_blocks):
    library("safetensors")
    model, labels = blocks_of(num_blocks), some_labels()
    save_model(tmp_path, model)
    loaded = load_model(tmp_path).to(DEVICE)
    assert loaded.base_model.config == model.base_model.config
    for m in (loaded, copy.deepcopy(model), AveragedModel(model)):
        assert torch.equal(
            generate_images(m, labels, num_steps=4, generator=seeded()),
            generate_images(model, labels, num_steps=4, generator=seeded()),
        )
    generate_images(model, labels, num_steps=9)
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert not [name for name in model.state_dict() if "positions" in name]


def test_the_loss_compiles_as_one_graph():
    model, data = blocks_of(), batch_of()
    draw = model.draw(data, 1, generator=seeded())
    compiled = torch.compile(model.loss_at, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(data, 1, draw).loss, model.loss_at(data, 1, draw).loss)


def test_under_autocast_the_loss_is_float32():
    model, data = blocks_of(), batch_of()
    whole = model.loss(data, 1, generator=seeded()).losses
    with torch.autocast(DEVICE.type, torch.bfloat16):
        half = model.loss(data, 1, generator=seeded()).losses
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shared", ["train", "private"])
def test_one_compiled_loss_serves_all_blocks(shared):
    torch.compiler.reset()  # other tests compile the same function, and there is a limit
    # From the second number on, the compiler takes the block for a symbol.
    model, data = DiffusionBlocks(dit_of(), BlocksConfig(3, shared=shared)), batch_of()
    compiled = torch.compile(model.loss_at, fullgraph=True, backend="aot_eager")
    for block in range(model.config.num_blocks):
        draw = model.draw(data, block, generator=seeded())
        expected = model.loss_at(data, block, draw).loss
        torch.testing.assert_close(compiled(data, block, draw).loss, expected)
