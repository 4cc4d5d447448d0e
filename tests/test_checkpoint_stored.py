"""Tensors are compared and copied from file to file, with the bytes that a save would write."""

import tracemalloc

import pytest
import torch
from hub_tools import library
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import Live

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import save_model, save_safetensors, stored
from dblocks.checkpoint.stored import copy_stored, stored_in
from dblocks.models import ViT, ViTConfig
from dblocks.scale import checkpoints, merge_blocks, save_block
from tools import SIZES, seeded

library("safetensors")
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8,
    torch.bool, torch.float8_e4m3fn,
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "PIECE", piece)
        parts = {}
        for number, part in enumerate((names[:first], names[first:])):
            save_safetensors(folder / f"{number}", {name: tensors[name] for name in part})
            parts |= stored_in(folder / f"{number}")
        copy_stored(folder / "copy", parts)
        assert (folder / "copy").read_bytes() == (folder / "whole").read_bytes()
        whole = stored_in(folder / "whole")
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
    found = stored_in(tmp_path / "a")
    assert found["zero"].equal(found["again"])
    assert found["nan"].equal(stored_in(tmp_path / "b")["nan"])
    assert [name for name in others if found["zero"].equal(found[name])] == []


def test_a_file_that_became_shorter_is_an_error(tmp_path):
    save_safetensors(tmp_path / "a", {"x": torch.ones(100)})
    found = stored_in(tmp_path / "a")
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-8])
    with pytest.raises(OSError, match="a must not be changed while it is read"):
        copy_stored(tmp_path / "b", found)


@pytest.mark.parametrize("shared", ["private", "frozen"])
def test_a_merge_is_a_save_in_little_memory(tmp_path, monkeypatch, shared):
    monkeypatch.setattr(stored, "PIECE", 2**14)
    monkeypatch.setattr(checkpoints, "CHUNK", 2**14)
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
