import copy
from importlib import import_module

import pytest
import torch
from fuse_tools import HEAD, HEADS, D, N, assert_same_function, started
from hub_tools import library
from torch import nn

from dblocks.integrations.fuse import fuse_, modulate
from tools import DEVICE, normal

library("diffusers")
attention = import_module("diffusers.models.attention")
normalization = import_module("diffusers.models.normalization")
flux_blocks = import_module("diffusers.models.transformers.transformer_flux")
sd3_blocks = import_module("diffusers.models.transformers.transformer_sd3")

pytestmark = pytest.mark.usefixtures("one_thread")
NORM, BOTH = "adaln", "residual_adaln + gated_residual"


def norm_case(name):
    """A norm of diffusers, the inputs of its forward, and what it returns besides tensors."""
    x, c = normal(N, 6, D), normal(N, D, seed=1)
    match name:
        case "zero, fp32":
            norm = normalization.AdaLayerNormZero(D, norm_type="fp32_layer_norm")
            return norm, {"x": x, "emb": c}, {}
        case "zero single":
            return normalization.AdaLayerNormZeroSingle(D), {"x": x, "emb": c}, {}
        case "sd3.5":
            floats = {"hidden_states": x, "emb": c}
            return normalization.SD35AdaLayerNormZeroX(D), floats, {}
        case "continuous, layer, affine":
            norm = normalization.AdaLayerNormContinuous(D, D, eps=1e-2)
            return norm, {"x": x, "conditioning_embedding": c}, {}
        case "continuous, rms":
            norm = normalization.AdaLayerNormContinuous(
                D, D, elementwise_affine=False, norm_type="rms_norm"
            )
            return norm, {"x": x, "conditioning_embedding": c}, {}
        case "continuous, rms, affine":
            norm = normalization.AdaLayerNormContinuous(D, D, norm_type="rms_norm")
            return norm, {"x": x, "conditioning_embedding": c}, {}
        case "timestep":
            norm = normalization.AdaLayerNorm(D, 10, norm_elementwise_affine=True)
            return norm, {"x": x}, {"timestep": torch.tensor(3, device=DEVICE)}
        case "vectors":
            norm = normalization.AdaLayerNorm(D, output_dim=2 * D, chunk_dim=1)
            return norm, {"x": x, "temb": c}, {}


NORM_CASES = (
    "zero, fp32", "zero single", "sd3.5", "continuous, layer, affine", "continuous, rms",
    "continuous, rms, affine", "timestep", "vectors",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", NORM_CASES)
def test_norms(case, dtype):
    norm, floats, others = norm_case(case)
    plain = started(norm)
    fused = copy.deepcopy(plain)
    assert [r.after for r in fuse_(fused)] == [NORM]
    assert_same_function(plain, fused, floats, others, dtype)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
def test_dtype_of_rms_norm(affine, dtype, weight):
    norm = normalization.RMSNorm(D, 1e-6, affine, bias=affine).to(DEVICE, weight)
    fuse_(normalization.AdaLayerNormZero(D))
    x = normal(N, 6, D).to(dtype)
    assert modulate(norm, x, None, None).dtype == norm(x).dtype


def block_case(name):
    """A block of diffusers and the inputs of its forward."""
    x, context, temb = normal(N, 6, D), normal(N, 4, D, seed=1), normal(N, D, seed=2)
    basic = {"dim": D, "num_attention_heads": HEADS, "attention_head_dim": HEAD}
    streams = {"hidden_states": x, "encoder_hidden_states": context, "temb": temb}
    single = {"hidden_states": x, "timestep": normal(N, 6 * D, seed=2)}
    labels = {"timestep": torch.tensor([3, 5]), "class_labels": torch.tensor([1, 2])}
    labels = {k: v.to(DEVICE) for k, v in labels.items()}
    match name:
        case "single, no cross attention":
            return attention.BasicTransformerBlock(**basic, norm_type="ada_norm_single"), single, {}
        case "single, chunked":
            block = attention.BasicTransformerBlock(
                **basic, norm_type="ada_norm_single", cross_attention_dim=D
            )
            block.set_chunk_feed_forward(3, 1)
            return block, single | {"encoder_hidden_states": context}, {}
        case "zero, two attentions":
            block = attention.BasicTransformerBlock(
                **basic, norm_type="ada_norm_zero", num_embeds_ada_norm=9, cross_attention_dim=D
            )
            return block, {"hidden_states": x, "encoder_hidden_states": context}, labels
        case "zero, only cross attention":
            block = attention.BasicTransformerBlock(
                **basic, norm_type="ada_norm_zero", num_embeds_ada_norm=9, cross_attention_dim=D,
                only_cross_attention=True,
            )  # fmt: skip
            return block, {"hidden_states": x, "encoder_hidden_states": context}, labels
        case "joint, chunked":
            block = attention.JointTransformerBlock(D, HEADS, HEAD)
            block.set_chunk_feed_forward(2, 1)
            return block, streams, {}
        case "sd3 single":
            block = sd3_blocks.SD3SingleTransformerBlock(D, HEADS, HEAD)
            return block, {"hidden_states": x, "temb": temb}, {}
        case "flux with ip adapter":
            block = flux_blocks.FluxTransformerBlock(D, HEADS, HEAD)
            plain = type(block.attn).forward
            block.attn.forward = lambda *a, **k: (*plain(block.attn, *a, **k), context.new_ones(1))
            return block, streams, {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    ["single, no cross attention", "single, chunked", "zero, two attentions",
     "zero, only cross attention", "joint, chunked", "sd3 single"],
)  # fmt: skip
def test_blocks(case, dtype):
    block, floats, others = block_case(case)
    plain = started(block).eval()
    fused = copy.deepcopy(plain)
    assert fuse_(fused)[0] == ("", type(plain).__name__, BOTH)
    assert_same_function(plain, fused, floats, others, dtype)


def test_flux_adds_what_an_ip_adapter_returns():
    block, floats, _ = block_case("flux with ip adapter")
    started(block)
    expected = block(**floats)
    fuse_(block)
    for got, value in zip(block(**floats), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "linear"),
    [("FluxTransformerBlock", "ff_context.net.2"), ("FluxSingleTransformerBlock", "proj_out")],
)
def test_flux_clips_float16_as_before(name, linear):
    block = started(getattr(flux_blocks, name)(D, HEADS, HEAD)).half()
    nn.init.constant_(block.get_submodule(linear).bias, 6e4)
    streams = {
        "hidden_states": normal(N, 6, D).half(),
        "encoder_hidden_states": normal(N, 4, D, seed=1).half(),
        "temb": 10 * normal(N, D, seed=2).half(),
    }
    expected = block(**streams)[0].abs().max()
    fuse_(block)
    assert block(**streams)[0].abs().max() == expected == 65504


def test_blocks_without_modulation_are_left():
    block = attention.BasicTransformerBlock(D, HEADS, HEAD)
    assert fuse_(block) == []
    positions = attention.BasicTransformerBlock(
        D, HEADS, HEAD, norm_type="ada_norm_single", positional_embeddings="sinusoidal",
        num_positional_embeddings=8,
    )  # fmt: skip
    assert fuse_(positions) == []


def test_what_the_fused_block_does_not_take_goes_to_the_original():
    block, floats, _ = block_case("single, no cross attention")
    plain = started(block)
    fused = copy.deepcopy(plain)
    fuse_(fused)
    scale = {"cross_attention_kwargs": {"scale": 1.0}}
    assert torch.equal(fused(**floats, **scale), plain(**floats, **scale))


def test_dropout_draws_as_before():
    block = attention.BasicTransformerBlock(
        D, HEADS, HEAD, dropout=0.5, norm_type="ada_norm_single", final_dropout=True
    )
    plain = started(block)
    fused = copy.deepcopy(plain)
    fuse_(fused)
    floats = {"hidden_states": normal(N, 6, D), "timestep": normal(N, 6 * D, seed=2)}
    assert_same_function(plain, fused, floats, {}, torch.float32)


@pytest.mark.filterwarnings("ignore")  # of torch.export itself
def test_a_fused_block_is_exported():
    block, floats, _ = block_case("single, chunked")
    fused = started(block).eval()
    fused.set_chunk_feed_forward(None)
    fuse_(fused)
    program = torch.export.export(fused, (), kwargs=floats)
    assert any("dblocks" in str(node.target) for node in program.graph.nodes)
    own, ours = fused(**floats), program.module()(**floats)
    pairs = zip(own, ours, strict=True) if isinstance(own, tuple) else [(own, ours)]
    assert all(one.equal(other) for one, other in pairs)


def test_fused_block_compiles_to_one_graph():
    block, floats, _ = block_case("single, chunked")
    plain = started(block)
    plain.set_chunk_feed_forward(None)
    fused = copy.deepcopy(plain)
    fuse_(fused)
    torch._dynamo.reset()
    compiled = torch.compile(lambda m, **k: m(**k), fullgraph=True, backend="aot_eager")
    assert_same_function(plain, fused, floats, {}, torch.float32, call=compiled)
