"""What cannot be converted, and what is said of it; nothing has changed then."""

import pytest
import torch
from convert_tools import MASK, batch_of, blocks_of, model_of
from hub_tools import library
from torch import nn

from dblocks import BlocksConfig, MaskSchedule
from dblocks.integrations.convert import convert
from dblocks.integrations.convert.tasks import library_of
from dblocks.models import ViT, ViTConfig

pytestmark = pytest.mark.usefixtures("one_thread")
NOISE, MASKS = BlocksConfig(2), BlocksConfig(2, schedule=MaskSchedule())


def refused(model, message, config=NOISE, error=ValueError, **options):
    """`convert` raises, and leaves the model as it was."""
    members = [set(vars(m)) | set(m._modules) for m in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    training = [m.training for m in model.modules()]
    with pytest.raises(error, match=message):
        convert(model, config, **options)
    assert members == [set(vars(m)) | set(m._modules) for m in model.modules()]
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert flags == [(p.requires_grad, p.grad) for p in model.parameters()]
    assert training == [m.training for m in model.modules()]


def small(name, **options):
    transformers = library("transformers")
    config = blocks_of("llama").base_model.config
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4} | options
    kind = getattr(transformers, name)
    return kind(config if "Llama" in name else kind.config_class(vocab_size=23, **sizes))


def test_arguments():
    model = model_of("llama")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        convert("llama", NOISE, task="tokens")
    refused(model, "config must be a BlocksConfig, got 2 of type int", 2, TypeError, task="tokens")
    refused(model, "task must be one of .* got 'text'", task="text")
    refused(model, "clean_loss_weight must not be neg.* -1", task="tokens", clean_loss_weight=-1)
    dit = model_of("dit")
    refused(dit, "and 0 for images, .* got 1", task="images", clean_loss_weight=1)
    frozen = BlocksConfig(9, shared="frozen")
    refused(model, "at most the number of layers, 4, got 9", frozen, task="tokens")


@pytest.mark.parametrize("kind", ["llama", "timm", "dit"])
def test_layers(kind):
    model, task = model_of(kind), {"llama": "tokens", "timm": "classes", "dit": "images"}[kind]
    path = {"llama": "model.layers", "timm": "blocks", "dit": "transformer_blocks"}[kind]
    blocks = convert(model, NOISE, task=task, layers=path)
    assert blocks.base_model.names == tuple(f"{path}.{i}" for i in range(4))
    some = [f"{path}.1", f"{path}.3"]
    refused(model, "must compute what its embedding, layers and", task=task, layers=some)
    two = convert(model, NOISE, task=task, layers=some, check=False)
    assert two.layer_ranges == ((0, 1), (1, 2))
    chosen = convert(model, NOISE, task=task, layers=lambda m: list(m.get_submodule(path)))
    assert chosen.base_model.names == tuple(f"{path}.{i}" for i in range(4))
    refused(model, f"layers must name modules .* near names: {path}", task=task, layers=f"{path}s")
    refused(model, "layers must be distinct", task=task, layers=[f"{path}.1", f"{path}.1"])


def test_several_lists_of_layers():
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    for which in ("encoder", "decoder"):
        sizes |= {f"{which}_layers": 2, f"{which}_attention_heads": 4}
    bart = small("BartForConditionalGeneration", **sizes)
    message = r"but it has 2: model\.(encoder|decoder)\.layers .* model\.(decoder|encoder)\.layers"
    refused(bart, message, task="tokens")
    library("diffusers")
    from diffusers import FluxTransformer2DModel

    flux = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    one = "transformer_blocks"
    refused(flux, f"must be all of {one} and single_{one}, .* order", task="images", layers=one)


def test_heads_that_are_missing():
    transformers = library("transformers")
    refused(small("LlamaModel"), "load it as AutoModelForCausalLM", task="tokens")
    refused(small("BertModel"), "load it as AutoModelForMaskedLM", MASKS,
            task="tokens", mask_token_id=MASK)  # fmt: skip
    vit = transformers.ViTModel(model_of("vit").config)
    refused(vit, "load it as AutoModelForImageClassification", task="classes")
    refused(model_of("timm", num_classes=0), "create it with num_classes=", task="classes")


def test_families_tasks_and_schedules_that_do_not_fit():
    llama, bert, vit = model_of("llama"), model_of("bert"), model_of("vit")
    refused(llama, "'classes' needs one of .* got 'llama'", task="classes")
    refused(llama, "task 'images' must be one that a LlamaForCausalLM has", task="images")
    refused(llama, "with a MaskSchedule needs one of .* got 'llama'", MASKS, task="tokens")
    refused(
        bert,
        "with a NoiseSchedule needs .* got 'bert' .* use task .* with a MaskSchedule, or",
        task="tokens",
    )
    refused(vit, "with a NoiseSchedule needs one of .* got 'vit'", task="tokens")
    refused(vit, "must be one of .* with a MaskSchedule", MASKS, task="classes")
    refused(model_of("timm"), "must be one of .* with a MaskSchedule", MASKS, task="classes")
    refused(model_of("timm"), "task 'tokens' must be one that a VisionTr", task="tokens")
    refused(model_of("dit"), "noise levels need blocks with a NoiseSchedule", MASKS,
            error=TypeError, task="images")  # fmt: skip
    refused(model_of("dit"), "task 'classes' must be one that a DiTTr", task="classes")
    mixer = library("timm").create_model("mixer_s32_224", num_classes=2)
    refused(
        mixer, "'classes' needs a VisionTransformer or an Eva of timm, got MlpMixer", task="classes"
    )
    ours = ViT(ViTConfig(image_size=8, width=16, heads=2, depth=2))
    refused(ours, "task 'classes' must be one that a ViT has", task="classes")
    refused(nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))), "must be one that",
            task="classes")  # fmt: skip


@pytest.mark.parametrize("mask", [None, -1, 23])
def test_masks_that_are_no_tokens(mask):
    refused(model_of("bert"), r"mask_token_id must be a token in 0\.\.22, got .*; pass tokenizer",
            MASKS, task="tokens", mask_token_id=mask)  # fmt: skip


def test_layers_of_unknown_form():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x, **_):
            return x + self.inner(x)

    model = model_of("timm")
    model.blocks = nn.Sequential(*(Odd() for _ in range(4)))
    refused(model, r"blocks\.0 must be a transformer layer .* got a Odd of \['inner'\]",
            task="classes")  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "missing", "message"),
    [
        ("llama", "tokens", "must hold a tensor 'tokens'"),
        ("vit", "images", "images"),
        ("vit", "labels", "labels"),
        ("bert-classes", "tokens", "tokens"),
        ("timm", "labels", "labels"),
        ("dit", "images", "images"),
        ("dit", "labels", "labels"),
    ],
)
def test_batches_that_lack_a_part(kind, missing, message):
    batch = {k: v for k, v in batch_of(kind).items() if k != missing}
    with pytest.raises(ValueError, match=message):
        blocks_of(kind).loss(batch, 0)


def test_images_that_do_not_fit_a_dit():
    blocks, labels = blocks_of("dit"), torch.zeros(2, dtype=torch.int64)
    for shape, message in (((2, 3, 8, 8), r"\[N, 1, H, W\]"), ((2, 1, 7, 8), "multiples of patch")):
        with pytest.raises(ValueError, match=message):
            blocks.loss({"images": torch.zeros(shape), "labels": labels}, 0)
    with pytest.raises(ValueError, match="guidance"):
        blocks_of("vit").bind(guidance_scale=2.0, images=batch_of("vit")["images"])(
            torch.zeros(3, 16), torch.tensor(1.0)
        )


def test_libraries():
    assert library_of(model_of("llama")) == "transformers"
    assert library_of(model_of("timm")) == "timm"
    assert library_of(model_of("dit")) == "diffusers"
    assert library_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "dit"])
def test_a_batch_of_no_samples_is_refused(kind):
    empty = {key: value[:0] for key, value in batch_of(kind).items()}
    with pytest.raises(ValueError, match="at least one sample"):
        blocks_of(kind).loss(empty, 0)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"clean_loss_weight": float("nan")}, ValueError),
        ({"clean_loss_weight": float("inf")}, ValueError),
        ({"clean_loss_weight": "1"}, TypeError),
        ({"embed_scale": 0.0}, ValueError),
        ({"embed_scale": float("nan")}, ValueError),
        ({"tokens_per_sigma": 0}, ValueError),
        ({"tokens_per_sigma": 1.5}, ValueError),
        ({"rows": "triple"}, ValueError),
        ({"head": "exact"}, ValueError),
    ],
)
def test_options_out_of_range(options, error):
    with pytest.raises(error, match=next(iter(options))):
        convert(model_of("llama"), BlocksConfig(2), task="tokens", **options)
