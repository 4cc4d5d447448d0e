"""Models are built from tiny configs on the meta device: names, classes and shapes are enough."""

import copy

import pytest
import torch
from hub_tools import library
from torch import nn

from dblocks.integrations.convert.find import find_layers
from dblocks.integrations.convert.residual import check_residual
from dblocks.integrations.example_inputs import example_inputs
from dblocks.models import CausalLM, CausalLMConfig, ViT, ViTConfig

WIDTHS = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
TOKENS = {**WIDTHS, "num_hidden_layers": 3, "vocab_size": 64}
IMAGES = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "sample_size": 8}


def transformer(kind, **config):
    made = getattr(library("transformers"), kind)
    with torch.device("meta"):
        return made(made.config_class(**config))


def vision(name, **options):
    timm = library("timm")
    with torch.device("meta"):
        return timm.create_model(name, **options)


def image_model(kind, **config):
    made = getattr(library("diffusers"), kind)
    with torch.device("meta"):
        return made(**config)


def t5():
    sizes = {"d_model": 32, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2}
    return transformer("T5ForConditionalGeneration", **sizes, d_kv=16, d_ff=48, vocab_size=64)


def flux():
    axes = {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "num_attention_heads": 2}
    text = {"joint_attention_dim": 32, "pooled_projection_dim": 16}
    return image_model("FluxTransformer2DModel", num_layers=2, num_single_layers=3, **axes, **text)


def swin():
    sizes = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2}
    return transformer("SwinForImageClassification", **sizes, image_size=32)


GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": 64, "bos_token_id": 0}
PICTURES = {**WIDTHS, "num_hidden_layers": 3, "image_size": 32}
KV = {"num_key_value_heads": 2, "head_dim": 16}
SD3 = {"joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 16}
TEXT = {"cross_attention_dim": 32, "caption_channels": 24}
LMS = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma")
ONE_STACK = {
    **{
        name: (lambda name=name: transformer(f"{name}ForCausalLM", **TOKENS, **KV), "model.layers")
        for name in LMS
    },
    "gpt2": (lambda: transformer("GPT2LMHeadModel", **GPT2, eos_token_id=0), "transformer.h"),
    "bert": (lambda: transformer("BertForMaskedLM", **TOKENS), "bert.encoder.layer"),
    "vit": (lambda: transformer("ViTForImageClassification", **PICTURES), "vit.layers"),
    "timm vit": (
        lambda: vision("vit_tiny_patch16_224", embed_dim=32, depth=3, num_heads=2, img_size=32),
        "blocks",
    ),
    "timm beit": (
        lambda: vision("beit_base_patch16_224", embed_dim=32, depth=3, num_heads=2, img_size=32),
        "blocks",
    ),
    "timm mixer": (lambda: vision("mixer_s32_224", img_size=64), "blocks"),
    "dit": (
        lambda: image_model("DiTTransformer2DModel", **IMAGES, norm_num_groups=4),
        "transformer_blocks",
    ),
    "sd3": (lambda: image_model("SD3Transformer2DModel", **IMAGES, **SD3), "transformer_blocks"),
    "pixart": (
        lambda: image_model("PixArtTransformer2DModel", **IMAGES, **TEXT, norm_num_groups=4),
        "transformer_blocks",
    ),
}


@pytest.mark.parametrize("name", ONE_STACK)
def test_layers_are_found_and_keep_the_shape(name):
    build, path = ONE_STACK[name]
    model = build()
    stack = model.get_submodule(path)
    found = find_layers(model)
    assert list(found) == [f"{path}.{i}" for i in range(len(stack))]
    assert all(one is other for one, other in zip(found.values(), stack, strict=True))
    assert len(found) == 8 if "mixer" in name else 3
    assert check_residual(model, found) == ""


class Layer(nn.Module):
    def __init__(self, width, out=None):
        super().__init__()
        self.linear = nn.Linear(width, out or width)

    def forward(self, x):
        return self.linear(x)


class Residual(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x + self.weight


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 3)


def causal_lm():
    return CausalLM(CausalLMConfig(width=16, depth=3, heads=2, vocab_size=8))


PLAIN = {
    "torch encoder": (encoder, "layers", 3),
    "ours, images": (lambda: ViT(ViTConfig(image_size=8, width=12, depth=3, heads=2)), "layers", 3),
    "ours, tokens": (causal_lm, "layers", 3),
    "within a user's model": (lambda: nn.ModuleDict({"net": encoder()}), "net.layers", 3),
    "layers with parameters only": (
        lambda: nn.ModuleDict({"h": nn.Sequential(Residual(), Residual()), "out": nn.Linear(4, 4)}),
        "h",
        2,
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_list_of_one_class_is_found(name):
    build, path, count = PLAIN[name]
    assert list(find_layers(build())) == [f"{path}.{i}" for i in range(count)]


def test_a_model_may_be_the_list_itself():
    assert list(find_layers(nn.Sequential(Layer(4), Layer(4)))) == ["0", "1"]


def test_lists_of_plain_layers_are_no_candidates():
    lists = {"linear": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "layers": encoder().layers}
    assert list(find_layers(nn.ModuleDict(lists))) == [f"layers.{i}" for i in range(3)]


def test_class_names_count_in_any_model():
    class Named(nn.Module):
        _no_split_modules = ("Residual",)

        def __init__(self):
            super().__init__()
            self.stem = nn.ModuleList([Layer(4), Layer(4)])
            self.body = nn.ModuleList([Residual()])

    assert list(find_layers(Named())) == ["body.0"]
    Named._repeated_blocks = ["Layer"]
    assert list(find_layers(nn.ModuleDict({"net": Named()}))) == ["net.stem.0", "net.stem.1"]


# peft asks for an attribute that transformers renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_layers_of_adapted_models_are_found():
    peft = library("peft")
    model = transformer("GPT2LMHeadModel", **GPT2, eos_token_id=0)
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(model, config)
    assert next(iter(find_layers(adapted))) == "base_model.model.transformer.h.0"


SEVERAL = {
    "t5": (t5, ["encoder.block (3 T5Block)", "decoder.block (2 T5Block)"], False),
    "flux": (
        flux,
        [
            "transformer_blocks (2 FluxTransformerBlock)",
            "single_transformer_blocks (3 FluxSingleTransformerBlock)",
        ],
        False,
    ),
    "resnet": (
        lambda: vision("resnet18"),
        [f"layer{i} (2 BasicBlock)" for i in (1, 2, 3, 4)],
        True,
    ),
    "convnext": (
        lambda: vision("convnext_atto"),
        [f"stages.{i}.blocks ({n} ConvNeXtBlock)" for i, n in enumerate((2, 2, 6, 2))],
        True,
    ),
    "timm swin": (
        lambda: vision("swin_tiny_patch4_window7_224"),
        [f"layers.{i}.blocks ({n} SwinTransformerBlock)" for i, n in enumerate((2, 2, 6, 2))],
        True,
    ),
    "swin": (swin, [f"swin.encoder.layers.{i}.blocks (2 SwinLayer)" for i in (0, 1)], True),
    "stages without lists": (
        lambda: nn.Sequential(Layer(4, 8), Layer(8, 16)),
        ["0 (1 Layer)", "1 (1 Layer)"],
        True,
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_candidates_are_listed(name):
    build, stacks, shapes_differ = SEVERAL[name]
    model = build()
    with pytest.raises(ValueError, match="must have one list of residual layers") as error:
        find_layers(model)
    text = str(error.value)
    assert f"it has {len(stacks)}: {', '.join(stacks)}" in text
    assert ("whose shapes differ" in text) == shapes_differ
    path = stacks[0].split()[0]
    assert text.endswith(f"such as layers={path!r}")
    if len(stacks) > 1 and "(1 " not in stacks[0]:
        assert all(name.startswith(f"{path}.") for name in find_layers(model, path))


def test_many_candidates_are_cut_short():
    lists = {f"list{i}": nn.Sequential(Residual(i + 1), Residual(i + 1)) for i in range(20)}
    with pytest.raises(ValueError, match=r"list11 \(2 Residual\) and 8 more"):
        find_layers(nn.ModuleDict(lists))


def test_without_a_candidate_the_children_are_named():
    with pytest.raises(ValueError, match=r"its children embed \(Embedding\), head \(Linear\)"):
        find_layers(nn.ModuleDict({"embed": nn.Embedding(4, 4), "head": nn.Linear(4, 4)}))
    with pytest.raises(ValueError, match="it has none"):
        find_layers(nn.Linear(4, 4))


def two_towers():
    return nn.ModuleDict({"encoder": encoder(), "decoder": encoder()})


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("decoder.layers", [f"decoder.layers.{i}" for i in range(3)]),
        (["encoder.layers.2", "decoder.layers.0"], ["encoder.layers.2", "decoder.layers.0"]),
        (lambda m: m["encoder"].layers, [f"encoder.layers.{i}" for i in range(3)]),
        (lambda m: reversed(m["encoder"].layers[:2]), ["encoder.layers.1", "encoder.layers.0"]),
    ],
)
def test_explicit_layers_win(layers, names):
    model = two_towers()
    found = find_layers(model, layers)
    assert list(found) == names
    assert all(layer is model.get_submodule(name) for name, layer in found.items())


def test_explicit_layers_may_change_shape():
    assert len(find_layers(vision("convnext_atto"), "stages")) == 4


MISTAKES = {
    "near": ("encoder.layer", "got 'encoder.layer'; near names: encoder.layers"),
    "far": ("zzz", r"got 'zzz'; see model.named_modules\(\)"),
    "no list": ("encoder.layers.0", "got 'encoder.layers.0', a TransformerEncoderLayer"),
    "one of several": (["encoder.layers.0", "encoder.layers.3"], "got 'encoder.layers.3'"),
    "twice": (["encoder.layers.0"] * 2, "one module as encoder.layers.0 and encoder.layers.0"),
    "nested": (["encoder", "encoder.layers.0"], "got encoder.layers.0 within encoder"),
    "nothing": ([], "at least one module, got none"),
    "foreign": (lambda _: [nn.Linear(2, 2)], "got a Linear that is not part of it"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_wrong_layers_are_explained(name):
    layers, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        find_layers(two_towers(), layers)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (3, "got a int"),
        ([3], "paths of modules, got a int"),
        (nn.ModuleList(), "got a ModuleList; in place of a module pass its path"),
        (lambda m: m["encoder"], "several modules, got TransformerEncoder"),
    ],
)
def test_wrong_types_are_explained(layers, message):
    with pytest.raises(TypeError, match=message):
        find_layers(two_towers(), layers)


def test_a_list_that_repeats_a_module_is_a_mistake():
    layer = Layer(4)
    with pytest.raises(ValueError, match=r"one module as 0 and 1"):
        find_layers(nn.Sequential(layer, layer))


def test_shapes_that_change_are_told():
    stages = {"0": nn.Sequential(Layer(4, 8), Layer(8, 4)), "1": Layer(4)}
    model = nn.Sequential(*stages.values())
    within = find_layers(model, "0")
    with pytest.raises(ValueError, match=r"got \[2, 4\] into 0.0 and \[2, 8\] out of it"):
        check_residual(model, within, torch.ones(2, 4))
    narrow = nn.Sequential(Layer(4), nn.Linear(4, 2), Layer(2))
    with pytest.raises(ValueError, match=r"got \[2, 4\] at 0 and \[2, 2\] at 2"):
        check_residual(narrow, find_layers(narrow, ["0", "2"]), torch.ones(2, 4))


def test_stages_of_a_known_model_change_shape():
    model = vision("convnext_atto")
    with pytest.raises(ValueError, match=r"into stages.1 and \[1, 80, 28, 28\] out of it"):
        check_residual(model, find_layers(model, "stages"))
    assert check_residual(model, find_layers(model, "stages.2.blocks")) == ""


def test_the_model_is_not_changed():
    model = encoder().train()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 5, 32)
    assert check_residual(model, find_layers(model), x) == ""
    assert check_residual(model, find_layers(model), src=x) == ""
    assert all(m.training and not m._forward_hooks for m in model.modules())
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_what_cannot_be_checked_says_why():
    model = encoder()
    found = find_layers(model)
    assert check_residual(model, found) == "no example inputs are known for TransformerEncoder"
    assert "raised AssertionError: was expecting embedding dimension of 32" in check_residual(
        model, found, torch.ones(2, 5, 3)
    )
    tower = nn.ModuleDict({"layers": model.layers})
    tower.forward = lambda x: x
    reason = check_residual(tower, find_layers(tower), torch.ones(1))
    assert reason.startswith("the forward did not call layers.0 with a tensor")


def test_example_inputs_of_other_models_are_unknown():
    unet = {"block_out_channels": (4, 4), "norm_num_groups": 2, "sample_size": 8}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    assert example_inputs(image_model("UNet2DModel", **unet, **blocks, add_attention=False)) is None
