import json
import sys

import pytest
import torch

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import load_model, save_model
from dblocks.models.vit import ViT, ViTConfig, classify

SIZES = {"image_size": 8, "channels": 1, "patch_size": 4, "width": 12, "depth": 3, "heads": 2}
CONFIG = BlocksConfig(num_blocks=3, layers_per_block=(1, 1, 1), overlap=0.1)


def make_vit(**kind):
    torch.manual_seed(0)
    vit = ViT(ViTConfig(**SIZES, **kind))
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # zero gates would hide the layers
    return vit


def test_blocks_come_back_with_bitwise_equal_logits(tmp_path):
    vit, images = make_vit(), torch.randn(5, 1, 8, 8)
    save_model(tmp_path / "new" / "folder", vit, CONFIG)
    loaded, config = load_model(tmp_path / "new" / "folder")
    assert config == CONFIG
    assert loaded.config == vit.config
    first, again = (
        classify(DiffusionBlocks(m, CONFIG), images, generator=torch.Generator().manual_seed(1))
        for m in (vit, loaded)
    )
    assert torch.equal(first, again)


def test_a_plain_network_comes_back_without_blocks(tmp_path):
    vit, images = make_vit(conditioning="none"), torch.randn(5, 1, 8, 8)
    save_model(tmp_path, vit, None)
    loaded, config = load_model(tmp_path)
    assert config is None
    assert torch.equal(vit(images), loaded(images))


def test_nothing_is_pickled(tmp_path):
    save_model(tmp_path, make_vit(), CONFIG)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_an_unknown_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(colour="red"), r"unknown keys \['colour'\]"),
        (lambda c: c.pop("model"), r"lacks the keys \['model'\]"),
        (lambda c: c.update(format=99), "must be of format 1"),
        (lambda c: c["blocks_config"].update(gamma=1), "BlocksConfig has no field gamma"),
        (lambda c: c["model_config"].update(dim=1), "ViTConfig has no field dim"),
    ],
)
def test_a_config_that_is_not_understood_is_an_error(tmp_path, change, message):
    save_model(tmp_path, make_vit(), CONFIG)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_private_copies_are_refused(tmp_path):
    with pytest.raises(ValueError, match="shared='private'"):
        save_model(tmp_path, make_vit(), BlocksConfig(num_blocks=3, shared="private"))


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"safetensors.*dblocks\[train\]"):
        save_model(tmp_path, make_vit(), CONFIG)
