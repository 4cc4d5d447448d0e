"""Who reads a folder while it is saved to gets the files of one save, the earlier or the new."""

from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from convert_tools import blocks_of, model_of, shaken
from hub_tools import library
from torch import nn

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import files, load_model, networks, save_model, unchanged
from dblocks.integrations.convert import ConvertedBlocks
from dblocks.integrations.convert import files as convert_files
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


@contextmanager
def acting(at, act):
    """Runs `act` in call number `at` of `Path.exists`, by which each file's place is found.

    Yields the calls so far.
    """
    exists, calls = Path.exists, []

    def interrupted(path, **options):
        calls.append(path)
        number, found = len(calls), exists(path, **options)
        if number == at:
            act()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "exists", interrupted)
        yield calls


@contextmanager
def not_put_in_place():
    """A save is valid, but its writer dies before it moves the files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_put_in_place", lambda folder: None)
        yield


@pytest.mark.parametrize("kind", [network, one_of_all, one_alone, converted])
def test_a_save_at_any_time_of_a_read(kind, tmp_path):
    saves = [tensors(kind(tmp_path, width)()) for width in (8, 12)]
    for at in count(1):
        load = kind(tmp_path, 8)
        with acting(at, lambda: kind(tmp_path, 12)) as calls:
            got = tensors(load())
        if len(calls) < at:
            break
        same = [
            got.keys() == one.keys() and all(torch.equal(got[name], one[name]) for name in one)
            for one in saves
        ]
        assert sum(same) == 1, at
    assert at > 3  # there were as many moments


@pytest.mark.parametrize("kind", [network, one_of_all, one_alone, converted])
def test_a_save_that_is_put_in_place_at_any_time_of_a_read(kind, tmp_path):
    saved = tensors(kind(tmp_path, 12)())
    for at in count(1):
        kind(tmp_path, 8)
        with not_put_in_place():
            load = kind(tmp_path, 12)
        assert (tmp_path / files.SAVED).is_dir()
        with acting(at, lambda: files._put_in_place(tmp_path)) as calls:
            got = tensors(load())
        assert got.keys() == saved.keys()
        assert all(torch.equal(got[name], saved[name]) for name in saved), at
        if len(calls) < at:
            break
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


def test_what_was_broken_while_files_changed_is_told(tmp_path):
    def read():
        (tmp_path / "config.json").write_text("a" * len(calls))
        calls.append(1)
        raise ValueError("block_01 is missing")

    calls = []
    with pytest.raises(ValueError, match="is being written to") as found:
        unchanged(tmp_path, ["config.json"], read)
    assert str(found.value.__cause__) == "block_01 is missing"


def test_a_job_that_saves_while_the_files_of_another_are_put_in_place(tmp_path):
    first, second = (blocks_of("llama", config={"shared": "frozen"}) for _ in range(2))
    for at in count(1):
        folder = tmp_path / f"{at}"
        with not_put_in_place():
            first.save_pretrained(folder, block=0)
        with acting(at, partial(files._put_in_place, folder)) as calls:
            second.save_pretrained(folder, block=1)
        assert (folder / "block_00.safetensors").exists()
        assert (folder / "block_01.safetensors").exists()
        if len(calls) < at:
            break
    assert at > 3


def test_files_of_other_jobs_are_not_read_again(tmp_path, monkeypatch):
    frozen = {"shared": "frozen"}
    blocks_of("llama", config=frozen).save_pretrained(tmp_path)
    read, load = [], convert_files.load_safetensors

    def loading(path):
        read.append(path.name)
        if len(read) == 2:  # a job of the second block saves, as its file was read
            blocks_of("llama", config=frozen).save_pretrained(tmp_path, block=1)
        return load(path)

    monkeypatch.setattr(convert_files, "load_safetensors", loading)
    ConvertedBlocks.from_pretrained(tmp_path, model_of("llama"))
    assert sorted(read) == [f"block_{b:02d}.safetensors" for b in (0, 1, 1)] + [
        "shared.safetensors"
    ]
