import dataclasses
import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import load_model, prepare, save_model
from dblocks.models.vit import ViT, ViTConfig, classify

SIZES = {"image_size": 8, "channels": 1, "patch_size": 4, "width": 12, "depth": 3, "heads": 2}
CONFIG = BlocksConfig(num_blocks=3, layers_per_block=(1, 1, 1), overlap=0.1)


def make_vit(**kind):
    torch.manual_seed(0)
    vit = ViT(ViTConfig(**SIZES, **kind))
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # zero gates would hide the layers
    return vit


def make_blocks(shared="train", **kind):
    blocks = DiffusionBlocks(make_vit(**kind), dataclasses.replace(CONFIG, shared=shared))
    for number, parameter in enumerate(blocks.copies.parameters()):
        torch.nn.init.normal_(parameter, std=0.1 + number / 1000)
    return blocks


@pytest.mark.parametrize("shared", ["train", "frozen", "private"])
def test_blocks_come_back_with_bitwise_equal_logits(tmp_path, shared):
    blocks, images = make_blocks(shared), torch.randn(5, 1, 8, 8)
    save_model(tmp_path / "new" / "folder", blocks)
    loaded = load_model(tmp_path / "new" / "folder")
    assert loaded.config == blocks.config
    assert loaded.base_model.config == blocks.base_model.config
    first, again = (
        classify(m, images, generator=torch.Generator().manual_seed(1)) for m in (blocks, loaded)
    )
    assert torch.equal(first, again)
    assert len(loaded.copies) == (2 if shared == "private" else 0)


def test_weights_are_named_as_in_the_network_itself(tmp_path):
    save_model(tmp_path, make_blocks("private"))
    names = set(load_file(tmp_path / "model.safetensors"))
    assert set(make_vit().state_dict()) == {n for n in names if not n.startswith("copies.")}
    assert "copies.1.positions" in names


def test_a_plain_network_comes_back_without_blocks(tmp_path):
    vit, images = make_vit(conditioning="none"), torch.randn(5, 1, 8, 8)
    save_model(tmp_path, vit)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, ViT)
    assert torch.equal(vit(images), loaded(images))


def test_nothing_is_pickled(tmp_path):
    save_model(tmp_path, make_blocks())
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_an_unknown_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(colour="red"), r"unknown keys \['colour'\]"),
        (lambda c: c.pop("model"), r"lacks the keys \['model'\]"),
        (lambda c: c.update(format=99), "must have format 2 or 1 and a model of .*, got 99"),
        (lambda c: c["blocks_config"].update(gamma=1), "BlocksConfig has no field gamma"),
        (lambda c: c["model_config"].update(dim=1), "ViTConfig has no field dim"),
        (lambda c: c["model_config"].update(width="64"), "width must be int, got '64'"),
        (lambda c: c["model_config"].update(width=True), "width must be int, got True"),
        (lambda c: c["model_config"].update(image_size={}), "image_size must be int or"),
        (lambda c: c["model_config"].update(conditioning="x"), "conditioning must be one of"),
        (lambda c: c["model_config"].update(heads=5), "5"),
        (lambda c: c.update(model_config=None), "ViTConfig must be a JSON object, got None"),
        (lambda c: c.update(blocks_config=3), "BlocksConfig must be a JSON object, got 3"),
        (lambda c: c["blocks_config"].pop("num_blocks"), "lacks the field num_blocks"),
        (lambda c: c["blocks_config"].update(schedule="x"), "schedule must be NoiseSchedule"),
        (lambda c: c["blocks_config"].update(schedule={"type": []}), "config type must be"),
        (lambda c: c["blocks_config"]["schedule"].update(p_std=None), "p_std must be float"),
        (lambda c: c["blocks_config"].update(layers_per_block=[1, 1, "1"]), "layers_per_block"),
        (lambda c: c["blocks_config"].update(layers_per_block=[1, 1, 2]), "layers_per_block must"),
    ],
)
def test_a_config_that_is_not_understood_is_an_error(tmp_path, change, message):
    save_model(tmp_path, make_blocks())
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["sha256"]
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("3", "must be a JSON object, got 3"), ("[]", "must be a JSON object"), ("{", "Expecting")],
)
def test_a_config_that_is_no_json_object_is_an_error(tmp_path, text, message):
    save_model(tmp_path, make_blocks())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
        load_model(tmp_path)


def lose_a_tensor(path):
    tensors = load_file(path)
    del tensors["classifier.weight"]
    save_file(tensors, path)


def of_another_depth(path):
    deep = ViT(ViTConfig(**{**SIZES, "depth": 60}))
    save_file(deep.state_dict(), path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), ""),
        (lambda path: path.write_bytes(b""), ""),
        (lambda path: path.unlink(), ""),
        (lose_a_tensor, r"classifier\.weight"),
        (of_another_depth, r"layers\.10\."),
    ],
)
def test_broken_weights_are_an_error_of_one_line(tmp_path, spoil, message):
    save_model(tmp_path, make_blocks())
    spoil(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors cannot be used: .*{message}") as e:
        load_model(tmp_path)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 600


def test_a_path_may_be_a_string(tmp_path):
    prepare(str(tmp_path))
    save_model(str(tmp_path), make_blocks())
    assert load_model(str(tmp_path)).config == CONFIG


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a folder to write files in"):
        prepare(tmp_path / name)


def test_a_save_that_fails_leaves_the_earlier_one_whole(tmp_path, monkeypatch):
    vit = make_vit()
    save_model(tmp_path, vit)

    def write_half(tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", write_half)
    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path, make_blocks(image_drop=0.5))
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = load_model(tmp_path)
    assert isinstance(loaded, ViT)
    assert loaded.config == vit.config


@pytest.mark.parametrize("of", [make_vit, make_blocks, lambda: make_blocks("private")])
def test_a_network_that_could_not_be_loaded_again_is_refused(tmp_path, of):
    model = of()
    save_model(tmp_path, model)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    network = getattr(model, "base_model", model)
    network.layers[0].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"got others as .*layers\.0\.adapter\.bias.* \(2 in all"):
        save_model(tmp_path, model)
    del network.layers[0].adapter
    network.classifier = torch.nn.Linear(8, 3)
    with pytest.raises(ValueError, match=r"got others as classifier\.bias"):
        save_model(tmp_path, model)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", ["train", "private"])
def test_weights_keep_their_dtype(tmp_path, shared, dtype):
    blocks = make_blocks(shared).to(dtype)
    blocks.base_model.layers[0].to(torch.float32)
    save_model(tmp_path, blocks)
    loaded = load_model(tmp_path)
    found, saved = loaded.state_dict(), blocks.state_dict()
    assert {t.dtype for t in saved.values()} == {dtype, torch.float32}
    assert {name: t.dtype for name, t in found.items()} == {n: t.dtype for n, t in saved.items()}
    assert all(torch.equal(found[name], saved[name]) for name in saved)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_numbers_that_are_no_weights_are_refused(tmp_path, dtype):
    save_model(tmp_path, make_blocks())
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"positions": tensors["positions"].to(dtype)}, path)
    with pytest.raises(ValueError, match=rf"positions must be torch.float32, .* got {dtype}"):
        load_model(tmp_path)


def test_weights_get_their_name_before_the_config(tmp_path, monkeypatch):
    names, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (names.append(b.name), replace(a, b)))
    save_model(tmp_path, make_blocks())
    assert names == ["model.safetensors", "config.json"]


def lose_a_copy(path):
    tensors = load_file(path)
    del tensors["copies.1.positions"]
    save_file(tensors, path)


def test_a_missing_copy_is_an_error(tmp_path):
    save_model(tmp_path, make_blocks("private"))
    lose_a_copy(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be used: .*1\.positions"):
        load_model(tmp_path)


def test_copies_beside_a_network_that_has_none_are_an_error(tmp_path):
    save_model(tmp_path, make_vit(conditioning="none"))
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"copies.0.positions": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be used: .*copies\.0"):
        load_model(tmp_path)


def test_an_averaged_network_is_saved_as_it_is(tmp_path):
    blocks = make_blocks()
    save_model(tmp_path, AveragedModel(blocks))
    loaded = load_model(tmp_path)
    assert torch.equal(loaded.base_model.positions, blocks.base_model.positions)


def test_another_model_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"one of \['ViT', .*\] or .* got Linear"):
        save_model(tmp_path / "new", torch.nn.Linear(2, 2))
    assert not (tmp_path / "new").exists()


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"safetensors.*dblocks\[train\]"):
        save_model(tmp_path, make_blocks())


def test_arguments_in_the_order_of_torch_save_are_named(tmp_path):
    with pytest.raises(TypeError, match="takes the folder first"):
        save_model(torch.nn.Linear(1, 1), tmp_path)
