"""Which norms of other libraries the fused ops compute, and that they compute the same."""

import copy
import warnings
from importlib import import_module

import pytest
import torch
from convert_tools import model_of
from fuse_network import Block, inputs, registered
from hub_tools import library
from torch import nn

from dblocks import BlocksConfig, functional
from dblocks.integrations import digest
from dblocks.integrations.convert import convert
from dblocks.integrations.fuse import fuse_, modulate
from dblocks.integrations.norms import norm_spec, warn_of_subclasses
from dblocks.testing import assert_within_budget
from tools import DEVICE, normal

pytestmark = pytest.mark.usefixtures("one_thread")
N, T, D = 2, 6, 16


def of_transformers(name):
    library("transformers")
    folder = name.removesuffix("RMSNorm").lower()
    return getattr(import_module(f"transformers.models.{folder}.modeling_{folder}"), name)


def of_diffusers(name):
    library("diffusers")
    return getattr(import_module("diffusers.models.normalization"), name)


def of_timm():
    library("timm")
    return import_module("timm.layers.norm").LayerNorm


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(D, eps=1e-3),
    "LayerNorm, plain": lambda: nn.LayerNorm(D, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(D, eps=1e-3),
    "Llama": lambda: of_transformers("LlamaRMSNorm")(D, eps=1e-3),
    "Mistral": lambda: of_transformers("MistralRMSNorm")(D),
    "Qwen2": lambda: of_transformers("Qwen2RMSNorm")(D),
    "Qwen3": lambda: of_transformers("Qwen3RMSNorm")(D),
    "FP32LayerNorm": lambda: of_diffusers("FP32LayerNorm")(D, eps=1e-3),
    "RMSNorm of diffusers": lambda: of_diffusers("RMSNorm")(D, 1e-3, bias=True),
    "RMSNorm of diffusers, plain": lambda: of_diffusers("RMSNorm")(D, 1e-3, False),
    "timm": lambda: of_timm()(D, eps=1e-3),
}
MIXED = ("LayerNorm", "RMSNorm", "Llama", "FP32LayerNorm", "RMSNorm of diffusers")


def made(name, dtype=torch.float32):
    """A norm in which no parameter is 0 or 1."""
    norm = NORMS[name]().to(DEVICE)
    with torch.no_grad():
        for i, p in enumerate(norm.parameters()):
            p.copy_(normal(*p.shape, seed=i) / 4 + 1)
    return norm.to(dtype)


def formula(spec, x):
    """The norm in float64."""
    x = x.double()
    if spec.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + spec.eps).sqrt()
    y = y if spec.weight is None else y * spec.weight.double()
    return y if spec.bias is None else y + spec.bias.double()


CASES = [(name, d, d) for name in NORMS for d in (torch.float32, torch.bfloat16)]
CASES += [(name, torch.bfloat16, torch.float32) for name in MIXED]
CASES += [(name, torch.float32, torch.bfloat16) for name in ("Llama", "RMSNorm of diffusers")]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize(("name", "dtype", "weights"), CASES)
def test_known_norms_are_computed_as_by_their_own_forward(name, dtype, weights, monkeypatch):
    norm = made(name, weights)
    x = normal(N, T, D, seed=5).to(dtype)
    own, called = norm(x), []
    adaln = functional.adaln
    monkeypatch.setattr(functional, "adaln", lambda *a, **k: called.append(1) or adaln(*a, **k))
    got = modulate(norm, x, None, None)
    assert called == [1]
    assert got.dtype == own.dtype
    assert_within_budget(got, formula(norm_spec(norm, dtype), x), own)


def subclass_of(cls):
    class Sub(cls):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs) + 1

    return Sub


UNKNOWN = {
    "several dimensions": lambda: nn.LayerNorm((T, D)),
    "RMSNorm without eps": lambda: nn.RMSNorm(D),
    "Gemma": lambda: of_transformers("GemmaRMSNorm")(D),
    "Gemma2": lambda: of_transformers("Gemma2RMSNorm")(D),
    "Identity": nn.Identity,
}
SUBCLASSES = {
    "LayerNorm": lambda: (nn.LayerNorm, (D,)),
    "RMSNorm": lambda: (nn.RMSNorm, (D, 1e-3)),
    "Llama": lambda: (of_transformers("LlamaRMSNorm"), (D,)),
    "Qwen3": lambda: (of_transformers("Qwen3RMSNorm"), (D,)),
    "FP32LayerNorm": lambda: (of_diffusers("FP32LayerNorm"), (D,)),
    "RMSNorm of diffusers": lambda: (of_diffusers("RMSNorm"), (D, 1e-3)),
    "timm": lambda: (of_timm(), (D,)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_norms_run_their_own_forward(name):
    norm, x = UNKNOWN[name]().to(DEVICE), normal(N, T, D)
    assert norm_spec(norm, x.dtype) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_subclasses([norm], stacklevel=1)
    assert torch.equal(modulate(norm, x, None, None), norm(x))


@pytest.mark.parametrize("overriding", [True, False])
@pytest.mark.parametrize("name", SUBCLASSES)
def test_a_subclass_runs_its_own_forward_with_one_warning(name, overriding):
    known, arguments = SUBCLASSES[name]()
    cls = subclass_of(known) if overriding else type("Sub", (known,), {})
    norm, x = cls(*arguments).to(DEVICE), normal(N, T, D)
    assert norm_spec(norm, x.dtype) is None
    message = rf"not fused: .*Sub, a subclass of {known.__name__}, .* use {known.__name__} itself"
    with pytest.warns(UserWarning, match=message) as caught:
        warn_of_subclasses([norm, cls(*arguments)], stacklevel=1)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_subclasses([norm], stacklevel=1)
    assert torch.equal(modulate(norm, x, None, None), norm(x))


def test_fuse_warns_of_the_norms_of_what_it_replaces():
    block = Block(norm=subclass_of(nn.LayerNorm)).to(DEVICE)
    plain = copy.deepcopy(block)
    with registered(), pytest.warns(UserWarning, match=r"not fused: .*Sub, a sub") as caught:
        assert [r.name for r in fuse_(nn.ModuleList([block, nn.LayerNorm(D)]))] == ["0"]
    assert [w.filename for w in caught] == [__file__]
    x, c = inputs()
    torch.testing.assert_close(block(x, c), plain(x, c))


def test_convert_warns_of_the_norms_of_the_layers():
    model = model_of("llama")
    norm = model.model.layers[0].input_layernorm
    norm.__class__ = subclass_of(type(norm))
    with pytest.warns(UserWarning, match=r"not fused: .*Sub, a subclass of LlamaRMSNorm") as caught:
        convert(model, BlocksConfig(2), task="tokens")
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("name", ["LayerNorm", "Llama", "RMSNorm of diffusers"])
def test_a_norm_that_is_first_seen_by_a_compiled_forward_is_known(name):
    digest.digest.cache_clear()
    norm, x, scale = made(name), normal(N, T, D), normal(N, D, seed=1)
    torch._dynamo.reset()
    compiled = torch.compile(modulate, fullgraph=True, backend="eager")
    got = compiled(norm, x, None, scale)
    assert torch.equal(got, modulate(norm, x, None, scale))
