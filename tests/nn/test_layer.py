import math

import pytest
import torch
import torch.nn.functional as nnf
from torch import nn

from dblocks.nn import (
    AdaLayerNorm,
    Attention,
    Modulation,
    NoiseEmbedding,
    Norm,
    SwiGLU,
    TransformerLayer,
    rotary_of,
)
from dblocks.nn.conditioning import inverse_silu

KINDS = ("dit", "official", "none")


def randomized(module):
    """Every parameter random, so that no zero initialisation hides a branch."""
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


def test_noise_embedding_is_cosines_then_sines():
    embedding = NoiseEmbedding(16)
    seen = []
    embedding.fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    c_noise = torch.tensor([math.log(80) / 4, math.log(0.002) / 4])
    assert embedding(c_noise).shape == (2, 16)
    frequencies = [math.exp(-math.log(1e4) * k / 128) for k in range(128)]
    angle = c_noise.double()[:, None] * torch.tensor(frequencies).double()
    expected = torch.cat([angle.cos(), angle.sin()], dim=1).float()
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=0)
    assert embedding(torch.zeros(2, 5)).shape == (2, 5, 16)


def test_noise_embedding_is_float32_under_autocast():
    embedding = NoiseEmbedding(16)
    c_noise = torch.linspace(-1.5, 1.1, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = embedding(c_noise)
    assert got.dtype == torch.float32
    assert torch.equal(got, embedding(c_noise))
    assert embedding.bfloat16()(c_noise).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["dit", "official"])
def test_modulation_is_views_of_one_tensor(kind):
    modulation = randomized(Modulation(12, 6, kind))
    width = modulation.linear.in_features
    assert width == (12 if kind == "dit" else 2)
    chunks = modulation(torch.randn(3, width), 3)
    assert all(c.shape == (3, 12) and c.stride() == (72, 1) for c in chunks)
    assert len({c.untyped_storage().data_ptr() for c in chunks}) == 1
    assert modulation(torch.randn(3, 5, width), 3)[0].shape == (3, 5, 12)


@pytest.mark.parametrize("kind", ["dit", "official"])
def test_null_conditioning_is_that_of_a_zero_vector(kind):
    modulation = randomized(Modulation(12, 2, kind))
    zeros = torch.zeros(3, modulation.linear.in_features)
    for null, zero in zip(modulation(None, 3), modulation(zeros, 3), strict=True):
        torch.testing.assert_close(null, zero)


@pytest.mark.parametrize("kind", KINDS)
def test_ada_layer_norm(kind):
    norm = randomized(AdaLayerNorm(12, kind))
    x = torch.randn(2, 5, 12)
    expected = nnf.layer_norm(x, (12,), norm.weight, norm.bias, norm.eps)
    cond = None
    if kind != "none":
        cond = torch.randn(2, norm.modulation.linear.in_features)
        shift, scale = norm.modulation(cond, 2)
        expected = expected * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(norm(x, cond), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_torch(causal):
    attention = randomized(Attention(12, 3, causal=causal))
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(attention.qkv.weight)
        theirs.in_proj_bias.copy_(attention.qkv.bias)
        theirs.out_proj.weight.copy_(attention.out.weight)
        theirs.out_proj.bias.copy_(attention.out.bias)
    x = torch.randn(2, 5, 12)
    mask = nn.Transformer.generate_square_subsequent_mask(5) if causal else None
    expected = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(attention(x), expected)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads, got 12 and 5"):
        Attention(12, 5)
    with pytest.raises(ValueError, match=r"conditioning must be one of \['dit', .*got 'film'"):
        TransformerLayer(12, 3, 24, conditioning="film")


def slow_layer(layer, x, cond):
    def norm(h, n):
        return nnf.layer_norm(h, (h.shape[-1],), n.weight, n.bias, n.eps)

    if layer.modulation is None:
        x = x + layer.attention(norm(x, layer.norm1))
        return x + layer.mlp(norm(x, layer.norm2))
    m = [c[:, None] for c in layer.modulation(cond, len(x))]
    x = x + m[2] * layer.attention(norm(x, layer.norm1) * (1 + m[1]) + m[0])
    return x + m[5] * layer.mlp(norm(x, layer.norm2) * (1 + m[4]) + m[3])


@pytest.mark.parametrize("kind", KINDS)
def test_layer_is_its_formula(kind):
    layer = randomized(TransformerLayer(12, 3, 24, conditioning=kind)).double()
    x = torch.randn(2, 5, 12).double().requires_grad_()
    cond = None
    if kind != "none":
        cond = torch.randn(2, layer.modulation.linear.in_features).double()
    got, expected = layer(x, cond), slow_layer(layer, x, cond)
    torch.testing.assert_close(got, expected)
    inputs = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), inputs),
        torch.autograd.grad(expected.sin().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["dit", "official"])
def test_a_new_conditioned_layer_is_the_identity(kind):
    layer = TransformerLayer(12, 3, 24, conditioning=kind)
    x = torch.randn(2, 5, 12)
    assert torch.equal(layer(x, torch.randn(2, layer.modulation.linear.in_features)), x)
    assert torch.equal(layer(x), x)


def test_layer_compiles_as_one_graph():
    layer = randomized(TransformerLayer(12, 3, 24))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, cond = torch.randn(2, 5, 12), torch.randn(2, 12)
    torch.testing.assert_close(compiled(x, cond), layer(x, cond))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind):
    layer = TransformerLayer(12, 3, 24, conditioning=kind)
    x = torch.empty(0, 5, 12, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 5, 12)
    y.sum().backward()
    assert x.grad.shape == (0, 5, 12)


def test_names_of_the_norms_parameters():
    assert list(AdaLayerNorm(12, "official").state_dict()) == [
        "weight", "bias", "modulation.linear.weight", "modulation.linear.bias",
    ]  # fmt: skip
    assert list(AdaLayerNorm(12).state_dict()) == [
        "modulation.linear.weight", "modulation.linear.bias",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 30.0])
def test_inverse_silu(value):
    assert nnf.silu(torch.tensor(inverse_silu(value), dtype=torch.float64)) == (
        pytest.approx(value, abs=1e-12)
    )


def test_inverse_silu_is_of_numbers_that_are_not_negative():
    with pytest.raises(ValueError, match="value must be a finite number >= 0, got -1"):
        inverse_silu(-1.0)


@pytest.mark.parametrize("kind", ["dit", "official"])
def test_gates_of_one_make_the_plain_layer(kind):
    torch.manual_seed(0)
    plain = TransformerLayer(12, 3, 24, conditioning="none")
    layer = TransformerLayer(12, 3, 24, conditioning=kind, gate_init=1.0)
    missing = layer.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(name.startswith("modulation") for name in missing)
    x = torch.randn(2, 5, 12)
    cond = torch.randn(2, layer.modulation.linear.in_features)
    for given in (cond, None):
        torch.testing.assert_close(layer(x, given), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dit", "official"])
def test_gates_of_zero_make_the_identity(kind):
    layer, x = TransformerLayer(12, 3, 24, conditioning=kind), torch.randn(2, 5, 12)
    assert torch.equal(layer(x, None), x)


# The parts of language models


def test_rotary_positions_are_their_formula():
    positions, x = torch.tensor([[0, 1, 5], [2, 0, 100_000]]), torch.randn(2, 3, 2, 6)
    got = rotary_of(positions, 6, 100.0).rotate(x)
    for k in range(3):
        angle = positions.double() * 100.0 ** (-k / 3)
        cos, sin = angle.cos()[..., None], angle.sin()[..., None]
        a, b = x[..., k].double(), x[..., k + 3].double()
        torch.testing.assert_close(got[..., k].double(), a * cos - b * sin, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(
            got[..., k + 3].double(), b * cos + a * sin, atol=1e-6, rtol=1e-6
        )
    half = rotary_of(positions, 6, 100.0).rotate(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), got, atol=0.03, rtol=0.02)


def test_scores_depend_on_the_difference_of_positions():
    q, k = torch.randn(2, 1, 1, 1, 8).double()
    rotated = [
        (
            rotary_of(torch.tensor([i + 3]), 8, 1e4).rotate(q)
            * rotary_of(torch.tensor([i]), 8, 1e4).rotate(k)
        ).sum()
        for i in (0, 1, 50)
    ]
    torch.testing.assert_close(torch.stack(rotated), rotated[0].expand(3), rtol=1e-5, atol=1e-5)


def test_key_heads_are_shared_by_neighbours():
    shared = randomized(Attention(12, 6, num_kv_heads=2, causal=True, bias=False))
    own = Attention(12, 6, causal=True, bias=False)
    q, k, v = shared.qkv.weight.view(10, 2, 12).split((6, 2, 2))
    repeated = torch.cat([q, k.repeat_interleave(3, 0), v.repeat_interleave(3, 0)])
    own.load_state_dict({"qkv.weight": repeated.flatten(0, 1), "out.weight": shared.out.weight})
    x, rotary = torch.randn(2, 5, 12), rotary_of(torch.arange(5), 2, 1e4)
    torch.testing.assert_close(shared(x, rotary), own(x, rotary))
    keys = shared.project_keys(x, rotary)
    for got, expected in zip(keys, shared.project(x, rotary)[1:], strict=True):
        torch.testing.assert_close(got, expected)


def test_swiglu_is_its_formula():
    mlp, x = randomized(SwiGLU(6, 10, bias=False)), torch.randn(2, 3, 6)
    a, b = mlp.fc1.weight.chunk(2)
    torch.testing.assert_close(mlp(x), (nnf.silu(x @ a.T) * (x @ b.T)) @ mlp.fc2.weight.T)
    assert mlp.fc1.bias is None


def test_an_mlp_may_approximate_gelu_by_tanh():
    layer, x = randomized(TransformerLayer(8, 2, 12, mlp="gelu_tanh")), torch.randn(2, 3, 8)
    mlp = layer.mlp
    expected = mlp.fc2(nnf.gelu(mlp.fc1(x), approximate="tanh"))
    assert torch.equal(mlp(x), expected)
    assert not torch.equal(randomized(TransformerLayer(8, 2, 12)).mlp(x), expected)


def test_rms_norms_have_no_bias():
    norm, x = randomized(Norm(12, "official", norm="rms")), torch.randn(2, 5, 12)
    assert list(norm.state_dict()) == ["weight"]
    torch.testing.assert_close(
        norm.modulate(x, None, None), nnf.rms_norm(x, (12,), norm.weight, norm.eps)
    )


@pytest.mark.parametrize("keys_only", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_doubled_layer_is_the_layer_on_both_halves(kind, keys_only):
    layer = randomized(TransformerLayer(12, 3, 24, conditioning=kind, norm="rms", mlp="swiglu"))
    clean, noisy = torch.randn(2, 4, 12), torch.randn(2, 3, 12)
    cond = c = None
    if kind != "none":
        cond = torch.randn(2, 3, layer.modulation.linear.in_features)
        c = torch.cat([torch.zeros_like(cond[:, :1]).expand(-1, 4, -1), cond], dim=1)
    rotary = rotary_of(torch.arange(7), 4, 1e4)
    expected = layer(torch.cat([clean, noisy], dim=1), c, rotary=rotary)
    got = layer.doubled(
        clean, noisy, cond, rotary=rotary, attend=layer.attention.attend, keys_only=keys_only
    )
    torch.testing.assert_close(got[1], expected[:, 4:])
    assert (
        torch.equal(got[0], clean)
        if keys_only
        else torch.allclose(got[0], expected[:, :4], atol=1e-5)
    )


def test_options_of_a_layer_are_checked():
    with pytest.raises(
        ValueError, match="num_heads must be a multiple of num_kv_heads, got 6 and 4"
    ):
        Attention(12, 6, num_kv_heads=4)
    with pytest.raises(ValueError, match=r"norm must be one of \('layer', 'rms'\), got 'batch'"):
        Norm(12, norm="batch")
    with pytest.raises(ValueError, match=r"mlp must be one of \['gelu', .*'swiglu'\], got 'relu'"):
        TransformerLayer(12, 3, 24, mlp="relu")
