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
        with pytest.raises(ValueError, match=f"block must be {b}, the only one loaded here"):
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
        ValueError, match=r"index\.json cannot be used: it must name files beside it"
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
    with pytest.raises(ValueError, match=r"must hold one file of weights \*\.safetensors.* none"):
        load(folder=tmp_path / "none")
    with pytest.raises(ValueError, match=r"\.weight must have shape \[16, 16\], got \[8, 16\]"):
        load(lambda: type(model)(type(model.config)(**{**model.config.to_dict(), "head_dim": 8})))
    tensors = load_file(file)
    save_file({**tensors, "another": torch.ones(2)}, file)
    with pytest.warns(UserWarning, match="1 tensors that a LlamaForCausalLM does not have"):
        load()
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"got none of model\.norm\.weight \(1 are missing\)"):
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

    with pytest.raises(TypeError, match=r"converted one, .* use dblocks\.scale\.convert_block"):
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
