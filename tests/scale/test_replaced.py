"""Files that are replaced between their check and their use: what is used is what was checked."""

import json
import os
import shutil

import pytest
import torch
from hub_tools import library
from torch import nn

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import load_model, networks, save_model
from dblocks.models import ViT, ViTConfig
from dblocks.scale import (
    Checkpoints,
    checksums,
    construction,
    load_block,
    merge,
    merge_blocks,
    save_block,
)
from tools import SIZES

library("safetensors")
TEXTS = {"tokenizer.json": '{"a": 1}'}


def blocks_in(folder, texts=TEXTS):
    config = BlocksConfig(num_blocks=2, shared="private")
    whole = DiffusionBlocks(ViT(ViTConfig(**SIZES)), config)
    for b in range(2):
        save_block(folder / f"{b}", whole.block(b), texts=texts)
    return whole


def after(monkeypatch, module, name, act):
    """Runs `act` once, after the first call of a function of a module."""
    function, done = getattr(module, name), []

    def then(*args, **kwargs):
        result = function(*args, **kwargs)
        if not done:
            done.append(True)
            act()
        return result

    monkeypatch.setattr(module, name, then)


@pytest.mark.parametrize("check", ["check_weights", "opened"])
def test_a_block_that_is_replaced_as_it_is_loaded(tmp_path, monkeypatch, check):
    """By a file that is valid itself: the digests inside do not tell."""
    blocks_in(tmp_path / "a")
    whole = blocks_in(tmp_path / "b")
    mine, other = (tmp_path / name / "1" / "model.safetensors" for name in "ab")
    before = load_block(tmp_path / "a/1")
    after(monkeypatch, construction, check, lambda: os.replace(other, mine))
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be used: .*was changed while"):
        load_block(tmp_path / "a/1")
    # Beside the description of another block, the file is refused at once.
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be used: it is not what was"):
        load_block(tmp_path / "a/1")
    shutil.copy(tmp_path / "b/1/block.json", tmp_path / "a/1/block.json")
    found = load_block(tmp_path / "a/1").state_dict()
    assert all(torch.equal(found[n], t) for n, t in whole.block(1).state_dict().items())
    assert any(not torch.equal(found[n], t) for n, t in before.state_dict().items())


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_checkpoint_that_is_replaced_as_it_is_resumed(tmp_path, monkeypatch, name):
    module, folders = nn.Linear(3, 3), [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        nn.init.normal_(module.weight)
        Checkpoints(folder, {}).save(1, {"model": module})
    written = module.weight.clone()
    nn.init.normal_(module.weight)
    before = module.weight.clone()
    mine, other = (folder / "step-00000001" / name for folder in folders)
    after(monkeypatch, Checkpoints, "_check_configuration", lambda: os.replace(other, mine))
    if name == "state.json":  # is read from the file that was checked
        assert Checkpoints(folders[0], {}).resume({"model": module}) == 1
        assert not torch.equal(module.weight, before)
        return
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be used: .*was changed while"):
        Checkpoints(folders[0], {}).resume({"model": module})
    assert torch.equal(module.weight, before)
    with (
        pytest.warns(UserWarning, match=r"model\.safetensors is not what was written"),
        pytest.raises(ValueError, match="must hold a valid checkpoint, got 1 damaged"),
    ):
        Checkpoints(folders[0], {}).resume({"model": module})
    assert not torch.equal(module.weight, written)


def test_a_checkpoint_whose_folder_is_removed_as_it_is_resumed(tmp_path, monkeypatch):
    module = nn.Linear(3, 3)
    kept = Checkpoints(tmp_path, {})
    kept.save(1, {"model": module})
    folder, before = tmp_path / "step-00000001", module.weight.clone()
    after(monkeypatch, Checkpoints, "_check_configuration", lambda: shutil.rmtree(folder))
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be used"):
        Checkpoints(tmp_path, {}).resume({"model": module})
    assert torch.equal(module.weight, before)


def test_nothing_is_loaded_of_a_checkpoint_of_which_one_file_cannot_be(tmp_path, monkeypatch):
    first, last = nn.Linear(3, 3), nn.Linear(3, 3)
    Checkpoints(tmp_path, {}).save(1, {"a": first, "b": last})
    before = first.weight.clone().fill_(7)
    with torch.no_grad():
        first.weight.fill_(7)
    load, calls = checksums.Source.load, []

    def failing(source):
        calls.append(source.path.name)
        if len(calls) == 2:
            raise OSError("input/output error")
        return load(source)

    monkeypatch.setattr(checksums.Source, "load", failing)
    with pytest.raises(ValueError, match=r"b\.safetensors cannot be used: input/output error"):
        Checkpoints(tmp_path, {}).resume({"a": first, "b": last})
    assert torch.equal(first.weight, before)


def test_texts_are_those_that_were_saved(tmp_path):
    """The same other text beside every block is not taken for theirs."""
    blocks_in(tmp_path)
    merge_blocks(tmp_path / "merged", [tmp_path])
    assert (tmp_path / "merged/tokenizer.json").read_text() == TEXTS["tokenizer.json"]
    for b in range(2):
        (tmp_path / f"{b}/tokenizer.json").write_text('{"a": 2}')
    with pytest.raises(
        ValueError, match=r"0/tokenizer\.json cannot be used: it is not what was saved, by the sha"
    ):
        merge_blocks(tmp_path / "again", [tmp_path / "0", tmp_path / "1"])
    assert not (tmp_path / "again").exists()


def test_blocks_with_and_without_a_text_do_not_merge(tmp_path):
    blocks_in(tmp_path)
    path = tmp_path / "1/block.json"
    about = json.loads(path.read_text())
    about["texts"], about["sha256"] = [], {merge.WEIGHTS_FILE: about["sha256"][merge.WEIGHTS_FILE]}
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"same text files, got .* in .*1 and .* in .*0"):
        merge_blocks(tmp_path / "merged", [tmp_path / "0", tmp_path / "1"])


def test_descriptions_of_blocks_of_earlier_versions_are_read(tmp_path):
    whole = blocks_in(tmp_path)
    for b in range(2):
        path = tmp_path / f"{b}/block.json"
        about = json.loads(path.read_text())
        about["sha256"] = about["sha256"][merge.WEIGHTS_FILE]
        path.write_text(json.dumps(about))
    found = load_block(tmp_path / "1").state_dict()
    assert all(torch.equal(found[n], t) for n, t in whole.block(1).state_dict().items())
    merge_blocks(tmp_path / "merged", [tmp_path / "0", tmp_path / "1"])
    for wrong, words in ((5, "sha256 of files by name"), ({}, r"sha256 of model\.safetensors")):
        about["sha256"] = wrong
        path.write_text(json.dumps(about))
        with pytest.raises(ValueError, match=f"block.json must hold the {words}"):
            load_block(tmp_path / "1")


@pytest.mark.parametrize("load", [load_model, lambda folder: load_block(folder, 1)])
def test_a_network_that_is_saved_again_as_it_is_loaded(tmp_path, monkeypatch, load):
    """The weights of one save are not taken with the config of another: both are read again."""
    models = [
        DiffusionBlocks(ViT(ViTConfig(**SIZES)), BlocksConfig(num_blocks=2, top_share=share))
        for share in (0.5, 0.6)
    ]
    save_model(tmp_path, models[0])
    after(monkeypatch, networks, "network_of", lambda: save_model(tmp_path, models[1]))
    after(monkeypatch, construction, "network_of", lambda: save_model(tmp_path, models[1]))
    assert load(tmp_path).config.top_share == 0.6
