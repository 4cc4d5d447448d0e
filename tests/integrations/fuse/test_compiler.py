"""`torch.compile(model, backend="dblocks")` puts the fused ops into the graph of any model."""

import copy

import pytest
import torch
import torch.nn.functional as nnf
import torch.utils.checkpoint
from torch import nn

from dblocks.integrations.fuse.compiler import compiler
from dblocks.testing import assert_within_budget
from tools import seeded

D = 32


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    """Somebody's block of a diffusion transformer, written in the way of `style`."""

    def __init__(self, style):
        super().__init__()
        affine = style == "affine"
        self.style = style
        self.norm = nn.LayerNorm(D, elementwise_affine=affine, eps=1e-6)
        self.modulation = nn.Linear(D, 6 * D)
        self.attention = nn.Linear(D, D)
        self.mlp = nn.Linear(D, D)

    def normed(self, x):
        if self.style == "rms":
            return nnf.rms_norm(x, (D,), None, 1e-6)
        if self.style == "written_out":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.norm(x)

    def forward(self, x, cond):
        parts = self.modulation(nnf.silu(cond))[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attention(self.normed(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(shift2 + (scale2 + 1) * self.normed(x))


def inputs():
    return torch.randn(2, 5, D, generator=seeded(0)), torch.randn(2, D, generator=seeded(1))


def outcome(model, x, cond):
    """The output and all gradients."""
    x = x.clone().requires_grad_()
    y = model(x, cond)
    weight = torch.randn(y.shape, generator=seeded(2)).to(y)
    names, tensors = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad((y * weight).sum(), (x, *tensors), allow_unused=True)
    return {"y": y.detach(), **dict(zip(("x", *names), grads, strict=True))}


def compiled(model, **options):
    reports = []
    options = {"inner": "eager", "report": reports.append, **options}
    return torch.compile(model, backend=compiler, options=options), reports


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("style", ["plain", "affine", "rms", "written_out"])
def test_outputs_and_gradients_are_those_of_the_model(style, dtype):
    torch.manual_seed(0)
    model = Block(style).to(dtype)
    x, cond = (t.to(dtype) for t in inputs())
    eager = outcome(model, x, cond)
    exact = outcome(copy.deepcopy(model).double(), x.double(), cond.double())
    fused, reports = compiled(model)
    got = outcome(fused, x, cond)
    (report,) = reports
    assert report.sites == {"modulation": 2, "gate": 2}
    assert report.ops == {"adaln": 1, "residual_adaln": 1, "gated_residual": 1}
    assert not report.left
    for (name, result), want in zip(got.items(), eager.values(), strict=True):
        if want is not None:
            key = name if name in exact else name.removeprefix("_orig_mod.")
            assert_within_budget(result, exact[key], want, name)
    assert type(model) is Block


@pytest.mark.parametrize("how", ["where", "repeat_interleave", "index_select"])
def test_modulations_of_each_token(how):
    """Two modulations, such as of noisy and of clean tokens."""
    norm, linear = nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, D)
    modulation = nn.Linear(D, 4 * D)
    clean = torch.tensor([0, 0, 1, 1, 1, 0])

    def model(x, cond):
        scale, gate, other_scale, other_gate = modulation(cond)[:, None].chunk(4, dim=-1)
        scale, other_scale = 1 + scale, 1 + other_scale
        if how == "where":
            scale, gate = (
                torch.where(clean[None, :, None] == 1, a.expand(-1, 6, -1), b.expand(-1, 6, -1))
                for a, b in ((scale, other_scale), (gate, other_gate))
            )
        elif how == "repeat_interleave":
            scale, gate = (t.repeat_interleave(6, dim=1) for t in (scale, gate))
        else:
            scale, gate = (t.index_select(1, torch.zeros_like(clean)) for t in (scale, gate))
        return x + gate * linear(norm(x) * scale)

    x, cond = torch.randn(2, 6, D, generator=seeded(0)), inputs()[1]
    fused, reports = compiled(model)
    leaves = [[t.clone().requires_grad_() for t in (x, cond)] for _ in range(2)]
    results = [f(*leaf) for f, leaf in zip((fused, model), leaves, strict=True)]
    torch.testing.assert_close(*results)
    for result in results:
        result.square().sum().backward()
    for got, wanted in zip(*leaves, strict=True):
        torch.testing.assert_close(got.grad, wanted.grad)
    assert reports[0].sites == {"modulation": 1, "gate": 1}


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (2, 1), (1, 1)])
def test_few_rows_or_none(shape):
    x, cond = torch.randn(*shape, D, generator=seeded(0)), torch.randn(shape[0], D)
    model = Block("plain")
    torch.testing.assert_close(compiled(model)[0](x, cond), model(x, cond))


def test_other_lengths_need_one_more_graph():
    model, (_, cond) = Block("plain"), inputs()
    fused, reports = compiled(model)
    for length in (5, 7, 9, 11):
        x = torch.randn(2, length, D, generator=seeded(length))
        torch.testing.assert_close(fused(x, cond), model(x, cond))
    assert [r.sites for r in reports] == 2 * [{"modulation": 2, "gate": 2}]


def test_under_checkpointing():
    block, (x, cond) = Block("plain"), inputs()

    def model(x, cond):
        return torch.utils.checkpoint.checkpoint(block, x, cond, use_reentrant=False)

    fused, reports = compiled(model, inner="aot_eager")
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for f, leaf in zip((model, fused), leaves, strict=True):
        f(leaf, cond).square().sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    assert reports[0].sites == {"modulation": 2, "gate": 2}


def test_a_factor_without_one_stays_and_is_named():
    norm = nn.LayerNorm(D, elementwise_affine=False)

    def model(x, cond):
        return norm(x) * cond[:, None] + 1.0

    x, cond = inputs()
    fused, reports = compiled(model)
    assert torch.equal(fused(x, cond), model(x, cond))
    assert not reports[0].sites
    assert any("not 1 + scale" in line for line in reports[0].left)


@pytest.mark.parametrize("other", ["norm over two axes", "another eps", "changed in place"])
def test_what_is_not_the_same_function_stays(other):
    def model(x, cond):
        scale = 1 + cond[:, None]
        if other == "norm over two axes":
            return nnf.layer_norm(x, x.shape[1:]) * scale
        if other == "another eps":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + cond.abs()[:1, :1]) * scale
        y = nnf.layer_norm(x, (D,))
        cond.mul_(2)
        return y * scale + cond[:, None]

    x, cond = inputs()
    fused, reports = compiled(model)
    want = model(x, cond.clone())
    assert torch.equal(fused(x, cond.clone()), want)
    assert not reports[0].sites


def test_the_backend_is_found_by_its_name():
    assert "dblocks" in torch._dynamo.list_backends()


def test_options_that_mean_nothing_are_refused():
    x, cond = inputs()
    for options, error in (({"impl": "cuda"}, "impl must be one of"), ({"report": 3}, "function")):
        torch.compiler.reset()
        with pytest.raises(Exception, match=error):
            compiled(Block("plain"), **options)[0](x, cond)


@pytest.mark.parametrize("inner", ["inductor", "eager"])
def test_an_option_that_nobody_reads_is_refused(inner):
    options = {"inner": inner, "iner": "eager"}
    model = torch.compile(torch.nn.Linear(2, 2), backend="dblocks", options=options)
    with pytest.raises(Exception, match=r"options must be 'inner', .*got 'iner'"):
        model(torch.ones(1, 2))


def test_options_reach_inductor(monkeypatch):
    taken = {}

    def inner(module, inputs, **options):
        taken.update(options)
        return module

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: inner)
    options = {"max-autotune": False}
    torch.compile(torch.nn.Linear(2, 2), backend="dblocks", options=options)(torch.ones(1, 2))
    assert taken == {"config_patches": {"max_autotune": False}}
