"""Converted models in files: whole, a block at a time, and read into the plain model."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from convert_tools import (
    ALL,
    PUBLISHED,
    adamw,
    batch_of,
    blocks_of,
    model_of,
    plain_logits,
    shaken,
)
from hub_tools import library
from safetensors.torch import load_file, save_file

from dblocks import make_optimizers, train_step
from dblocks.integrations.convert import ConvertedBlocks
from tools import seeded

library("safetensors")
pytestmark = pytest.mark.usefixtures("one_thread")
FILES = ["README.md", "block_00.safetensors", "block_01.safetensors", "dblocks.json"]


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(v.equal(second[k]) for k, v in first.items())


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize("shared", ["train", "frozen", "private"])
@pytest.mark.parametrize("kind", ALL)
def test_a_round_trip_is_bit_for_bit(kind, shared, tmp_path):
    blocks = shaken(blocks_of(kind, config={"shared": shared}, embed_scale=2.0))
    blocks.save_pretrained(tmp_path)
    assert names_in(tmp_path) == [*FILES, "shared.safetensors"]
    loaded = ConvertedBlocks.from_pretrained(tmp_path, model_of(kind))
    assert same(loaded, blocks)
    assert (loaded.config, loaded.options, loaded.task) == (
        blocks.config, blocks.options, blocks.task
    )  # fmt: skip
    for b in range(2):
        losses = [m.loss(batch_of(kind), b, generator=seeded()).loss for m in (blocks, loaded)]
        assert losses[0].equal(losses[1])
    blocks.save_pretrained(tmp_path)
    assert names_in(tmp_path) == [*FILES, "shared.safetensors"]


@pytest.mark.parametrize("shared", ["frozen", "private"])
@pytest.mark.parametrize("kind", ["llama", "bert", "timm", "dit"])
def test_workers_write_a_block_each(kind, shared, tmp_path):
    """Each from its own copy of the whole, in which it trained one block."""
    together = blocks_of(kind, config={"shared": shared})
    together.save_pretrained(tmp_path)
    (tmp_path / "block_01.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold block_01.safetensors; each block's worker"):
        ConvertedBlocks.from_pretrained(tmp_path, model_of(kind))
    for b in (1, 0):
        worker = blocks_of(kind, config={"shared": shared})
        train_step(
            worker, batch_of(kind), make_optimizers(worker, adamw), block=b, generator=seeded()
        )
        before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}
        worker.save_pretrained(tmp_path, block=b)
        written = {
            name
            for name in names_in(tmp_path)
            if (tmp_path / name).read_bytes() != before.get(name)
        }
        assert written == {f"block_0{b}.safetensors"}
        train_step(
            together, batch_of(kind), make_optimizers(together, adamw), block=b, generator=seeded()
        )
    merged = ConvertedBlocks.from_pretrained(tmp_path, model_of(kind))
    assert same(merged, together)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "timm", "dit"])
def test_files_load_into_the_plain_model(kind, tmp_path):
    from safetensors.torch import load_file

    blocks = shaken(blocks_of(kind, 4))
    blocks.save_pretrained(tmp_path)
    model, found = model_of(kind), set()
    for path in sorted(tmp_path.glob("*.safetensors")):
        tensors = load_file(path)
        keys = model.load_state_dict(tensors, strict=False)
        assert all(name.startswith("dblocks.") for name in keys.unexpected_keys)
        found |= set(tensors)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    assert found >= {name for name, _ in model.named_parameters()}
    batch = batch_of(kind)
    assert plain_logits(kind, model, batch).equal(plain_logits(kind, blocks.base_model, batch))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_tied_weights_stay_tied(kind, tmp_path):
    options = {"tie_word_embeddings": True} if kind == "llama" else {}
    model = model_of(kind, **options)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    blocks = shaken(blocks_of(kind, model=model))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    blocks.save_pretrained(tmp_path)
    other = model_of(kind, **options)
    loaded = ConvertedBlocks.from_pretrained(tmp_path, other)
    assert other.get_input_embeddings().weight is other.get_output_embeddings().weight
    assert same(loaded, blocks)
    assert json.loads((tmp_path / "dblocks.json").read_text())["ties"]
    private = blocks_of(kind, model=model, config={"shared": "private"})
    inner = private.copies[0].model
    assert inner.get_input_embeddings().weight is inner.get_output_embeddings().weight


def test_what_is_wrong_with_a_folder(tmp_path):
    blocks = blocks_of("timm")
    load = lambda model=None: ConvertedBlocks.from_pretrained(tmp_path, model or model_of("timm"))
    with pytest.raises(ValueError, match=r"must hold a dblocks.json written by save_pretrained"):
        load()
    blocks.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model must be a VisionTransformer, as in .* got a DiT"):
        load(model_of("dit"))
    with pytest.raises(ValueError, match=r"got cls_token of shape \[1, 1, 16\] for \[1, 1, 32\]"):
        load(model_of("timm", embed_dim=32))
    with pytest.raises(ValueError, match="layers must name modules"):
        load(model_of("timm", depth=2))
    with pytest.raises(ValueError, match=r"block must be in 0\.\.1, got 2"):
        blocks.save_pretrained(tmp_path, block=2)
    config = tmp_path / "dblocks.json"
    written = config.read_text()
    for broken in ("{", "[]", json.dumps({"format": 2, "more": 1}), "{}"):
        config.write_text(broken)
        with pytest.raises(ValueError, match=r"dblocks.json cannot be used: "):
            load()
    values = json.loads(written)
    del values["sha256"]
    config.write_text(json.dumps({**values, "blocks_config": {"num_blocks": 2, "layers": 3}}))
    with pytest.raises(ValueError, match=r"dblocks.json cannot be used: .* no field layers"):
        load()
    config.write_text(json.dumps({**values, "options": {"scale": 2}}))
    with pytest.raises(ValueError, match=r"dblocks.json cannot be used: .*scale"):
        load()
    config.write_text(json.dumps({**values, "ties": {"a": "nothing"}}))
    with pytest.raises(ValueError, match=r"cannot be used: .*nothing"):
        load()
    config.write_text(written)
    (tmp_path / "block_01.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"block_01.safetensors cannot be used"):
        load()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="must be a folder to write files in"):
        blocks.save_pretrained(file)


@pytest.mark.parametrize("kind", ["llama", "bert", "timm", "dit"])
def test_files_of_format_1_are_what_they_were(kind, tmp_path):
    """Doubled rows, a learned head, and no share of the draws at the highest level."""
    of_noise = kind in ("llama", "timm")
    config = {"top_share": 0.0, "weighting": "batch_mean" if of_noise else "auto"}
    blocks = shaken(blocks_of(kind, config=config, **PUBLISHED))
    blocks.save_pretrained(tmp_path)
    config = tmp_path / "dblocks.json"
    values = json.loads(config.read_text())
    assert values["format"] == 2
    del values["sha256"]
    options = {k: v for k, v in values["options"].items() if k not in PUBLISHED}
    division = {k: v for k, v in values["blocks_config"].items() if k != "top_share"}
    division["weighting"] = "auto"  # of a cross-entropy that was batch_mean
    old = {**values, "format": 1, "options": options, "blocks_config": division}
    config.write_text(json.dumps(old))
    loaded = ConvertedBlocks.from_pretrained(tmp_path, model_of(kind))
    assert same(loaded, blocks)
    assert (loaded.config, loaded.options) == (blocks.config, blocks.options)
    for b in range(2):
        losses = [m.loss(batch_of(kind), b, generator=seeded()).loss for m in (blocks, loaded)]
        assert losses[0].equal(losses[1])
    config.write_text(json.dumps({**old, "format": 3}))
    with pytest.raises(ValueError, match=r"dblocks.json cannot be used: .* of format 2 or 1"):
        ConvertedBlocks.from_pretrained(tmp_path, model_of(kind))


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_a_form_is_kept(kind, tmp_path):
    blocks = shaken(blocks_of(kind, **PUBLISHED))
    blocks.save_pretrained(tmp_path)
    loaded = ConvertedBlocks.from_pretrained(tmp_path, model_of(kind))
    assert same(loaded, blocks)
    assert loaded.options == blocks.options


def test_the_card_names_the_blocks(tmp_path):
    blocks_of("llama").save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "# LlamaForCausalLM in 2 blocks" in card
    assert "| 0 | 0 to 1 | 80 to 0.3012 |" in card


@pytest.mark.parametrize("shared", ["train", "private"])
def test_modulations_of_output_heads_of_0_1_had_another_name(shared, tmp_path):
    from safetensors.torch import load_file, save_file

    blocks = shaken(blocks_of("llama", config={"shared": shared}, **PUBLISHED))
    blocks.save_pretrained(tmp_path)
    renamed = 0
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        old = {n.replace("head_modulation.", "readout_modulation."): t for n, t in tensors.items()}
        renamed += len(set(old) - set(tensors))
        save_file(old, path)
    assert renamed
    assert same(ConvertedBlocks.from_pretrained(tmp_path, model_of("llama")), blocks)


@pytest.mark.parametrize(
    ("kind", "key", "change"),
    [
        ("llama", "hidden_act", {"hidden_act": "relu"}),
        ("llama", "rms_norm_eps", {"rms_norm_eps": 0.5}),
        ("bert", "hidden_act", {"hidden_act": "relu"}),
        ("gpt2", "activation_function", {"activation_function": "relu"}),
        ("dit", "activation_fn", {"activation_fn": "gelu"}),
    ],
)
def test_a_model_with_another_function_of_the_same_sizes(kind, key, change, tmp_path):
    blocks_of(kind).save_pretrained(tmp_path)
    load = lambda **options: ConvertedBlocks.from_pretrained(tmp_path, model_of(kind, **options))
    path, text = tmp_path / "dblocks.json", (tmp_path / "dblocks.json").read_text()
    load()
    with pytest.raises(ValueError, match=rf"other values of {key}: .* there, .* here; build it"):
        load(**change)
    with pytest.raises(ValueError, match=rf"other values of {key}: .* there, .* here; convert"):
        blocks_of(kind, model=model_of(kind, **change)).save_pretrained(tmp_path, block=0)
    assert path.read_text() == text
    values = json.loads(text)
    del values["sha256"], values["model_config"]  # as earlier versions wrote it
    path.write_text(json.dumps(values))
    load(**change)


def test_other_positions_of_the_same_sizes(tmp_path):
    blocks_of("llama").save_pretrained(tmp_path)
    model = model_of("llama")
    config = copy.deepcopy(model.config)
    rope = getattr(config, "rope_parameters", None)  # of transformers 5
    if rope:
        config.rope_parameters = {**rope, "rope_theta": 5.0}
    else:
        config.rope_theta = 5.0
    with pytest.raises(ValueError, match=r"other values of .*rope_theta: 10000\.0 there, 5\.0"):
        ConvertedBlocks.from_pretrained(tmp_path, type(model)(config))


def test_a_model_with_another_dropout_rate_or_path_is_the_same(tmp_path):
    blocks_of("bert").save_pretrained(tmp_path)
    model = model_of("bert", hidden_dropout_prob=0.5)
    model.config._name_or_path = "elsewhere"
    assert ConvertedBlocks.from_pretrained(tmp_path, model).config.num_blocks == 2


def test_a_model_without_the_adapters_of_the_saved_one(tmp_path):
    peft = library("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    model = peft.inject_adapter_in_model(config, model_of("llama"))
    blocks = blocks_of("llama", model=model)
    blocks.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"only there, such as .*; \d+ only here, .* adapters"):
        ConvertedBlocks.from_pretrained(tmp_path, model_of("llama"))
    fresh = peft.inject_adapter_in_model(config, model_of("llama"))
    assert same(ConvertedBlocks.from_pretrained(tmp_path, fresh), blocks)


def test_a_tensor_of_another_shape_leaves_the_model_as_it_was(tmp_path):
    blocks_of("llama").save_pretrained(tmp_path)
    path = tmp_path / "shared.safetensors"
    tensors = load_file(path)
    name = max(tensors)
    save_file(tensors | {name: torch.zeros(3, 5)}, path)
    model = shaken(model_of("llama"))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"got .*{re.escape(name)} of shape \[3, 5\] for "):
        ConvertedBlocks.from_pretrained(tmp_path, model)
    assert all(tensor.equal(before[n]) for n, tensor in model.state_dict().items())
