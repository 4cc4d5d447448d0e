"""Tensors are compared and copied from file to file, with the bytes that a save would write."""

import os
import tracemalloc
from contextlib import ExitStack

import pytest
import torch
from hub_tools import library
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import Live

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import (
    load_model,
    load_safetensors,
    save_model,
    save_safetensors,
    stored,
)
from dblocks.checkpoint.stored import copy_stored, reading, stored_in
from dblocks.checkpoint.tensors import opened
from dblocks.models import ViT, ViTConfig
from dblocks.scale import checksums, merge, merge_blocks, save_block
from tools import SIZES, seeded

library("safetensors")
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8,
    torch.bool, torch.float8_e4m3fn, torch.complex64,
)  # fmt: skip


def random_bits(dtype, shape):
    size = torch.empty(shape, dtype=dtype).nbytes
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), generator=seeded())
    return bits.to(torch.uint8).view(dtype).view(shape)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("Cs",)), max_size=6).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    ),
    st.integers(0, 5),
    st.sampled_from([1, 7, 2**20]),
)
def test_a_copy_has_the_bytes_of_a_save(tmp_path_factory, kinds, first, piece):
    folder = tmp_path_factory.mktemp("stored")
    tensors = {name: random_bits(dtype, shape) for name, (dtype, shape) in kinds.items()}
    save_safetensors(folder / "whole", tensors)
    names = list(tensors)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as files:
        patch.setattr(stored, "PIECE", piece)
        parts = {}
        for number, part in enumerate((names[:first], names[first:])):
            save_safetensors(folder / f"{number}", {name: tensors[name] for name in part})
            parts |= stored_in(files.enter_context(reading(folder / f"{number}")))
        copy_stored(folder / "copy", parts)
        assert (folder / "copy").read_bytes() == (folder / "whole").read_bytes()
        whole = stored_in(files.enter_context(reading(folder / "whole")))
        assert all(parts[name].equal(whole[name]) for name in names)


@pytest.mark.parametrize("piece", [3, 2**20])
def test_equal_means_bits_shape_and_dtype(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(stored, "PIECE", piece)
    zero = torch.zeros(4, 2)
    last = zero.clone()
    last[-1, -1] = -0.0
    others = {
        "bits": last, "shape": torch.zeros(2, 4), "dtype": zero.int(), "bytes": zero.double(),
    }  # fmt: skip
    wrong = torch.full((4, 2), torch.nan)
    save_safetensors(tmp_path / "a", {"zero": zero, "again": zero.clone(), "nan": wrong, **others})
    save_safetensors(tmp_path / "b", {"nan": wrong})
    with reading(tmp_path / "a") as a, reading(tmp_path / "b") as b:
        found = stored_in(a)
        assert found["zero"].equal(found["again"])
        assert found["nan"].equal(stored_in(b)["nan"])
        assert [name for name in others if found["zero"].equal(found[name])] == []


def test_a_file_that_became_shorter_is_an_error(tmp_path):
    save_safetensors(tmp_path / "a", {"x": torch.ones(100)})
    with reading(tmp_path / "a") as file:
        found = stored_in(file)
        (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-8])
        with pytest.raises(OSError, match="a was changed while it was read"):
            copy_stored(tmp_path / "b", found)


def test_a_file_that_is_replaced_before_its_header_is_checked_is_an_error(tmp_path):
    for name in "ab":
        save_safetensors(tmp_path / name, {"x": torch.ones(100)})
    with reading(tmp_path / "a") as file:
        os.replace(tmp_path / "b", tmp_path / "a")
        with pytest.raises(OSError, match="a was changed while it was read"):
            stored_in(file)


def saved_blocks(folder):
    """A network whose two blocks are saved in `folder`, and their files of weights."""
    whole = DiffusionBlocks(ViT(ViTConfig(**SIZES)), BlocksConfig(num_blocks=2, shared="private"))
    for b in range(2):
        save_block(folder / f"{b}", whole.block(b))
    return whole, [folder / f"{b}/model.safetensors" for b in range(2)]


def test_a_merge_does_not_replace_a_block(tmp_path):
    jobs = tmp_path / "jobs"
    saved_blocks(jobs)
    (tmp_path / "link").symlink_to(jobs / "1")
    before = {path: path.read_bytes() for path in jobs.glob("*/*")}
    for out in (jobs / "0", jobs / "1", tmp_path / "link"):
        with pytest.raises(ValueError, match=r"not be the folder of a block.* give a new folder"):
            merge_blocks(out, [jobs])
    assert {path: path.read_bytes() for path in jobs.glob("*/*")} == before
    for _ in range(2):  # their own folder may be merged to, and again
        merge_blocks(jobs, [jobs])
    load_model(jobs)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("after", [0, 5])
def test_blocks_that_are_saved_again_are_merged_as_they_were_checked(tmp_path, monkeypatch, after):
    whole, files = saved_blocks(tmp_path / "jobs")
    _, later = saved_blocks(tmp_path / "later")
    pieces, copy, copied = stored.Stored.pieces, merge.copy_stored, []

    def saved_again(tensor):
        if len(copied) == after:
            for file, replaced in zip(later, files, strict=True):
                os.replace(file, replaced)
        copied.append(tensor)
        return pieces(tensor)

    def copy_of(path, tensors):
        monkeypatch.setattr(stored.Stored, "pieces", saved_again)
        copy(path, tensors)

    monkeypatch.setattr(merge, "copy_stored", copy_of)
    merge_blocks(tmp_path / "merged", [tmp_path / "jobs"])
    assert len(copied) > after
    assert not any(file.exists() for file in later)
    found = load_model(tmp_path / "merged").state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.state_dict().items())


def test_weights_that_are_changed_in_place_while_they_are_copied_are_not_merged(
    tmp_path, monkeypatch
):
    _, files = saved_blocks(tmp_path / "jobs")
    _, later = saved_blocks(tmp_path / "later")
    for file in files:
        os.utime(file, (1, 1))  # a clock may be coarser than this test
    copy = merge.copy_stored

    def copy_of(path, tensors):
        files[1].write_bytes(later[1].read_bytes())
        copy(path, tensors)

    merge_blocks(tmp_path / "merged", [tmp_path / "later"])
    kept = (tmp_path / "merged/model.safetensors").read_bytes()
    monkeypatch.setattr(merge, "copy_stored", copy_of)
    with pytest.raises(OSError, match=r"1/model\.safetensors was changed while"):
        merge_blocks(tmp_path / "merged", [tmp_path / "jobs"])
    assert (tmp_path / "merged/model.safetensors").read_bytes() == kept


@pytest.mark.parametrize("shared", ["private", "frozen"])
def test_a_merge_is_a_save_in_little_memory(tmp_path, monkeypatch, shared):
    monkeypatch.setattr(stored, "PIECE", 2**14)
    monkeypatch.setattr(checksums, "CHUNK", 2**14)
    sizes = {**SIZES, "width": 128, "depth": 4, "channels": 3}
    whole = DiffusionBlocks(ViT(ViTConfig(**sizes)), BlocksConfig(num_blocks=4, shared=shared))
    save_model(tmp_path / "whole", whole)
    for b in range(4):
        save_block(tmp_path / f"jobs/block-{b}", whole.block(b))
    merge_blocks(tmp_path / "first", [tmp_path / "jobs"])  # imports what it needs
    tracemalloc.start()
    with Live() as tensors:
        merge_blocks(tmp_path / "merged", [tmp_path / "jobs"])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    written = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("merged", "whole")]
    assert written[0] == written[1]
    assert most + tensors.most < len(written[0]) / 4


@pytest.mark.parametrize("shape", [(4,), (3, 0), (2, 3, 5)])
def test_a_copy_of_numbers_of_four_bits_has_the_bytes_of_a_save(tmp_path, shape):
    """Two are in one element, and files count the numbers."""
    tensors = {"x": random_bits(torch.uint8, shape).view(torch.float4_e2m1fn_x2)}
    save_safetensors(tmp_path / "whole", tensors)
    with reading(tmp_path / "whole") as source:
        found = stored_in(source)
        assert found["x"].shape == shape
        copy_stored(tmp_path / "copy", found)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "whole").read_bytes()
    with opened(tmp_path / "copy") as file:
        assert file.shape("x") == list(shape)
        assert file.get_tensor("x").shape == shape
    loaded = load_safetensors(tmp_path / "copy")["x"]
    assert loaded.view(torch.uint8).equal(tensors["x"].view(torch.uint8))
