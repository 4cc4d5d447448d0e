"""What diffusers puts around a model works on a fused one, or is refused before a change."""

import copy
import importlib
import itertools
from functools import partial

import pytest
import torch
from fuse_tools import started
from torch.utils.checkpoint import checkpoint

from tools import normal

pytest.importorskip("diffusers")
hooks = pytest.importorskip("diffusers.hooks")

from diffusers import FluxTransformer2DModel, SD3Transformer2DModel  # noqa: E402

from dblocks.integrations.fuse import fuse_, unfuse_  # noqa: E402


def flux():
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    inputs = {
        "hidden_states": normal(1, 16, 4), "encoder_hidden_states": normal(1, 6, 32, seed=1),
        "pooled_projections": normal(1, 32, seed=2), "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip
    return started(model).eval(), inputs


def sd3():
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    inputs = {
        "hidden_states": normal(1, 4, 8, 8), "encoder_hidden_states": normal(1, 6, 32, seed=1),
        "pooled_projections": normal(1, 64, seed=2), "timestep": torch.tensor([1.0]),
    }  # fmt: skip
    return started(model).eval(), inputs


def cached(model):
    hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=1e-9))


def offloaded(model):
    hooks.apply_group_offloading(
        model, onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def mag_cached(model):
    hooks.apply_mag_cache(
        model,
        hooks.MagCacheConfig(
            threshold=0.5, retention_ratio=0.0, num_inference_steps=4, mag_ratios=[1.0] * 4
        ),
    )


def sea_cached(model):
    def seen(_, args, kwargs):
        return [kwargs["hidden_states"].reshape(4, 1, 4, 4)]

    hooks.apply_sea_cache(model, hooks.SeaCacheConfig(raw_vision_callback=seen))


def block_skipped(model):
    hooks.apply_layer_skip(
        model, hooks.LayerSkipConfig(indices=[1], fqn="transformer_blocks", dropout=1.0)
    )


def mlp_skipped(model):
    hooks.apply_layer_skip(
        model,
        hooks.LayerSkipConfig(indices=[1], fqn="transformer_blocks", skip_attention=False),
    )


def checkpointed(model):
    """As docs/interop.md says."""
    for block in model.transformer_blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def hooked_by_accelerate(model):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def adapted(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = ["to_q", "to_out.0", "linear", "net.2"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


# What sets forward on a block must come after fuse_. diffusers' own caches and its skipping of
# blocks fail on a plain SD3.
ON_BLOCKS = [
    (flux, cached), (flux, mag_cached), (flux, sea_cached), (flux, offloaded), (sd3, offloaded),
    (flux, block_skipped), (flux, checkpointed), (sd3, checkpointed),
]  # fmt: skip
WITHIN = [
    (flux, mlp_skipped), (sd3, mlp_skipped), (flux, adapted), (sd3, adapted),
    (flux, hooked_by_accelerate), (sd3, hooked_by_accelerate),
]  # fmt: skip
NAMES = itertools.count()


def run(model, inputs, steps=3):
    """Steps in a context of their own: the caches would answer another call from the first."""
    state = importlib.import_module("diffusers.hooks.hooks")
    name = str(next(NAMES))
    if hasattr(state, "_set_cache_context"):
        state._set_cache_context(model, state.CacheContext(name))
    else:  # of older versions
        hooks.HookRegistry.check_if_exists_or_initialize(model)._set_context(name)
    results = []
    with torch.no_grad():
        for step in range(steps):
            states = inputs["hidden_states"] * (1 + 0.1 * step)
            results.append(model(**inputs | {"hidden_states": states})[0])
    return torch.stack(results)


def gradients(model, inputs):
    model(**inputs)[0].square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("make", "wrap"), ON_BLOCKS + WITHIN)
def test_a_wrapper_around_a_fused_model(make, wrap):
    model, inputs = make()
    plain = copy.deepcopy(model)
    wrap(plain)
    before = run(plain, inputs)
    assert fuse_(model)
    wrap(model)
    torch.testing.assert_close(run(model, inputs), before, rtol=1e-4, atol=1e-5)
    assert unfuse_(model)
    assert torch.equal(run(model, inputs), before)


@pytest.mark.parametrize(("make", "wrap"), ON_BLOCKS)
def test_a_wrapped_model_is_refused_before_a_change(make, wrap):
    model, inputs = make()
    wrap(model)
    before = run(model, inputs)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"got one set on \d+ of \d+: .*enable_cache"):
        fuse_(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(model, inputs), before)


@pytest.mark.parametrize(("make", "wrap"), WITHIN)
def test_fusing_around_what_is_wrapped_inside_blocks(make, wrap):
    model, inputs = make()
    wrap(model)
    before = run(model, inputs)
    assert fuse_(model)
    torch.testing.assert_close(run(model, inputs), before, rtol=1e-4, atol=1e-5)
    assert unfuse_(model)
    assert torch.equal(run(model, inputs), before)


@pytest.mark.parametrize("wrap", [checkpointed, adapted])
def test_gradients_of_a_wrapped_and_fused_model(wrap):
    model, inputs = flux()
    plain = copy.deepcopy(model)
    wrap(plain)
    before = gradients(plain, inputs)
    fuse_(model)
    wrap(model)
    got = gradients(model, inputs)
    assert got.keys() == before.keys()
    for name, gradient in before.items():
        scale = max(g.abs().max() for g in before.values())
        torch.testing.assert_close(got[name] / scale, gradient / scale, rtol=1e-3, atol=1e-5)
