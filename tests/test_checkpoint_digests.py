"""Every file of tensors has digests of them, so that a changed bit is found as it is read."""

import json
import random

import pytest
import torch
from hub_tools import library

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.checkpoint import (
    load_model,
    load_safetensors,
    naming,
    save_model,
    save_safetensors,
)
from dblocks.checkpoint.tensors import DIGESTS, METADATA, opened
from dblocks.models import ViT, ViTConfig
from dblocks.scale import load_block, merge_blocks, save_block
from tools import SIZES, seeded

safetensors = library("safetensors")


def flipped(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def assert_flips_are_found(path, load, flips=20):
    """Each flip of one bit of a file is refused by the file's name; some are in its header."""
    whole, rng = path.read_bytes(), random.Random(0)
    header = int.from_bytes(whole[:8], "little")
    bits = [rng.randrange(8 * len(whole)) for _ in range(flips)]
    bits += [rng.randrange(8 * (8 + header)) for _ in range(flips)]
    load()
    for bit in bits:
        flipped(path, bit)
        with pytest.raises(ValueError, match=rf"{path.name} cannot be used"):
            load()
        path.write_bytes(whole)
    load()


@pytest.mark.parametrize("flips", [20, pytest.param(200, marks=pytest.mark.long)])
def test_a_flipped_bit_of_a_network_is_found(tmp_path, flips):
    config = BlocksConfig(num_blocks=2, shared="private")
    save_model(tmp_path, DiffusionBlocks(ViT(ViTConfig(**SIZES)), config))
    path = tmp_path / "model.safetensors"
    assert_flips_are_found(path, lambda: load_model(tmp_path), flips)


def test_a_flipped_bit_of_a_block_in_a_network_is_found(tmp_path):
    config = BlocksConfig(num_blocks=2, shared="private")
    whole = DiffusionBlocks(ViT(ViTConfig(**SIZES)), config)
    save_model(tmp_path, whole)
    path = tmp_path / "model.safetensors"
    name = next(n for n in load_safetensors(path) if n.startswith(f"layers.{SIZES['depth'] - 1}."))
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin = json.loads(file.read(length))[name]["data_offsets"][0]
    flipped(path, 8 * (8 + length + begin))
    load_block(tmp_path, 0)  # the tensor is not of this block, and is not read
    with pytest.raises(ValueError, match=rf"{name} is not what was saved, by its sha256"):
        load_block(tmp_path, 1)


def saved_conversion(folder):
    """Saves a small converted model; returns what loads it."""
    transformers = library("transformers")
    from dblocks import ConvertedBlocks, convert

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 11}
    llama = transformers.LlamaConfig(**sizes, num_attention_heads=2)
    make = transformers.LlamaForCausalLM
    convert(make(llama), BlocksConfig(num_blocks=2), task="tokens").save_pretrained(folder)
    return lambda: ConvertedBlocks.from_pretrained(folder, make(llama))


@pytest.mark.parametrize("flips", [1, pytest.param(20, marks=pytest.mark.long)])
def test_a_flipped_bit_of_a_converted_model_is_found(tmp_path, flips):
    load = saved_conversion(tmp_path)
    for name in ("block_00.safetensors", "block_01.safetensors", "shared.safetensors"):
        assert_flips_are_found(tmp_path / name, load, flips)


def test_files_of_all_dtypes_and_shapes_come_back(tmp_path):
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn)
    tensors = {f"{d}é\n": torch.ones(2, 3, dtype=d) for d in dtypes}
    tensors |= {"scalar": torch.tensor(2.0), "empty": torch.ones(0, 3)}
    tensors["turned"] = torch.randn(3, 4, generator=seeded()).t()
    save_safetensors(tmp_path / "a", tensors)
    found = load_safetensors(tmp_path / "a")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    before = (tmp_path / "a").read_bytes()
    save_safetensors(tmp_path / "a", tensors)
    assert (tmp_path / "a").read_bytes() == before  # metadata has one order


def test_views_that_conjugate_or_negate_are_saved_by_their_values(tmp_path):
    values = torch.randn(3, 4, dtype=torch.complex64, generator=seeded())
    tensors = {"conj": values.conj(), "turned": values.mH, "neg": values.conj().imag}
    assert tensors["conj"].is_conj()
    assert tensors["neg"].is_neg()
    save_safetensors(tmp_path / "a", tensors)
    found = load_safetensors(tmp_path / "a")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert found["conj"].imag.equal(-values.imag)


@pytest.mark.parametrize("text", ["5", "null", "[]", '["x"]', '"x"', "", '{"x":5}', "[" * 10**5])
def test_digests_of_another_form_are_refused_by_name(tmp_path, text):
    safetensors.torch.save_file({"x": torch.ones(4)}, tmp_path / "a", metadata={DIGESTS: text})
    for foreign in (False, True):
        with (
            pytest.raises(ValueError, match=r"must have under 'dblocks\.sha256' a JSON object"),
            opened(tmp_path / "a", foreign=foreign),
        ):
            pass
    with pytest.raises(ValueError, match="must have under"):
        load_safetensors(tmp_path / "a")


def test_other_values_of_the_same_shape_are_not_taken_for_it(tmp_path):
    """Files are put together of parts that are each valid: the digests are of the whole tensor."""
    save_safetensors(tmp_path / "a", {"x": torch.ones(4), "y": torch.zeros(4)})
    whole = (tmp_path / "a").read_bytes()
    for changed in (
        whole[:-32] + whole[-16:] + whole[-32:-16],  # swapped
        whole.replace(b'"dtype":"F32"', b'"dtype":"I32"'),
        whole.replace(b'"x"', b'"z"'),
    ):
        assert changed != whole
        (tmp_path / "b").write_bytes(changed)
        with pytest.raises(ValueError, match="b cannot be used"), naming(tmp_path / "b"):
            load_safetensors(tmp_path / "b")


def test_files_without_digests_are_read(tmp_path):
    tensors = {"x": torch.ones(4)}
    safetensors.torch.save_file(tensors, tmp_path / "old", metadata=METADATA)
    safetensors.torch.save_file(tensors, tmp_path / "plain")
    safetensors.torch.save_file(tensors, tmp_path / "foreign", metadata={"made_by": "hand"})
    for name in ("old", "plain"):
        assert load_safetensors(tmp_path / name)["x"].equal(tensors["x"])
    with pytest.raises(ValueError, match="metadata must be what was saved, got 'made_by'"):
        load_safetensors(tmp_path / "foreign")
    with opened(tmp_path / "foreign", foreign=True) as file:
        assert file.get_tensor("x").equal(tensors["x"])


def test_the_digests_are_where_the_docs_say(tmp_path):
    save_safetensors(tmp_path / "a", {"x": torch.ones(4)})
    with safetensors.safe_open(tmp_path / "a", framework="pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", DIGESTS}
    assert json.loads(metadata[DIGESTS]).keys() == {"x"}


TOKENIZER = '{"characters": "ab cdefghij"}\n'


def assert_flips_of_text_are_found(path, load, flips=20):
    """A flip of one bit in each of so many regions of a file is refused by the file's name."""
    whole = path.read_bytes()
    load()
    for i in range(flips):
        at = (2 * i + 1) * len(whole) // (2 * flips)
        flipped(path, 8 * at + i % 8)
        with pytest.raises(ValueError, match=rf"{path.name} (cannot|must|has)"):
            load()
        path.write_bytes(whole)
    load()


FLIPS = pytest.mark.parametrize("flips", [20, pytest.param(500, marks=pytest.mark.long)])


@FLIPS
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_flipped_bit_of_what_is_beside_the_weights_is_found(tmp_path, name, flips):
    config = BlocksConfig(num_blocks=2)
    texts = {"tokenizer.json": TOKENIZER}
    save_model(tmp_path, DiffusionBlocks(ViT(ViTConfig(**SIZES)), config), texts=texts)
    for load in (load_model, lambda folder: load_block(folder, 1)):
        assert_flips_of_text_are_found(tmp_path / name, lambda load=load: load(tmp_path), flips)


@FLIPS
def test_a_flipped_bit_of_what_is_beside_a_block_is_found(tmp_path, flips):
    whole = DiffusionBlocks(ViT(ViTConfig(**SIZES)), BlocksConfig(num_blocks=2, shared="private"))
    for b in range(2):
        save_block(tmp_path / f"{b}", whole.block(b), texts={"tokenizer.json": TOKENIZER})
    merge = lambda: merge_blocks(tmp_path / "merged", [tmp_path / "0", tmp_path / "1"])
    for name in ("block.json", "tokenizer.json"):
        assert_flips_of_text_are_found(tmp_path / "1" / name, merge, flips)
    path = tmp_path / "1/block.json"
    assert_flips_of_text_are_found(path, lambda: load_block(tmp_path / "1"), flips)
    for name in ("config.json", "tokenizer.json"):
        path = tmp_path / "merged" / name
        assert_flips_of_text_are_found(path, lambda: load_model(tmp_path / "merged"), flips)


def test_a_file_that_is_changed_on_purpose(tmp_path):
    """The error says what to do, and that works; so do files without digests."""
    save_model(tmp_path, ViT(ViTConfig(**SIZES)), texts={"a.json": "1", "run.json": "{}"})
    (tmp_path / "run.json").write_text("[]")  # a record, which training writes again
    load_model(tmp_path)
    (tmp_path / "a.json").write_text("2")
    message = r'a\.json cannot be used: .* delete "sha256" in config\.json'
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r'config\.json cannot be used: .* delete "sha256" in it'):
        load_model(tmp_path)
    for digests in ({}, {"a.json": "0"}, 3):
        path.write_text(json.dumps(config | {"sha256": digests}))
        with pytest.raises(ValueError, match=r"config\.json must hold the sha256 of files"):
            load_model(tmp_path)
    del config["sha256"]
    path.write_text(json.dumps(config))
    load_model(tmp_path)


@FLIPS
def test_a_flipped_bit_of_a_conversion_is_found(tmp_path, flips):
    load = saved_conversion(tmp_path)
    assert_flips_of_text_are_found(tmp_path / "dblocks.json", load, flips)
