"""One block of a pretrained model, loaded alone: the bits of the whole, without its memory."""

import json

import pytest
import torch
from convert_tools import batch_of, model_of, shaken, task_of
from hub_tools import library
from live_bytes import Live
from torch import nn

from dblocks import make_optimizers, train_step
from dblocks.blocks import BlocksConfig
from dblocks.integrations.convert import ConvertedBlocks, convert
from dblocks.scale import build_block, convert_block
from tools import seeded

library("safetensors")
library("transformers")
CASES = [(kind, shared) for kind in ("llama", "vit", "dit") for shared in ("frozen", "private")]
CASES += [("gpt2", "frozen")]
TIED = {"tie_word_embeddings": True}


def saved(kind, folder, **options):
    """A pretrained model in a folder, and how its family makes one with other weights."""
    model = shaken(model_of(kind, **options))
    model.save_pretrained(folder)

    def make():
        return type(model)(model.config).eval() if kind != "dit" else type(model)(**model.config)

    return model, make


def both(kind, folder, config, block, model, make):
    torch.manual_seed(3)
    whole = convert(model, config, task=task_of(kind))
    after = torch.rand(3)
    torch.manual_seed(3)
    found = convert_block(make, folder, config, block, task=task_of(kind))
    assert torch.rand(3).equal(after)
    return whole, found


@pytest.mark.parametrize(("kind", "shared"), CASES)
def test_a_block_is_that_of_the_whole_bit_for_bit(tmp_path, kind, shared):
    model, make = saved(kind, tmp_path)
    config = BlocksConfig(num_blocks=2, shared=shared)
    for b in range(2):
        whole, found = both(kind, tmp_path, config, b, model, make)
        theirs, ours = whole.block(b), found.block(b)
        wanted, got = theirs.state_dict(), ours.state_dict()
        assert list(wanted) == list(got)
        assert all(got[name].equal(tensor) for name, tensor in wanted.items())
        trained = [[p.requires_grad for p in m.parameters()] for m in (theirs, ours)]
        assert trained[0] == trained[1]
        losses = [m.loss(batch_of(kind), b, generator=seeded()).loss for m in (theirs, ours)]
        assert losses[0].equal(losses[1])
        with pytest.raises(ValueError, match=f"block must be {b}, the only one held here"):
            found.block(1 - b)


def nbytes(tensors):
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("shared", ["frozen", "private"])
@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_only_the_block_has_memory(tmp_path, kind, shared):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 12}
    model, make = saved(kind, tmp_path, **sizes)
    config = BlocksConfig(num_blocks=6, shared=shared)
    whole = nbytes(model.parameters())
    convert_block(make, tmp_path, config, 3, task=task_of(kind))  # imports what it needs
    file = (tmp_path / "model.safetensors").stat().st_size  # mapped while it is read
    with Live() as live:
        found = convert_block(make, tmp_path, config, 3, task=task_of(kind))
    block = found.block(3)
    own = nbytes([*block.parameters(), *block.buffers()])
    layer = nbytes(next(iter(block.parts(3)[1])).parameters())
    assert live.bytes() <= own + 4096
    assert live.most <= own + layer + file + 8192
    assert own + layer < whole / 2


def test_tied_weights_stay_tied(tmp_path):
    model, make = saved("llama", tmp_path, **TIED)
    config = BlocksConfig(num_blocks=2, shared="frozen")
    _, found = both("llama", tmp_path, config, 1, model, make)
    inner = found.base_model.model
    assert inner.get_input_embeddings().weight is inner.get_output_embeddings().weight
    assert inner.get_input_embeddings().weight.equal(model.get_input_embeddings().weight)


@pytest.mark.parametrize("shared", ["frozen", "private"])
@pytest.mark.parametrize("kind", ["llama", "vit", "dit"])
def test_blocks_trained_alone_make_the_files_of_one_that_trained_all(tmp_path, kind, shared):
    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2)

    model, make = saved(kind, tmp_path / "model")
    config = BlocksConfig(num_blocks=2, shared=shared)
    torch.manual_seed(3)
    together = convert(model_of(kind), config, task=task_of(kind))
    for b in (1, 0):
        torch.manual_seed(3)
        found = convert_block(make, tmp_path / "model", config, b, task=task_of(kind))
        block = found.block(b)
        train_step(block, batch_of(kind), make_optimizers(block, adamw), generator=seeded())
        found.save_pretrained(tmp_path / "out")
    torch.manual_seed(3)
    together = convert(model, config, task=task_of(kind))
    for b in (1, 0):
        optimizers = make_optimizers(together, adamw)
        train_step(together, batch_of(kind), optimizers, block=b, generator=seeded())
    loaded = ConvertedBlocks.from_pretrained(tmp_path / "out", make())
    wanted = together.state_dict()
    assert all(tensor.equal(wanted[name]) for name, tensor in loaded.state_dict().items())
    together.save_pretrained(tmp_path / "all")
    for path in (tmp_path / "all").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_several_files_with_an_index(tmp_path):
    model, make = saved("llama", tmp_path / "one")
    model.save_pretrained(tmp_path / "more", max_shard_size="5KB")
    assert len(list((tmp_path / "more").glob("*.safetensors"))) > 1
    config = BlocksConfig(num_blocks=2, shared="frozen")
    _, found = both("llama", tmp_path / "more", config, 1, model, make)
    _, other = both("llama", tmp_path / "one", config, 1, model, make)
    ours, theirs = found.block(1).state_dict(), other.block(1).state_dict()
    assert all(ours[name].equal(tensor) for name, tensor in theirs.items())
    index = tmp_path / "more/model.safetensors.index.json"
    about = json.loads(index.read_text())
    about["weight_map"]["lm_head.weight"] = "../one/model.safetensors"
    index.write_text(json.dumps(about))
    with pytest.raises(
        ValueError, match=r"index\.json cannot be used: it must name files in its own folder"
    ):
        convert_block(make, tmp_path / "more", config, 1, task="tokens")


def test_what_is_wrong_with_a_call(tmp_path):
    from safetensors.torch import load_file, save_file

    model, make = saved("llama", tmp_path)
    config, file = BlocksConfig(num_blocks=2, shared="frozen"), tmp_path / "model.safetensors"

    def load(made=make, folder=tmp_path, block=0, **options):
        return convert_block(made, folder, config, block, task="tokens", **options)

    with pytest.raises(TypeError, match="make must be a function without arguments"):
        load(model)
    with pytest.raises(ValueError, match=r"block must be in 0\.\.1, got 2"):
        load(block=2)
    with pytest.raises(ValueError, match="a block alone must not have a clean loss"):
        load(clean_loss_weight=1.0)
    with pytest.raises(ValueError, match=r"must hold one file \*\.safetensors.* none"):
        load(folder=tmp_path / "none")
    with pytest.raises(ValueError, match=r"\.weight must have shape \[16, 16\], got \[8, 16\]"):
        load(lambda: type(model)(type(model.config)(**{**model.config.to_dict(), "head_dim": 8})))
    tensors = load_file(file)
    save_file({**tensors, "another": torch.ones(2)}, file)
    with pytest.warns(UserWarning, match="1 tensors that a LlamaForCausalLM does not have"):
        load()
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"but model\.norm\.weight is missing \(1 are\)"):
        load()
    file.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be used"):
        load()


def test_tensors_that_no_file_holds_are_refused(tmp_path):
    _, make = saved("llama", tmp_path)

    def with_buffer():
        made = make()
        made.model.norm.register_buffer("scale", torch.ones(3), persistent=False)
        return made

    config = BlocksConfig(num_blocks=2, shared="frozen")
    with pytest.raises(RuntimeError, match=r"got .*norm\.scale of LlamaRMSNorm"):
        convert_block(with_buffer, tmp_path, config, 1, task="tokens")


def test_a_tied_tensor_that_differs_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    _, make = saved("llama", tmp_path, **TIED)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = nn.init.normal_(torch.empty(23, 16))
    save_file(tensors, tmp_path / "model.safetensors")
    config = BlocksConfig(num_blocks=2, shared="frozen")
    with pytest.raises(ValueError, match="must be the tensor to which the model ties it"):
        convert_block(make, tmp_path, config, 1, task="tokens")


def test_build_block_says_what_to_do_instead():
    config, model = BlocksConfig(num_blocks=2, shared="frozen"), model_of("llama")

    def make():
        return convert(type(model)(model.config), config, task="tokens").base_model

    with pytest.raises(TypeError, match=r"converted model, .* use dblocks\.scale\.convert_block"):
        build_block(make, config, 0)


def test_weights_that_transformers_converts_are_refused(tmp_path):
    library("transformers")
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 23}
    about = MixtralConfig(**sizes, num_local_experts=2)
    model = MixtralForCausalLM(about).eval()
    config = BlocksConfig(num_blocks=2, shared="frozen")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="write the model with save_original_format=False"):
        convert_block(lambda: MixtralForCausalLM(about), tmp_path, config, 1, task="tokens")
    model.save_pretrained(tmp_path, save_original_format=False)
    found = convert_block(lambda: MixtralForCausalLM(about), tmp_path, config, 1, task="tokens")
    wanted = model.model.layers[1].state_dict()
    got = found.base_model.model.model.layers[1].state_dict()
    assert all(got[name].equal(tensor) for name, tensor in wanted.items())


CONFIG = BlocksConfig(num_blocks=2, shared="frozen")
UP = "model.layers.1.mlp.up_proj.weight"


def changed(folder, **tensors):
    """Changes tensors of a folder's file, by name."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    save_file(load_file(file) | tensors, file)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.bool, torch.complex64]
)
def test_quantised_weights_are_refused(tmp_path, dtype):
    model, make = saved("llama", tmp_path)
    weight = model.state_dict()[UP]
    changed(tmp_path, **{UP: weight.to(dtype), f"{UP}_scale_inv": torch.ones(1, 1)})
    with pytest.raises(ValueError, match=rf"{UP} must be stored in .* got {dtype}.*dequantise"):
        convert_block(make, tmp_path, CONFIG, 0, task="tokens")


def test_floating_weights_of_16_bits_or_more_are_read_and_must_fit(tmp_path):
    model, make = saved("llama", tmp_path)
    weight = model.state_dict()[UP]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        changed(tmp_path, **{UP: weight.to(dtype)})
        found = convert_block(make, tmp_path, CONFIG, 0, task="tokens")
        got = found.base_model.model.get_parameter(UP)
        assert got.dtype == torch.float32
        assert got.equal(weight.to(dtype).float())
    large = weight.double()
    large[0, 0] = torch.inf  # as it is in the file
    changed(tmp_path, **{UP: large})
    convert_block(make, tmp_path, CONFIG, 0, task="tokens")
    large[0, 0] = 1e300
    changed(tmp_path, **{UP: large})
    with pytest.raises(ValueError, match=r"must fit into torch\.float32, got 1e\+300"):
        convert_block(make, tmp_path, CONFIG, 0, task="tokens")


def test_integers_must_have_their_dtype(tmp_path):
    _, make = saved("llama", tmp_path)

    def counting():
        made = make()
        made.model.norm.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        return made

    changed(tmp_path, **{"model.norm.count": torch.tensor([3, 4])})
    found = convert_block(counting, tmp_path, CONFIG, 1, task="tokens")
    assert found.base_model.model.model.norm.count.tolist() == [3, 4]
    changed(tmp_path, **{"model.norm.count": torch.tensor([3.0, 4.0])})
    with pytest.raises(ValueError, match=r"must be stored in torch\.int64, got torch\.float32"):
        convert_block(counting, tmp_path, CONFIG, 1, task="tokens")


def test_a_model_that_was_there_before_is_left_as_it_is(tmp_path):
    model, make = saved("llama", tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def with_old_embedding():
        made = make()
        made.set_input_embeddings(model.get_input_embeddings())
        return made

    for given in (lambda: model, with_old_embedding):
        with pytest.raises(ValueError, match=r"must create the model, got one whose .* existed"):
            convert_block(given, tmp_path, CONFIG, 1, task="tokens")
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [lambda: torch.arange(16.0).log1p(), lambda: torch.tensor(2.5)])
def test_a_parameter_that_is_made_with_values_is_one_that_make_made(tmp_path, value):
    _, make = saved("llama", tmp_path)

    def with_parameter():
        made = make()
        made.model.norm.further = nn.Parameter(value())
        return made

    changed(tmp_path, **{"model.norm.further": torch.zeros_like(value())})
    found = convert_block(with_parameter, tmp_path, CONFIG, 1, task="tokens")
    assert not found.base_model.model.model.norm.further.any()


def test_code_that_needs_values_is_refused(tmp_path):
    make = saved("llama", tmp_path)[1]

    def asking():
        made = make()
        made.model.rotary_emb.register_forward_pre_hook(lambda _, given: given[0].max().item())
        return made

    with pytest.raises(ValueError, match=r"must run on tensors without values.*load the whole mod"):
        convert_block(asking, tmp_path, CONFIG, 1, task="tokens")


FACTORS = {"short_factor": [1.0] * 2, "long_factor": [3.0] * 2}
ROTATIONS = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 8, **FACTORS,
    },
    "yarn": {"rope_type": "yarn", "factor": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("shared", ["frozen", "private"])
@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotations_that_depend_on_the_length(tmp_path, kind, shared):
    about = model_of("llama").config.to_dict() | {"max_position_embeddings": 16}
    about["rope_parameters"] = {"rope_theta": 1e4, **ROTATIONS[kind]}
    plain = type(model_of("llama"))
    model = shaken(plain(type(model_of("llama").config)(**about)).eval())
    model.save_pretrained(tmp_path)

    def make():
        return plain(model.config).eval()

    config, tokens = BlocksConfig(num_blocks=2, shared=shared), batch_of("llama")["tokens"]
    tokens = tokens.repeat(1, -(-16 // tokens.shape[1]))
    for b in range(2):
        whole, found = both("llama", tmp_path, config, b, model, make)
        for length in (6, 16, 6, 12):
            batch = {"tokens": tokens[:, :length]}
            want, got = (m.loss(batch, b, generator=seeded()).loss for m in (whole, found))
            assert got.equal(want), (b, length)
    assert found.base_model.model.model.rotary_emb.rope_type == kind


def test_the_block_predicts_in_the_whole_too(tmp_path):
    model, make = saved("llama", tmp_path)
    whole, found = both("llama", tmp_path, CONFIG, 1, model, make)
    z, sigma = torch.randn(2, 6, 16, generator=seeded()), torch.ones(2)
    tokens = torch.arange(12).view(2, 6)
    want, got = (m.logits(z, sigma, block=1, tokens=tokens) for m in (whole, found))
    assert got.equal(want)
    with pytest.raises(ValueError, match="block must be 1, the only one held here, got 0"):
        found.logits(z, sigma, block=0, tokens=tokens)


def test_a_tensor_that_is_stored_twice_must_be_the_same(tmp_path):
    model, make = saved("gpt2", tmp_path)
    name = "transformer.h.1.ln_1.weight"
    short, weight = name.removeprefix("transformer."), model.state_dict()[name]
    changed(tmp_path, **{short: weight.clone()})
    convert_block(make, tmp_path, CONFIG, 0, task="tokens")
    changed(tmp_path, **{short: weight + 1})
    where = rf"other values in {short} in model\.safetensors than in {name} in model\.safetensors"
    with pytest.raises(ValueError, match=f"{name} must be stored once, or .* {where}"):
        convert_block(make, tmp_path, CONFIG, 0, task="tokens")


def test_an_index_must_name_files_that_are_there(tmp_path):
    model, make = saved("llama", tmp_path / "one")
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"but {shard.name} is missing \(1 are\); get it"):
        convert_block(make, tmp_path, CONFIG, 1, task="tokens")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match=r"its weight_map must name the files .* got an empty"):
        convert_block(make, tmp_path, CONFIG, 1, task="tokens")


def test_check_is_no_option(tmp_path):
    _, make = saved("llama", tmp_path)
    with pytest.raises(TypeError, match=r"check must be left out: only convert has it, .* whole"):
        convert_block(make, tmp_path, CONFIG, 1, task="tokens", check=False)
