import importlib
import json
import re
import sys
import types

import pytest
import torch
from hub_tools import library

from dblocks.__main__ import main
from dblocks.blocks import BlocksConfig
from dblocks.integrations import build as building
from dblocks.integrations import describe
from dblocks.integrations.build import build
from dblocks.integrations.convert import convert

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 64,
}
DIT = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 3,
    "sample_size": 8,
}
SIZES = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": [32, 32]}
VIT = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": SIZES}
MIXER = {"architecture": "mixer_s32_224", "model_args": {"img_size": 64}}


@pytest.fixture
def report(tmp_path, capsys):
    """What the command prints for a config, or for the name of a model."""

    def run(source, *flags):
        if isinstance(source, dict):
            (tmp_path / "config.json").write_text(json.dumps(source))
            source = str(tmp_path)
        assert main(["info", "--model", source, *flags]) == 0
        return capsys.readouterr().out

    return run


def table(text):
    """The rows of the blocks, of what they share and of the whole: parameters, memory."""
    rows = {}
    for line in text.splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if re.fullmatch(r"\d+", cells[0]):
            rows[int(cells[0])] = [int(cells[3].replace(",", "")), *cells[1:3], *cells[4:]]
        elif cells[0] in ("shared", "end to end"):
            rows[cells[0]] = [int(cells[1].replace(",", "")), *cells[2:]]
    return rows


def numel(parameters):
    return sum(p.numel() for p in parameters)


def test_blocks_of_a_language_model_are_those_of_its_conversion(report):
    library("transformers")
    text = report(LLAMA, "--blocks", "3")
    model = build_on_cpu("LlamaForCausalLM", LLAMA)
    dm = convert(model, BlocksConfig(num_blocks=3), task="tokens")
    rows, whole, shared = table(text), numel(model.parameters()), numel(dm.shared_parameters())
    assert f"parameters  {whole:,}\n" in text
    assert "model.layers.0 to model.layers.3\n" in text
    assert "4 LlamaDecoderLayer\n" in text
    if not library("transformers").__version__.startswith("4."):  # whose do not run on meta
        assert "every layer keeps that of its input" in text
    assert "dblocks.convert(model, BlocksConfig(num_blocks=3), task='tokens')" in text
    assert rows["shared"] == [shared]
    assert rows["end to end"] == [whole, f"{16 * whole / 2**20:.2f} MiB", "100%"]
    for b, layers in enumerate(("0-1", "2-2", "3-3")):
        own = numel(dm.block_parameters(b))
        low, high = dm.config.schedule.range_of(b, 3)
        memory = 16 * (own + shared)
        sigma = f"{high:.4g} to {low:.4g}"
        share = f"{memory / (16 * whole):.0%}"
        assert rows[b] == [own, layers, sigma, f"{memory / 2**20:.2f} MiB", share]
    assert "replaces nothing" in text


def build_on_cpu(name, config):
    kind = getattr(library("transformers"), name)
    return kind(kind.config_class(**config))


def test_what_fuse_replaces_is_counted_by_class(report):
    library("diffusers")
    text = report(DIT)
    assert "task='images')" in text
    assert re.search(r"transformer_blocks\.\* +3 +BasicTransformerBlock +residual_adaln", text)
    assert re.search(r"transformer_blocks\.\*\.norm1 +3 +AdaLayerNormZero +adaln", text)


def test_frozen_parameters_have_no_gradient(report):
    library("transformers")
    vit_mae = {"model_type": "vit_mae", "hidden_size": 32, "num_attention_heads": 2}
    sizes = {"intermediate_size": 48, "num_hidden_layers": 3, "image_size": 32}
    kind = {"architectures": ["ViTMAEModel"]}
    model = build_on_cpu("ViTMAEModel", {**vit_mae, **sizes})
    trained = numel(p for p in model.parameters() if p.requires_grad)
    frozen = numel(model.parameters()) - trained
    assert frozen > 0
    memory = f"{(16 * trained + 4 * frozen) / 2**20:.2f} MiB"
    rows = table(report({**vit_mae, **sizes, **kind}))
    assert rows["end to end"] == [trained + frozen, memory, "100%"]


def test_configs_of_timm(report):
    if library("timm").__version__ == "1.0.20":
        pytest.skip("it builds no model on the meta device, which the command says")
    text = report(VIT)
    assert "3 Block\n" in text
    assert "task='classes')" in text
    assert table(text)[0][1:3] == ["0-0", "80 to 0.505"]
    assert "12 Block\n" in report("timm:vit_tiny_patch16_224")


def test_a_model_that_convert_does_not_know_is_divided_as_it_is(report):
    library("timm")
    text = report(MIXER, "--blocks", "4")
    assert "Not converted by dblocks.convert, whatever the task:" in text
    assert "needs a VisionTransformer or an Eva of timm, got MlpMixer" in text
    assert "without what a conversion adds" in text
    rows = table(text)
    assert sum(rows[b][0] for b in range(4)) + rows["shared"][0] == rows["end to end"][0]
    assert rows[0][0] == rows[3][0] > 0


def test_masked_language_models_are_cut_by_masks(report):
    library("transformers")
    sizes = {key: LLAMA[key] for key in LLAMA if key not in ("model_type", "architectures")}
    text = report({"model_type": "bert", **sizes}, "--blocks", "2")
    assert "BertForMaskedLM\n" in text
    assert "schedule=MaskSchedule()), task='tokens', mask_token_id=...)" in text
    assert [row[2] for b, row in table(text).items() if b in (0, 1)] == ["1 to 0.5", "0.5 to 0"]


def test_layers_that_must_be_told_are_listed(report):
    library("transformers")
    text = report("t5")
    assert "none: T5ForConditionalGeneration must have one list of residual layers" in text
    assert "encoder.block (6 T5Block), decoder.block (6 T5Block)" in text
    assert not table(text)
    assert "fuse_(model)" in text


def test_nothing_is_allocated(monkeypatch):
    library("transformers")
    converted = []

    def record(*args, **kwargs):
        converted.append(convert(*args, **kwargs))
        return converted[-1]

    monkeypatch.setattr(describe, "convert", record)
    assert "LlamaForCausalLM" in describe.report("llama", 4)  # 7 billion parameters
    (dm,) = converted
    assert all(p.is_meta for p in dm.parameters())
    assert numel(dm.base_model.model.parameters()) > 6e9


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gpt2", "GPT2LMHeadModel"),
        ("vit", "ViTForImageClassification"),
        ("clip_vision_model", "CLIPVisionModel"),
    ],
)
def test_a_model_type_is_built_for_what_it_can_do(name, kind):
    library("transformers")
    assert type(build(name)).__name__ == kind


def mistake(capsys, *argv):
    assert main(["info", "--model", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dblocks: error: ")
    assert error.count("\n") == 1
    return error


BAD_CONFIGS = {
    "type": ({"model_type": "llama9"}, "has, got 'llama9'; near names: llama"),
    "class": ({**LLAMA, "architectures": ["LlamaForCausalML"]}, "near names: LlamaForCausalLM"),
    "sizes": ({**DIT, "norm_type": "none"}, "a model of, without data, got NotImplementedError"),
    "diffusers": ({"_class_name": "DiTTransformer2DMode"}, "near names: DiTTransformer2DModel"),
    "scheduler": (
        {"_class_name": "DDIMScheduler"},
        "a class of networks, got 'DDIMScheduler', which is none",
    ),
    "timm": ({"architecture": "vit_tiny_patch16_225"}, "near names: vit_tiny_patch16_224"),
    "neither": ({"hidden_size": 3}, "it has none of these"),
    "list": ([1], "it has none of these"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs_are_one_line(name, tmp_path, capsys):
    for each in ("transformers", "diffusers", "timm"):
        library(each)
    config, message = BAD_CONFIGS[name]
    path = tmp_path / "model.json"
    path.write_text(json.dumps(config))
    assert message in mistake(capsys, str(path))


def test_other_mistakes_are_one_line(tmp_path, capsys):
    library("transformers")
    assert "got meta-llama/Llama-3; nothing is downloaded" in mistake(capsys, "meta-llama/Llama-3")
    assert "must hold a config.json" in mistake(capsys, str(tmp_path))
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").touch()
    (tmp_path / "model_index.json").touch()
    assert f"pass one of {tmp_path / 'transformer'}, " in mistake(capsys, str(tmp_path))
    assert "must be JSON" in mistake(capsys, str(tmp_path / "transformer"))
    assert "num_blocks must be" in mistake(capsys, "llama", "--blocks", "0")
    assert "number of layers, 12, got 13" in mistake(capsys, "gpt2", "--blocks", "13")


def test_a_missing_library_names_the_extra(monkeypatch, capsys):
    for name, source in (("timm", "timm:vit_tiny_patch16_224"), ("transformers", "llama")):
        monkeypatch.setitem(sys.modules, name, None)
        extra = {"timm": "timm", "transformers": "hf"}[name]
        message = f"package {name}, which is not installed; `pip install 'dblocks[{extra}]'`"
        assert message in mistake(capsys, source)


@pytest.mark.parametrize(
    "error", [RuntimeError("operator nms does not exist"), ModuleNotFoundError("no x", name="x")]
)
def test_a_library_that_cannot_be_imported_says_why(error, monkeypatch, capsys):
    def fail(name):
        raise error

    def fail_later(name):
        raise RuntimeError("an attribute cannot be loaded") from ImportError("the cause")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ImportError, match=f"timm is installed but not all of it loads: {error}"):
        build("timm:vit_tiny_patch16_224")
    broken = types.ModuleType("diffusers")
    broken.__getattr__ = fail_later
    monkeypatch.setattr(building, "_library", lambda _: broken)
    with pytest.raises(
        ImportError, match="diffusers is installed but not all of it loads: the cause"
    ):
        building._of_diffusers(DIT)


def test_the_default_device_stays():
    library("transformers")
    assert next(build("gpt2").parameters()).is_meta
    assert torch.empty(1).device.type == "cpu"
