"""Of another library's config only sizes are taken: nothing is loaded, run or fetched."""

import json
import os

import pytest
import torch
from torch import nn

from dblocks.integrations import build as building
from dblocks.integrations.build import build
from dblocks.integrations.sizes import few_modules, sizes_of, timm_sizes


class FakeTimm:
    """Records what a model is made with."""

    calls: list[dict] = []  # noqa: RUF012

    @staticmethod
    def is_model(name):
        return True

    @classmethod
    def create_model(cls, name, **options):
        cls.calls.append(options)
        return nn.Linear(1, 1)


@pytest.fixture
def timm(monkeypatch):
    FakeTimm.calls = []
    monkeypatch.setattr(building, "_library", lambda name: FakeTimm)
    return FakeTimm


def write(folder, config):
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    return str(folder)


def test_sizes_of_a_timm_config_are_taken(timm, tmp_path):
    config = {"architecture": "vit", "num_classes": 5, "model_args": {"depth": 2, "img_size": 32}}
    build(write(tmp_path, config | {"pretrained_cfg": {"url": "https://example.com"}}))
    assert timm.calls == [{"num_classes": 5, "depth": 2, "img_size": 32, "pretrained": False}]


@pytest.mark.parametrize(
    "args",
    [
        {"checkpoint_path": "weights.pth"},
        {"pretrained": True},
        {"pretrained_cfg": {"file": "weights.pth"}},
        {"pretrained_cfg_overlay": {"url": "https://example.com"}},
        {"cache_dir": "/tmp"},
        {"scriptable": True},
        {"depth": {"a": 1}},
        ["depth"],
    ],
)
def test_all_else_of_a_timm_config_is_refused(timm, tmp_path, args):
    with pytest.raises(ValueError, match=r"of a config must be|must give sizes only"):
        build(write(tmp_path, {"architecture": "vit", "model_args": args}))
    with pytest.raises(ValueError, match="of a config must be"):
        timm_sizes({"model_args": args})
    assert not timm.calls


@pytest.mark.parametrize(
    "config",
    [
        {"backbone_config": {"use_pretrained_backbone": True}},
        {"vision_config": {"model_args": {"checkpoint_path": "weights.pth"}}},
        {"text_config": [{"pretrained": True}]},
    ],
)
def test_what_would_load_is_refused_wherever_it_stands(config):
    with pytest.raises(ValueError, match=r"must give sizes only, got .*nothing is loaded"):
        sizes_of({"model_type": "detr", **config})


def test_what_may_be_fetched_as_code_is_dropped():
    config = {"attn_implementation": "a/b", "auto_map": {"AutoModel": "x"}, "hidden_size": 8}
    nested = {"vision_config": config, "pretrained_window_sizes": [0, 2], "use_pretrained": False}
    assert sizes_of(nested) == nested | {"vision_config": {"hidden_size": 8}}


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 10**9},
        {"depths": [3, [10**7]]},
        {"text_config": {"num_experts": 10**6}},
        {"num_attention_heads": 1e30},
        {"model_args": {"depth": 10**9}},
    ],
)
def test_a_huge_count_is_refused_at_once(tmp_path, sizes):
    with pytest.raises(ValueError, match=r"config\.json cannot be used: .* must be at most 10,000"):
        build(write(tmp_path, {"model_type": "llama", **sizes}))


def test_large_sizes_that_are_no_counts_pass():
    config = {"vocab_size": 10**6, "max_position_embeddings": 10**7, "head_token_id": 151643}
    assert sizes_of(config) == config


def test_a_model_of_too_many_modules_is_not_built():
    layers = nn.ModuleList()
    one = nn.Identity()
    with pytest.raises(ValueError, match="at most 200,000 modules"), few_modules():  # noqa: PT012
        for i in range(300_000):
            layers.add_module(str(i), one)
    nn.Sequential(nn.Identity())  # counted no more


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10_000 + "]" * 10_000, "nested at most 64 deep"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested at most 64 deep"),
        ('{"model_type": "llama", "hidden_size": ' + "9" * 100 + "}", "at most 64 bits"),
        ("3", "must be a config of transformers"),
    ],
)
def test_json_beyond_the_limits_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        build(write(tmp_path, text))


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for source in (str(tmp_path / "pipe.json"), "/dev/zero"):
        with pytest.raises(ValueError, match="must be a regular file"):
            build(source)


@pytest.mark.parametrize("names", [["pipeline"], ["AutoTokenizer"], [3], "logging"])
def test_only_a_class_of_networks_is_called(tmp_path, names):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="a config must name a class"):
        build(write(tmp_path, {"model_type": "llama", "architectures": names}))


def test_a_real_config_is_built_on_no_memory(tmp_path):
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}
    config = {"model_type": "llama", "intermediate_size": 8, "attn_implementation": "a/b", **sizes}
    model = build(write(tmp_path, config))
    assert len(model.model.layers) == 2
    assert next(model.parameters()).device == torch.device("meta")
