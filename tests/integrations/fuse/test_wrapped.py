"""What diffusers puts around a model works on a fused one, or is refused before a change."""

import copy
import importlib
import itertools

import pytest
import torch
from fuse_tools import started

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


# diffusers' own cache fails on a plain SD3, whose last block leaves no states of the text.
WRAPPED = pytest.mark.parametrize(
    ("make", "wrap"), [(flux, cached), (flux, offloaded), (sd3, offloaded)]
)


def run(model, inputs, names=itertools.count()):  # noqa: B008
    """In a context of its own: the caches would answer a second call from the first."""
    state = importlib.import_module("diffusers.hooks.hooks")
    if hasattr(state, "_set_cache_context"):
        state._set_cache_context(model, state.CacheContext(str(next(names))))
    else:  # of older versions
        hooks.HookRegistry.check_if_exists_or_initialize(model)._set_context(str(next(names)))
    with torch.no_grad():
        return model(**inputs)[0]


@WRAPPED
def test_a_cache_or_offloading_around_a_fused_model(make, wrap):
    model, inputs = make()
    plain = copy.deepcopy(model)
    wrap(plain)
    before = run(plain, inputs)
    assert fuse_(model)
    wrap(model)
    torch.testing.assert_close(run(model, inputs), before, rtol=1e-4, atol=1e-5)
    assert unfuse_(model)
    assert torch.equal(run(model, inputs), before)


@WRAPPED
def test_a_wrapped_model_is_refused_before_a_change(make, wrap):
    model, inputs = make()
    wrap(model)
    before = run(model, inputs)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"got one set on \d+ of \d+: .*enable_cache"):
        fuse_(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(model, inputs), before)
