"""Who reads a folder while it is saved to gets the files of one save, the earlier or the new."""

from pathlib import Path

import pytest
import torch
from convert_tools import blocks_of, model_of, shaken
from hub_tools import library
from torch import nn

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import files, load_model, networks, save_model, unchanged
from dblocks.integrations.convert import ConvertedBlocks
from dblocks.models.vit import ViT, ViTConfig
from dblocks.scale import load_block, save_block

library("safetensors")
SIZES = {"image_size": 8, "channels": 1, "patch_size": 4, "heads": 2, "conditioning": "none"}


def vit(width, in_blocks):
    torch.manual_seed(width)
    model = ViT(ViTConfig(width=width, depth=2, **SIZES))
    return DiffusionBlocks(model, BlocksConfig(num_blocks=2)) if in_blocks else model


def network(folder, width):
    save_model(folder, vit(width, False), texts={"tokenizer.json": str(width)})
    return lambda: load_model(folder)


def one_of_all(folder, width):
    save_model(folder, vit(width, True))
    return lambda: load_block(folder, 1)


def one_alone(folder, width):
    save_block(folder, vit(width, True).block(1))
    return lambda: load_block(folder)


def converted(folder, seed):
    blocks = shaken(blocks_of("llama"))
    with torch.no_grad():
        for p in blocks.parameters():
            p.mul_(seed)
    blocks.save_pretrained(folder)
    return lambda: ConvertedBlocks.from_pretrained(folder, model_of("llama"))


def tensors(model):
    found = model.state_dict() if isinstance(model, nn.Module) else dict(model.named_parameters())
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize("kind", [network, one_of_all, one_alone, converted])
def test_a_save_at_any_time_of_a_read(kind, tmp_path, monkeypatch):
    kind(tmp_path, 8)
    saves = []
    for width in (8, 12):
        saves.append(tensors(kind(tmp_path, width)()))
    exists, at, seen = Path.exists, 1, 0

    def interrupted(path, **options):  # a reader finds each file's place by this call
        nonlocal seen
        seen += 1
        found = exists(path, **options)
        if seen == at:
            kind(tmp_path, 12)
        return found

    while True:
        load, seen = kind(tmp_path, 8), 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "exists", interrupted)
            got = tensors(load())
        if seen < at:
            break
        same = [
            got.keys() == one.keys() and all(torch.equal(got[name], one[name]) for name in one)
            for one in saves
        ]
        assert sum(same) == 1, at
        at += 1
    assert at > 3  # there were as many moments


@pytest.mark.parametrize("kind", [network, one_of_all, one_alone, converted])
def test_a_save_that_is_put_in_place_at_any_time_of_a_read(kind, tmp_path, monkeypatch):
    saved = tensors(kind(tmp_path, 12)())
    exists, at, seen = Path.exists, 1, 0

    def interrupted(path, **options):
        nonlocal seen
        seen += 1
        found = exists(path, **options)
        if seen == at:
            files._put_in_place(tmp_path)
        return found

    while True:
        kind(tmp_path, 8)
        with monkeypatch.context() as patch:  # its writer dies when the save is valid
            patch.setattr(files, "_put_in_place", lambda folder: None)
            load = kind(tmp_path, 12)
        assert (tmp_path / files.SAVED).is_dir()
        seen = 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "exists", interrupted)
            got = tensors(load())
        assert got.keys() == saved.keys()
        assert all(torch.equal(got[name], saved[name]) for name in saved), at
        if seen < at:
            break
        at += 1
    assert at > 3


@pytest.mark.parametrize(("name", "stays"), [("config.json", False), ("events.log", True)])
def test_files_that_change_all_the_time(name, stays, tmp_path):
    def read():
        path = tmp_path / name
        path.write_text("a" * (1 + path.stat().st_size if path.exists() else 0))
        return "what was read"

    if stays:
        assert unchanged(tmp_path, ["config.json"], read) == "what was read"
        return
    with pytest.raises(ValueError, match="is being written to; load it again when its writers are"):
        unchanged(tmp_path, ["config.json"], read)


def test_a_text_that_is_replaced_as_it_is_checked(tmp_path, monkeypatch):
    load, check = network(tmp_path, 8), networks.check_beside

    def replaced(path, digests):
        monkeypatch.undo()
        network(tmp_path, 12)
        check(path, digests)

    monkeypatch.setattr(networks, "check_beside", replaced)
    assert load().config.width == 12


def test_an_error_of_files_at_rest_is_raised_at_once(tmp_path):
    calls = []

    def read():
        calls.append(1)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        unchanged(tmp_path, ["config.json"], read)
    assert len(calls) == 1
