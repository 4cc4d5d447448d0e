"""Converted denoisers: what they refuse, guidance, checkpoints, copies, adapters and sampling."""

import copy
import functools

import pytest
import torch
from convert_tools import adamw
from denoiser_models import FLUX, denoiser_batch, denoiser_model
from denoiser_tools import SCHEDULE, chain_of, close, condition, plain_denoised
from hub_tools import library

from dblocks import BlocksConfig, make_optimizers, train_step
from dblocks.integrations.convert import convert
from dblocks.sampling import initial_noise, sample_euler
from tools import normal, seeded

pytestmark = pytest.mark.usefixtures("one_thread")
SD3, PRX, PIXART = "SD3Transformer2DModel", "PRXTransformer2DModel", "PixArtTransformer2DModel"
TWO = ["transformer_blocks", "single_transformer_blocks"]


def blocks_of(kind, num_blocks=2, *, model=None, layers=None, **config):
    config = BlocksConfig(num_blocks, schedule=SCHEDULE, **config)
    return convert(model or denoiser_model(kind), config, task="images", layers=layers)


def refused(message, model, **options):
    with pytest.raises(ValueError, match=message):
        blocks_of(None, model=model, **options)


def test_two_lists_in_order():
    flux = denoiser_model("FluxTransformer2DModel")
    found = blocks_of(None, model=flux, layers=TWO).base_model.names
    assert found == blocks_of(None, model=flux).base_model.names
    assert found == tuple(f"{path}.{i}" for path in TWO for i in range(2))
    for wrong in (TWO[::-1], TWO[:1], [*TWO[:1], "single_transformer_blocks.1"]):
        refused(r"must be all of transf\S+ and single_\S+, in the order", flux, layers=wrong)
    one = denoiser_model("FluxTransformer2DModel", num_layers=0, num_single_layers=3)
    assert blocks_of(None, model=one).base_model.names == tuple(f"{TWO[1]}.{i}" for i in range(3))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_layers_that_are_told_their_number_are_refused():
    """Chroma's layers read a part of the modulation by their number: fewer would read others'."""
    diffusers = library("diffusers")
    sizes = {k: v for k, v in FLUX.items() if k != "num_single_layers"}
    chroma = diffusers.ChromaTransformer2DModel(
        **sizes, num_single_layers=2, approximator_num_channels=8, approximator_hidden_dim=8,
        approximator_layers=1,
    )  # fmt: skip
    assert chain_of("OvisImageTransformer2DModel", chroma, TWO)
    refused("needs a DiT.* or one of .*Wan.* got ChromaTransformer2DModel", chroma, layers=TWO)


class OfTheirOwn:
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_other_forwards_are_refused():
    model = denoiser_model(PRX)
    own = copy.deepcopy(model)
    own.__class__ = type("Mine", (OfTheirOwn, type(model)), {})
    refused("with the forward of its class, got Mine", own, layers="blocks")
    blocks = blocks_of(None, model=model)
    model.forward = functools.partial(type(model).forward, model)
    with pytest.raises(ValueError, match="must have no replaced forward"):
        blocks.loss(denoiser_batch(PRX), 0)
    refused("must have no replaced forward", model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooled_projections": None}, r"must hold \['encoder_hidden_states', 'pooled_proj"),
        ({"pooled": 1}, r"nothing but images and .* got \['pooled'\]"),
        ({"skip_layers": [0]}, r"nothing but images and .* got \['skip_layers'\]"),
        ({"negative_encoder_hidden_states": 1}, "which training would not read"),
        ({"pooled_projections": torch.zeros(1, 6)}, "one entry for each of 2 samples"),
        ({"images": torch.zeros(2, 8, 8, 4)}, r"must have shape \[N, C, H, W\] .* with C = 4"),
        ({"images": torch.zeros(2, 4, 8)}, r"must have shape \[N, C, H, W\]"),
        ({"images": torch.zeros(0, 4, 8, 8)}, "at least one sample"),
        ({"images": torch.zeros(2, 4, 9, 8)}, "sizes must be multiples of its patches"),
    ],
)
def test_batches_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        blocks_of(SD3).loss({**denoiser_batch(SD3), **changes}, 0)


def test_arguments_that_depend_on_the_config():
    blocks, batch = blocks_of("FluxTransformer2DModel"), denoiser_batch("FluxTransformer2DModel")
    guidance = batch.pop("guidance")
    with pytest.raises(ValueError, match=r"must hold \[.*'guidance'"):
        blocks.loss(batch, 0)
    model = denoiser_model("FluxTransformer2DModel", guidance_embeds=False)
    with pytest.raises(ValueError, match=r"got \['guidance'\]"):
        blocks_of(None, model=model).loss({**batch, "guidance": guidance}, 0)


def test_guidance_is_that_of_two_predictions():
    blocks, cond = blocks_of(SD3), condition(denoiser_batch(SD3))
    z, sigma = normal(2, 4, 8, 8), torch.tensor(2.0)
    null = {name: 0.5 * value for name, value in cond.items()}
    negative = {f"negative_{name}": value for name, value in null.items()}
    with torch.no_grad():
        guided = blocks(z, sigma, block=1, guidance_scale=3.0, **cond, **negative)
        two = [blocks(z, sigma, block=1, **c) for c in (null, cond)]
        torch.testing.assert_close(guided, two[0] + 3 * (two[1] - two[0]), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="needs the condition without a prompt"):
            blocks(z, sigma, block=1, guidance_scale=3.0, **cond)
        short = {"negative_encoder_hidden_states": null["encoder_hidden_states"][:, :2]}
        with pytest.raises(ValueError, match="tensors of one shape, got"):
            blocks(z, sigma, block=1, guidance_scale=3.0, **cond, **short)
        with pytest.raises(ValueError, match=r"only what is read.* got 'negative_prompt' too"):
            blocks(z, sigma, block=1, negative_prompt=1, **cond)
        with pytest.raises(ValueError, match=r"only what is read.* got 'images' too"):
            blocks(z, sigma, block=1, images=z, **cond)


def losses_of(blocks, batch, block=1):
    for p in blocks.parameters():
        p.grad = None
    loss = blocks.loss(batch, block, generator=seeded()).loss
    loss.backward()
    return loss, [p.grad for p in blocks.parameters()]


@pytest.mark.parametrize("shared", ["train", "private"])
@pytest.mark.parametrize("kind", [SD3, "FluxTransformer2DModel"])
def test_checkpoints_copies_and_one_block(kind, shared):
    blocks, batch = blocks_of(kind, shared=shared), denoiser_batch(kind)
    loss, grads = losses_of(blocks, batch)
    assert (blocks.base_model.proj_out.weight.grad is None) == (shared == "private")
    twin = copy.deepcopy(blocks)
    assert losses_of(twin, batch)[0].equal(loss)
    assert blocks.block(1).loss(batch, generator=seeded()).loss.equal(loss)
    runs = []
    layer = blocks.base_model.layers[2].layer
    # Before, since the second run ends where the last tensor is there that is needed.
    handle = layer.register_forward_pre_hook(lambda *_: runs.append(1))
    blocks.base_model.enable_gradient_checkpointing()
    again, found = losses_of(blocks, batch)
    handle.remove()
    assert len(runs) == 2
    assert again.equal(loss)
    for one, other in zip(grads, found, strict=True):
        assert one is other is None or one.equal(other)


def test_the_layers_of_others_are_not_run():
    blocks, batch = blocks_of("AuraFlowTransformer2DModel"), None
    batch = denoiser_batch("AuraFlowTransformer2DModel")
    runs = []
    for name, placed in zip(blocks.base_model.names, blocks.base_model.layers, strict=True):
        placed.layer.register_forward_hook(lambda *_, name=name: runs.append(name))
    blocks.loss(batch, 1)
    assert runs == [f"{TWO[1]}.{i}" for i in range(2)]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # The compiler looks at each tensor's.
def test_compiled_losses_and_layers():
    """All around the model in graphs, and layers that are compiled by themselves."""
    blocks, batch = blocks_of(SD3), denoiser_batch(SD3)
    draw = blocks.draw(batch, 1, generator=seeded())
    expected = blocks.loss_at(batch, 1, draw).loss
    torch.compiler.reset()
    compiled = torch.compile(blocks.loss_at, backend="eager")
    torch.testing.assert_close(compiled(batch, 1, draw).loss, expected)
    blocks.base_model.layers[2].layer.compile(backend="eager")
    torch.testing.assert_close(blocks.loss_at(batch, 1, draw).loss, expected)


def test_adapters_of_peft():
    """The wrapper is run as it is; its layers are found inside, and one block's adapters move."""
    peft = library("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "proj_out"], init_lora_weights=False)
    model = peft.get_peft_model(denoiser_model(SD3), config)
    batch = denoiser_batch(SD3)
    cond = condition(batch)
    blocks, whole = blocks_of(None, model=model), blocks_of(None, 1, model=copy.deepcopy(model))
    z, sigma = normal(2, 4, 8, 8), torch.tensor([0.1, 3.0])
    with torch.no_grad():
        close(whole(z, sigma, block=0, **cond), plain_denoised(SD3, model, z, sigma, cond))
    state = {n: p.clone() for n, p in blocks.named_parameters()}
    train_step(blocks, batch, make_optimizers(blocks, adamw), block=0, generator=seeded())
    moved = {n for n, p in blocks.named_parameters() if not p.equal(state[n])}
    assert moved
    assert all("lora" in n for n in moved)
    assert {n.split("transformer_blocks.")[1][0] for n in moved if "to_q" in n} == {"0", "1"}
    assert any("proj_out" in n for n in moved)


def test_half_of_the_output_may_be_variances_and_noise_beyond_the_steps():
    blocks, cond = blocks_of(PIXART, 1), condition(denoiser_batch(PIXART))
    model, z = blocks.base_model.model, normal(2, 4, 8, 8)
    for sigma in (torch.tensor([1e-3, 9e-3]), torch.tensor([157.0, 500.0])):
        with torch.no_grad():
            found = blocks(z, sigma, block=0, **cond)
            close(found, plain_denoised(PIXART, model, z, sigma, cond))


@pytest.mark.parametrize("kind", [SD3, "WanTransformer3DModel", "QwenImageTransformer2DModel"])
def test_they_are_sampled_in_half_precision_too(kind):
    batch = denoiser_batch(kind)
    shape = batch["images"].shape
    z = initial_noise(shape, SCHEDULE, generator=seeded())
    for dtype in (torch.float32, torch.bfloat16):
        blocks = blocks_of(None, model=denoiser_model(kind).to(dtype))
        cond = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in condition(batch).items()
        }
        found = sample_euler(blocks, z, SCHEDULE.steps(4), **cond)
        assert found.dtype == torch.float32
        assert found.shape == shape
        assert found.isfinite().all()
        assert blocks.loss({"images": batch["images"], **cond}, 1).loss.isfinite()
