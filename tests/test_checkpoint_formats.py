"""Checkpoints of format 1: networks that have options of format 2 as what they were."""

import json

import pytest
import safetensors.torch as safetensors
import torch

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import load_model, save_model
from dblocks.models import DiT, DiTConfig
from dblocks.scale import load_block
from lm_tools import PUBLISHED, lm_of, recurrent_of, tokens_of
from tools import DEVICE, batch, normal, randomized, vit


def networks():
    """Each network with the fields that format 1 lacks, what it is called with, and a state."""
    text = {"tokens": tokens_of()}, normal(2, 8, 16)
    plain = lm_of(**PUBLISHED, conditioning="none", tied=False)
    dit = DiT(DiTConfig(image_size=8, width=16, heads=2, depth=3, num_classes=5)).to(DEVICE)
    return {
        "causal_lm": (lm_of(**PUBLISHED), tuple(PUBLISHED), *text),
        "causal_lm without conditioning": (plain, tuple(PUBLISHED), *text),
        "recurrent": (recurrent_of(**PUBLISHED), tuple(PUBLISHED), *text),
        "vit": (
            vit(head="learned", noise_scale=None), ("head", "noise_scale"),
            {"images": batch(2)["images"]}, normal(2, 24),
        ),
        "dit": (dit, (), {"labels": batch(2)["labels"]}, normal(2, 4, 8, 8)),
    }  # fmt: skip


def in_format_1(folder, fields, weighting="none"):
    """Writes a config.json as format 1 had it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config["format"] == 2
    del config["sha256"]
    config["format"] = 1
    for field in fields:
        del config["model_config"][field]
    if config["blocks_config"] is not None:
        assert config["blocks_config"].pop("top_share") == 0.0
        config["blocks_config"]["weighting"] = weighting
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("shared", ["train", "private"])
@pytest.mark.parametrize("weighting", ["batch_mean", "none", "auto"])
def test_blocks_of_format_1_are_what_they_were(tmp_path, name, shared, weighting):
    network, fields, cond, z = networks()[name]
    meant = weighting
    if weighting == "auto" and network.target.loss_kind == "cross_entropy":
        meant = "batch_mean"
    config = BlocksConfig(2, shared=shared, top_share=0.0, weighting=meant)
    model = DiffusionBlocks(network, config)
    randomized(model)
    save_model(tmp_path, model)
    in_format_1(tmp_path, fields, weighting)
    loaded = load_model(tmp_path).to(DEVICE)
    assert loaded.config == model.config
    assert loaded.base_model.config == network.config
    for block, sigma in ((0, 80.0), (0, 2.0), (1, 0.01)):
        one, two = (m.logits(z, sigma, block=block, **cond) for m in (model, loaded))
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["causal_lm", "recurrent", "vit"])
def test_plain_networks_of_format_1(tmp_path, name):
    network, fields, cond, _ = networks()[name]
    save_model(tmp_path, randomized(network))
    in_format_1(tmp_path, fields)
    loaded = load_model(tmp_path).to(DEVICE)
    assert loaded.config == network.config
    cond = {**cond, "normals": normal(2, 8, 16)} if name == "recurrent" else cond
    assert torch.equal(loaded(**cond), network(**cond))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_config": None}, "ViTConfig must be a JSON object, got None"),
        ({"model_config": [1]}, r"ViTConfig must be a JSON object, got \[1\]"),
        ({"blocks_config": 3}, "BlocksConfig must be a JSON object, got 3"),
        ({"format": "1"}, "must have format 2 or 1 .* got '1'"),
    ],
)
def test_a_config_that_is_not_understood_is_an_error(tmp_path, change, message):
    network, fields, *_ = networks()["vit"]
    save_model(tmp_path, DiffusionBlocks(network, BlocksConfig(2, top_share=0.0)))
    in_format_1(tmp_path, fields)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
        load_model(tmp_path)


def with_old_names(path, old, new):
    """Writes a file of tensors with modules named as before."""
    tensors = safetensors.load_file(path)
    assert any(f"{new}." in name for name in tensors)
    tensors = {name.replace(f"{new}.", f"{old}."): tensor for name, tensor in tensors.items()}
    safetensors.save_file(tensors, path)


@pytest.mark.parametrize("name", ["causal_lm without conditioning", "dit"])
@pytest.mark.parametrize("shared", ["train", "private"])
def test_output_heads_of_0_1_had_another_name(tmp_path, name, shared):
    network, *_ = networks()[name]
    model = randomized(DiffusionBlocks(network, BlocksConfig(2, shared=shared)))
    save_model(tmp_path, model)
    with_old_names(tmp_path / "model.safetensors", "readout", "output_head")
    loaded = load_model(tmp_path)
    assert_equal_state(loaded, model)
    assert_equal_state(load_block(tmp_path, 1), model.block(1))


def assert_equal_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    assert all(tensor.equal(second[name].cpu()) for name, tensor in first.items())
