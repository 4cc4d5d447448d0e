import copy
import inspect
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from fuse_tools import HEAD, HEADS, D, N, assert_same_function, results, started
from hub_tools import library
from torch import nn

from dblocks.integrations.fuse import fuse_, unfuse_
from dblocks.integrations.fuse.fusion import Fusion, fusion_of
from dblocks.testing import assert_within_budget
from tools import DEVICE, ROOT, normal

diffusers = library("diffusers")
attention = import_module("diffusers.models.attention")
normalization = import_module("diffusers.models.normalization")
flux_blocks = import_module("diffusers.models.transformers.transformer_flux")
sd3_blocks = import_module("diffusers.models.transformers.transformer_sd3")

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"num_attention_heads": HEADS, "attention_head_dim": HEAD}
IMAGE = {"sample_size": 8, "in_channels": 3, "patch_size": 2}
TEXT = {"joint_attention_dim": 20, "pooled_projection_dim": 24}


def images(**more):
    return {"hidden_states": normal(N, 3, 8, 8), **more}


def dit():
    model = diffusers.DiTTransformer2DModel(
        **SIZES, **IMAGE, num_layers=2, num_embeds_ada_norm=10, norm_eps=1e-4
    )
    labels = torch.tensor([1, 4], device=DEVICE)
    return model, images(), {"class_labels": labels}


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        **SIZES, **IMAGE, num_layers=2, cross_attention_dim=D, caption_channels=12,
        use_additional_conditions=False, norm_eps=1e-4, norm_elementwise_affine=True,
    )  # fmt: skip
    size = {"resolution": None, "aspect_ratio": None}
    return model, images(encoder_hidden_states=normal(N, 5, 12)), {"added_cond_kwargs": size}


def sd3():
    model = diffusers.SD3Transformer2DModel(
        **SIZES, **IMAGE, **TEXT, num_layers=3, out_channels=3, caption_projection_dim=D,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    text = {"encoder_hidden_states": normal(N, 5, 20), "pooled_projections": normal(N, 24)}
    return model, images(**text), {}


def flux():
    model = diffusers.FluxTransformer2DModel(
        **SIZES, **TEXT, in_channels=8, num_layers=1, num_single_layers=1, axes_dims_rope=(4, 6, 6)
    )
    floats = {
        "hidden_states": normal(N, 16, 8),
        "encoder_hidden_states": normal(N, 5, 20),
        "pooled_projections": normal(N, 24),
    }
    rows = torch.arange(16, device=DEVICE)
    image = torch.stack([0 * rows, rows // 4, rows % 4], dim=1).float()
    return model, floats, {"img_ids": image, "txt_ids": torch.zeros(5, 3, device=DEVICE)}


MODELS = {"dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux}
NORM, SUM, BOTH = "adaln", "gated_residual", "residual_adaln + gated_residual"
BASIC, JOINT = "BasicTransformerBlock", "JointTransformerBlock"
EXPECTED = {
    "dit": [
        (f"transformer_blocks.{i}{name}", before, after)
        for i in range(2)
        for name, before, after in (("", BASIC, BOTH), (".norm1", "AdaLayerNormZero", NORM))
    ],
    "pixart": [(f"transformer_blocks.{i}", BASIC, BOTH) for i in range(2)],
    "sd3": [
        ("transformer_blocks.0", JOINT, BOTH),
        ("transformer_blocks.0.norm1", "SD35AdaLayerNormZeroX", NORM),
        ("transformer_blocks.0.norm1_context", "AdaLayerNormZero", NORM),
        ("transformer_blocks.1", JOINT, BOTH),
        ("transformer_blocks.1.norm1", "AdaLayerNormZero", NORM),
        ("transformer_blocks.1.norm1_context", "AdaLayerNormZero", NORM),
        ("transformer_blocks.2", JOINT, BOTH),
        ("transformer_blocks.2.norm1", "AdaLayerNormZero", NORM),
        ("transformer_blocks.2.norm1_context", "AdaLayerNormContinuous", NORM),
        ("norm_out", "AdaLayerNormContinuous", NORM),
    ],
    "flux": [
        ("transformer_blocks.0", "FluxTransformerBlock", BOTH),
        ("transformer_blocks.0.norm1", "AdaLayerNormZero", NORM),
        ("transformer_blocks.0.norm1_context", "AdaLayerNormZero", NORM),
        ("single_transformer_blocks.0", "FluxSingleTransformerBlock", SUM),
        ("single_transformer_blocks.0.norm", "AdaLayerNormZeroSingle", NORM),
        ("norm_out", "AdaLayerNormContinuous", NORM),
    ],
}


def built(name):
    torch.manual_seed(0)
    model, floats, others = MODELS[name]()
    timestep = torch.tensor([0.3, 0.7] if name == "flux" else [3, 700], device=DEVICE)
    return started(model), floats, {**others, "timestep": timestep}


def output(model, floats, others):
    return model(**floats, **others, return_dict=False)[0]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_replaced_and_restored(name):
    model, floats, others = built(name)
    model.eval()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    types = [type(m) for m in model.modules()]
    before = output(model, floats, others)
    replaced = fuse_(model)
    assert [tuple(r) for r in replaced] == EXPECTED[name]
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert {type(m).__name__ for m in model.modules()} == {t.__name__ for t in types}
    after = output(model, floats, others)
    assert fuse_(model) == []
    assert torch.equal(output(model, floats, others), after)
    assert unfuse_(model) == [r.name for r in replaced]
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(output(model, floats, others), before)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_within_budget(name, dtype, training):
    plain, floats, others = built(name)
    plain.train(training)
    fused = copy.deepcopy(plain)
    fuse_(fused)
    assert_same_function(plain, fused, floats, others | {"return_dict": False}, dtype)


@pytest.mark.parametrize("name", MODELS)
def test_triton_kernels(name):
    plain, floats, others = built(name)
    fused = copy.deepcopy(plain)
    fuse_(fused, impl="triton")
    ref64, eager, got = (
        output(nn.Module.to(copy.deepcopy(model).eval(), dtype),
               {k: v.to(dtype) for k, v in floats.items()}, others)
        for model, dtype in ((plain, torch.float64), (plain, torch.float32), (fused, torch.float32))
    )  # fmt: skip
    assert_within_budget(got, ref64, eager)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing(name):
    model, floats, others = built(name)
    fuse_(model.eval())
    others["return_dict"] = False
    expected = results(model, floats, others, torch.float32)
    model.train().enable_gradient_checkpointing()
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.eval()  # its dropout
    got = results(model, floats, others, torch.float32)
    for key, value in expected.items():
        assert got[key] is value is None or torch.equal(got[key], value), key


def test_subclasses_of_blocks():
    class Same(flux_blocks.FluxSingleTransformerBlock):
        pass

    class Other(flux_blocks.FluxSingleTransformerBlock):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = nn.ModuleList([Same(D, HEADS, HEAD), Other(D, HEADS, HEAD)])
    assert [r.name for r in fuse_(model)] == ["0", "0.norm", "1.norm"]


def test_hooks_on_a_norm_inside_a_block_see_its_values():
    model, floats, others = built("sd3")
    plain = copy.deepcopy(model)
    fuse_(model)
    seen = {}
    for key, m in (("fused", model), ("plain", plain)):
        norm = m.transformer_blocks[0].norm2
        norm.register_forward_hook(lambda _, args, out, key=key: seen.update({key: out}))
        output(m, floats, others)
    torch.testing.assert_close(seen["fused"], seen["plain"], rtol=1e-3, atol=1e-3)


def test_a_forward_with_another_source_is_left_with_a_warning(monkeypatch):
    def forward(self, hidden_states, temb):
        return hidden_states

    monkeypatch.setattr(sd3_blocks.SD3SingleTransformerBlock, "forward", forward)
    block = sd3_blocks.SD3SingleTransformerBlock(D, HEADS, HEAD)
    with pytest.warns(UserWarning, match=r"not fused: .*SD3SingleTransformerBlock, whose forward"):
        assert [r.name for r in fuse_(block)] == ["norm1"]
    with pytest.raises(ValueError, match=r"SD3SingleTransformerBlock, whose forward .* filter_fn"):
        fuse_(block, impl="reference")


def test_forwards_take_the_arguments_of_the_originals():
    from dblocks.integrations.fuse.diffusers import BY_CLASS, FUSIONS

    assert len(BY_CLASS) == len(FUSIONS)
    for cls, fusion in BY_CLASS.items():
        fused, plain = (inspect.signature(f).parameters for f in (fusion.forward, cls.forward))
        assert list(fused) == list(plain)
        assert [p.default for p in fused.values()] == [p.default for p in plain.values()]
        assert isinstance(fusion_of(cls), Fusion), cls


@pytest.mark.slow
def test_a_pickled_model_loads_in_a_fresh_process(tmp_path):
    model, floats, others = built("pixart")
    fuse_(model.eval())
    torch.save((model, floats, others, output(model, floats, others)), tmp_path / "model.pt")
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from hub_tools import stub_torchvision
stub_torchvision()
import torch
from dblocks.integrations.fuse import unfuse_
model, floats, others, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
got = model(**floats, **others, return_dict=False)[0]
torch.testing.assert_close(got, expected)
print(*unfuse_(model))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["transformer_blocks.0", "transformer_blocks.1"]
