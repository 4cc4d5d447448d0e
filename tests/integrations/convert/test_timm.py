"""Vision transformers of timm with rotary patches: DINOv3, EVA-02, and rotations of each layer."""

import copy

import pytest
import torch
import torch.nn.functional as nnf
from convert_tools import CLASSES, check_family, shaken
from hub_tools import library

from dblocks import BlocksConfig
from dblocks.integrations.convert import convert
from tools import seeded

library("timm")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": CLASSES}
SIZES |= {"embed_dim": 32, "depth": 4, "num_heads": 2, "head_init_scale": 1.0}
ROTARY = {"use_rot_pos_emb": True, "rope_rotate_half": True, "use_fc_norm": False}
KINDS = {
    "dinov3": {**ROTARY, "rope_type": "dinov3", "rope_temperature": 100.0, "init_values": 0.3,
               "num_reg_tokens": 4, "use_abs_pos_emb": False, "dynamic_img_size": True,
               "qkv_bias": False, "global_pool": "token"},
    "dinov3 of means": {**ROTARY, "rope_type": "dinov3", "init_values": 0.3, "num_reg_tokens": 2,
                        "use_abs_pos_emb": False, "dynamic_img_size": True},
    "eva02": {"use_rot_pos_emb": True, "ref_feat_shape": 3, "swiglu_mlp": True, "scale_mlp": True},
    "each layer its own": {"use_rot_pos_emb": True, "rope_type": "mixed", "global_pool": "token",
                           "init_values": 0.3},
    "eva": {"init_values": 0.3},
}  # fmt: skip
IMAGES = torch.randn(2, 1, 8, 8, generator=seeded(3))
BATCH = {"images": IMAGES, "labels": torch.arange(2) % CLASSES}


def model_of(kind, **options):
    from timm.models.eva import Eva

    torch.manual_seed(0)
    model = Eva(**{**SIZES, **KINDS[kind], **options}).eval()
    generator = seeded(1)
    with torch.no_grad():  # so that nothing is zero or one by chance
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def rows_logits(blocks, images):
    """What all layers say without noise or modulation."""
    network, level = blocks.base_model, blocks.config.schedule.level(torch.ones(len(images)))
    condition = network.embed_condition({"images": images})
    z = torch.zeros(len(images), network.width)
    hidden = network.run_layers(network.layers, z, level, condition)
    return network.family.head(network.model, network.family.pool(network.model, hidden.x))


@pytest.mark.parametrize("kind", KINDS)
def test_families(kind, tmp_path):
    model = model_of(kind)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        own = model(IMAGES)
        ours = rows_logits(convert(copy.deepcopy(model), BlocksConfig(2), task="classes"), IMAGES)
        assert (ours - own).abs().max() < 2e-5 * own.abs().max()
        # Without the rotations it is another one.
        if kind != "eva":
            still = copy.deepcopy(model)
            still.rope.get_embed = lambda *_, **__: None
            assert (still(IMAGES) - own).abs().max() > 1e-3 * own.abs().max()
    check_family(model, fresh, BATCH, lambda called: called(IMAGES), tmp_path, task="classes")


@pytest.mark.parametrize("size", [(8, 12), (4, 4)])
def test_images_of_other_sizes(size):
    model = model_of("dinov3")
    images = torch.randn(2, 1, *size, generator=seeded(4))
    with torch.no_grad():
        own = model(images)
        ours = rows_logits(convert(model, BlocksConfig(2), task="classes"), images)
    assert (ours - own).abs().max() < 2e-5 * own.abs().max()


@pytest.mark.parametrize("kind", ["dinov3", "each layer its own"])
def test_gradients(kind):
    model = model_of(kind)
    names, parameters = zip(*model.named_parameters(), strict=True)
    cost = nnf.cross_entropy(model(IMAGES), BATCH["labels"])
    expected = torch.autograd.grad(cost, parameters)
    blocks = convert(model, BlocksConfig(2), task="classes")
    cost = nnf.cross_entropy(rows_logits(blocks, IMAGES), BATCH["labels"])
    found = torch.autograd.grad(cost, parameters)
    for name, got, right in zip(names, found, expected, strict=True):
        assert (got - right).abs().max() <= 2e-4 * right.abs().max() + 1e-7, name


def test_registers_are_rows_that_are_not_rotated():
    blocks = shaken(convert(model_of("dinov3"), BlocksConfig(2), task="classes"))
    condition = blocks.base_model.embed_condition(BATCH)
    assert condition.rows.shape == (2, 1 + 4 + 16, 32)
    assert condition.attention["rope"].shape[-2] == 16
    assert blocks.loss(BATCH, 1, generator=seeded()).loss.isfinite()


def test_patches_that_are_left_out_are_refused():
    model = model_of("dinov3", patch_drop_rate=0.5)
    with pytest.raises(ValueError, match=r"patch_drop_rate must be 0 .* rotations"):
        convert(model, BlocksConfig(2), task="classes")


def test_a_model_without_classes_is_refused():
    with pytest.raises(ValueError, match="create it with num_classes="):
        convert(model_of("dinov3", num_classes=0), BlocksConfig(2), task="classes")


@pytest.mark.parametrize("kind", ["eva", "dinov3"])
def test_a_model_that_does_not_pool_is_refused(kind):
    with pytest.raises(ValueError, match=r"pool its rows into one, got global_pool=''.*reset_"):
        convert(model_of(kind, global_pool=""), BlocksConfig(2), task="classes")
