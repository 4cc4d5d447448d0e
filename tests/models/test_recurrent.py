import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as nnf
from torch.nn.modules.module import register_module_forward_hook

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.models.recurrent import (
    STATE_CUT,
    STATE_STD,
    RecurrentConfig,
    RecurrentLM,
    initial_state,
)
from dblocks.nn import rotary_of
from dblocks.sampling import initial_noise, sample_logits
from dblocks.schedules import NoiseSchedule
from lm_tools import (
    CLOSE,
    KINDS,
    RECURRENT_SIZES,
    recurrent_blocks_of,
    recurrent_of,
    tokens_of,
)
from tools import DEVICE, normal, randomized, seeded


@pytest.fixture
def count_calls():
    """Counts how often each part of a network runs, by its name."""
    handles = []

    def start(lm):
        calls = {"adapter": 0, "prelude": 0, "layers": 0, "coda": 0}
        names = {lm.adapter: "adapter"}
        for name in ("prelude", "layers", "coda"):
            names |= {layer.attention.qkv: name for layer in getattr(lm, name)}

        def count(module, *_):
            if module in names:
                calls[names[module]] += 1

        # Of all modules: the last layer of doubled rows refuses a hook of its own.
        handles.append(register_module_forward_hook(count))
        return calls

    yield start
    for handle in handles:
        handle.remove()


# What runs


def test_training_runs_prelude_core_and_coda_once(count_calls):
    model = recurrent_blocks_of()
    calls = count_calls(model.base_model)
    model.loss({"tokens": tokens_of()}, 0, generator=seeded()).loss.backward()
    assert calls == {"adapter": 1, "prelude": 2, "layers": 4, "coda": 2}


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_sampling_runs_the_prelude_once_for_any_number_of_steps(count_calls, num_steps):
    model, tokens = recurrent_blocks_of(), tokens_of()
    names = set(model.state_dict())
    calls = count_calls(model.base_model)
    sigmas = model.config.schedule.steps(num_steps)
    sample_logits(model, 80 * normal(2, 8, 16), sigmas, tokens=tokens)
    K = num_steps
    assert calls == {"adapter": K, "prelude": 2, "layers": 4 * K, "coda": 2 * K}
    assert set(model.state_dict()) == names


def test_the_plain_model_recurs(count_calls):
    lm = recurrent_of()
    calls = count_calls(lm)
    lm(tokens_of(), num_recurrences=5)
    assert calls == {"adapter": 5, "prelude": 2, "layers": 20, "coda": 2}
    lm(tokens_of())
    assert calls["adapter"] == 5 + lm.config.mean_recurrence


def test_several_blocks_divide_the_core():
    model = recurrent_blocks_of(2)
    lm = model.base_model
    rows = [0] * 4
    for i, layer in enumerate(lm.layers):
        layer.attention.qkv.register_forward_hook(lambda *_, i=i: rows.__setitem__(i, rows[i] + 1))
    model.loss({"tokens": tokens_of()}, 1, generator=seeded())
    assert rows == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="at most the number of layers, 4, got 5"):
        DiffusionBlocks(lm, BlocksConfig(5))


def test_the_last_layer_of_the_coda_computes_noisy_rows_only():
    model, T, rows = recurrent_blocks_of(), 8, []
    for layer in (*model.base_model.layers, *model.base_model.coda):
        layer.mlp.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    model.logits(normal(2, T, 16), 0.3, tokens=tokens_of(2, T))
    assert rows == [T] * (2 * 5 + 1)


# Who sees what


class Rows(RecurrentLM):
    """Lets a test change the embeddings of clean tokens, as no batch can."""

    added = 0

    def _embed(self, tokens, rows):
        return super()._embed(tokens, rows) + self.added


def test_nothing_leaks_through_the_model():
    model = DiffusionBlocks(
        randomized(Rows(RecurrentConfig(**RECURRENT_SIZES)).to(DEVICE)), BlocksConfig(1)
    )
    T, z = 6, normal(1, 6, 16, seed=1).requires_grad_()
    clean = torch.zeros(1, T, 16, device=DEVICE, requires_grad=True)
    model.base_model.added = clean
    logits = model.logits(z, torch.full((1,), 0.5, device=DEVICE), tokens=tokens_of(1, T))
    for i in range(T):
        to_clean, to_noisy = torch.autograd.grad(
            logits[:, i].sin().sum(), (clean, z), retain_graph=True
        )
        assert torch.equal(to_clean[0].abs().sum(-1) > 0, torch.arange(T, device=DEVICE) < i)
        assert torch.equal(to_noisy[0].abs().sum(-1) > 0, torch.arange(T, device=DEVICE) == i)


def test_clean_rows_know_nothing_of_noise():
    model, tokens, kept = recurrent_blocks_of(), tokens_of(), []
    lm = model.base_model
    for layer in (*lm.layers, *lm.coda[:-1]):  # the last one projects without its forward
        layer.attention.register_forward_pre_hook(lambda _, args: kept.append(args[0][:, :8]))
    sigmas = (0.3 * torch.ones(2, device=DEVICE), torch.rand(2, 8, device=DEVICE) + 0.1)
    for i, sigma in enumerate(sigmas):
        model.logits(normal(2, 8, 16, seed=i), sigma, tokens=tokens)
    half = len(kept) // 2
    assert half == 5
    assert all(torch.equal(a, b) for a, b in zip(kept[:half], kept[half:], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2,), (2, 8)])
def test_the_noisy_half_is_its_formula(kind, shape):
    """Against dense attention over the whole doubled sequence, every row computed."""
    model = recurrent_blocks_of(conditioning=kind).double()
    lm, tokens, z = model.base_model, tokens_of(), normal(2, 8, 16, seed=1).double()
    sigma = (torch.rand(shape, generator=seeded()) * 0.3 + 0.2).to(DEVICE)
    s = sigma.double() if len(shape) == 2 else sigma.double()[:, None].expand(2, 8)
    level = model.config.schedule.level(s)
    position = torch.arange(8, device=DEVICE)

    def causal(q, k, v):
        return nnf.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    embedded = lm.target_embedding.rows().double()[tokens]
    e = embedded
    for layer in lm.prelude:
        e = layer(e, None, rotary=rotary_of(position, 4, 1e4), attend=causal)
    e = nnf.rms_norm(e, (16,), lm.prelude_norm.weight, lm.prelude_norm.eps)
    before = torch.cat([torch.zeros_like(e[:, :1]), e[:, :-1]], dim=1)
    noisy = lm.noisy_row + lm.noise_scale * level.c_in[..., None] * z / 4  # 1 / sqrt(width)
    state = 4 * torch.cat([embedded, noisy], dim=1)
    x = torch.cat([state, before.repeat(1, 2, 1)], dim=-1) @ lm.adapter.weight.T
    cond = None
    if kind != "none":
        cond = lm.noise_embedding(level.c_noise)
        cond = torch.cat([torch.zeros_like(cond), cond], dim=1)
    i = torch.arange(16, device=DEVICE)
    at, is_noisy = i % 8, i >= 8
    mask = torch.where(
        is_noisy[:, None], ~is_noisy & (at[:, None] > at), ~is_noisy & (at <= at[:, None])
    )
    mask |= torch.eye(16, dtype=torch.bool, device=DEVICE)

    def doubled(q, k, v):
        return nnf.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    rotary = rotary_of(at, 4, 1e4)
    for layer in lm.layers:
        x = layer(x, cond, rotary=rotary, attend=doubled)
    x = nnf.rms_norm(x, (16,), lm.core_norm.weight, lm.core_norm.eps)
    for layer in lm.coda:
        x = layer(x, cond, rotary=rotary, attend=doubled)
    f = nnf.rms_norm(x[:, 8:], (16,), lm.norm.weight, lm.norm.eps)
    m = level.c_skip[..., None] * z + level.c_out[..., None] * f
    if kind != "none":
        shift, scale = lm.modulation(cond[:, 8:], 2)
        m = m * (1 + scale) + shift
    expected = lm.log_logit_scale.exp() * m @ lm.target_embedding.rows().double().T
    got = model.logits(z, sigma, tokens=tokens)
    torch.testing.assert_close(got.double(), expected, **CLOSE)


# The plain model


def recurred(lm, tokens, noise, depth):
    """Every recurrence spelled out, those before the last `depth` detached."""
    rotary = rotary_of(torch.arange(tokens.shape[1], device=DEVICE), 4, 1e4)
    e = lm.target_embedding.rows()[tokens]
    for layer in lm.prelude:
        e = layer(e, rotary=rotary)
    e = nnf.rms_norm(e, (16,), lm.prelude_norm.weight, lm.prelude_norm.eps)
    state = initial_state(noise)
    for step in range(6):
        if step == 6 - depth:
            state = state.detach()
        x = torch.cat([state, e], dim=-1) @ lm.adapter.weight.T
        for layer in lm.layers:
            x = layer(x, rotary=rotary)
        state = nnf.rms_norm(x, (16,), lm.core_norm.weight, lm.core_norm.eps)
    for layer in lm.coda:
        state = layer(state, rotary=rotary)
    f = nnf.rms_norm(state, (16,), lm.norm.weight, lm.norm.eps)
    return lm.log_logit_scale.exp() * f @ lm.target_embedding.rows().T


@pytest.mark.parametrize("depth", [1, 3, 6, 9])
def test_backpropagation_is_cut_off_and_the_value_is_not(depth):
    lm = randomized(recurrent_of(conditioning="none", backprop_depth=depth))
    tokens, noise = tokens_of(), normal(2, 8, 16, seed=3)
    got = lm(tokens, num_recurrences=6, normals=noise)
    expected = recurred(lm, tokens, noise, depth)
    torch.testing.assert_close(got, expected, **CLOSE)
    weights = [p for n, p in lm.named_parameters() if n not in ("noisy_row", "noise_scale")]
    ours = torch.autograd.grad(got.sin().sum(), weights)
    theirs = torch.autograd.grad(expected.sin().sum(), weights)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())
    if depth < 6:
        whole = torch.autograd.grad(recurred(lm, tokens, noise, 6).sin().sum(), weights)
        assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(ours, whole, strict=True))


def test_the_plain_model_is_causal():
    lm, tokens, noise = randomized(recurrent_of()), tokens_of(), normal(2, 8, 16)
    logits = lm(tokens, num_recurrences=3, normals=noise)
    assert logits.dtype == torch.float32
    for j in range(8):
        other = tokens.clone()
        other[:, j] = (other[:, j] + 1) % 11
        changed = (lm(other, num_recurrences=3, normals=noise) != logits).any(-1).any(0)
        assert torch.equal(changed, torch.arange(8, device=DEVICE) >= j)


def test_the_loss_of_the_plain_model():
    lm, tokens = randomized(recurrent_of()), tokens_of()
    mask = torch.arange(8, device=DEVICE).expand(2, 8) < 5
    loss = lm.next_token_loss(
        {"tokens": tokens, "loss_mask": mask}, num_recurrences=3, generator=seeded()
    )
    logits = lm(tokens, num_recurrences=3, generator=seeded())
    expected = nnf.cross_entropy(logits[:, :4].flatten(0, 1), tokens[:, 1:5].flatten())
    torch.testing.assert_close(loss, expected)
    # The recurrences are drawn, and the noise.
    drawn = {lm.next_token_loss({"tokens": tokens}, generator=seeded(i)).item() for i in range(3)}
    assert len(drawn) == 3


def test_recurrences_are_poisson_with_a_log_normal_rate():
    lm, generator, n = recurrent_of(mean_recurrence=32), seeded(), 4000
    drawn = torch.tensor([lm.draw_recurrences(generator) for _ in range(n)]).double()
    assert drawn.min() >= 1
    # r - 1 has mean 32 and variance 32 + 32^2 (exp(1/4) - 1); four standard errors.
    variance = 32 + 32**2 * (math.exp(0.25) - 1)
    assert drawn.mean().item() == pytest.approx(33, abs=4 * math.sqrt(variance / n))
    assert (drawn < 33).double().mean() > 0.5  # skewed as the log-normal is
    assert drawn.var().item() == pytest.approx(variance, rel=0.2)


def test_the_initial_state_is_a_normal_that_is_cut_off():
    state = initial_state(normal(100_000)).double().cpu()
    density = math.exp(-(STATE_CUT**2) / 2) / math.sqrt(2 * math.pi)
    inside = math.erf(STATE_CUT / math.sqrt(2))
    variance = STATE_STD**2 * (1 - 2 * STATE_CUT * density / inside)
    assert state.abs().max() <= STATE_CUT * STATE_STD * (1 + 1e-6)
    assert state.mean().item() == pytest.approx(0, abs=4 * math.sqrt(variance / 1e5))
    assert state.var().item() == pytest.approx(variance, rel=0.02)
    ordered = initial_state(torch.linspace(-5.6, 5.6, 100))
    assert (ordered.diff() > 0).all()


# Steps without end


def test_recurrences_converge_where_the_core_contracts():
    lm, tokens = recurrent_of(gate_init=1.0, conditioning="dit"), tokens_of()
    with torch.no_grad():
        lm.adapter.weight[:, :16] *= 0.3
    logits = {
        r: lm(tokens, num_recurrences=r, normals=normal(2, 8, 16)).detach() for r in (2, 4, 8, 16)
    }
    gaps = [(logits[2 * r] - logits[r]).abs().max() for r in (2, 4, 8)]
    assert 0 < gaps[2] < gaps[1] / 8
    assert gaps[1] < gaps[0] / 4
    other = lm(tokens, num_recurrences=16, normals=normal(2, 8, 16, seed=1))
    torch.testing.assert_close(other, logits[16], **CLOSE)  # wherever they start


def test_euler_steps_converge():
    schedule = NoiseSchedule(sigma_min=0.05, sigma_max=10.0, p_mean=0.0, p_std=2.0)
    lm, tokens = recurrent_of(gate_init=1.0, prelude=1, core=1, coda=1), tokens_of()
    model = DiffusionBlocks(lm, BlocksConfig(1, schedule=schedule))
    z = initial_noise((2, 8, 16), schedule, generator=seeded()).to(DEVICE)
    p = {
        K: sample_logits(model, z, schedule.steps(K), tokens=tokens).softmax(-1)
        for K in (2, 4, 8, 16, 32)
    }
    gaps = [(p[2 * K] - p[K]).abs().max().item() for K in (2, 4, 8, 16)]
    # Euler's method is of first order: twice the steps halve the gap, about.
    assert all(b < 0.7 * a for a, b in pairwise(gaps))


# Errors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"core": 0}, "core must be positive, got 0"),
        ({"prelude": 0}, "prelude must be positive, got 0"),
        ({"coda": 0}, "coda must be positive, got 0"),
        ({"mean_recurrence": 0}, "mean_recurrence must be positive, got 0"),
        ({"backprop_depth": 0}, "backprop_depth must be positive, got 0"),
        ({"heads": 5}, "width must be an even multiple of heads, .* got 16 and 5"),
        ({"conditioning": "film"}, "conditioning must be one of .*, got 'film'"),
    ],
)
def test_config_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        recurrent_of(**values)


def test_config_json():
    config = RecurrentConfig(**RECURRENT_SIZES, tokens_per_sigma=None)
    assert RecurrentConfig.from_json(config.to_json()) == config


def test_arguments_are_checked():
    model = recurrent_blocks_of()
    lm = model.base_model
    for r in (0, 2.5):
        with pytest.raises(ValueError, match="number of recurrences must be a positive integer"):
            lm(tokens_of(), num_recurrences=r)
    with pytest.raises(ValueError, match=r"normals must have shape \[N, T, D\] = \[2, 8, 16\]"):
        lm(tokens_of(), normals=normal(2, 7, 16))
    with pytest.raises(ValueError, match="a RecurrentLM is not trained without its condition"):
        model(normal(2, 8, 16), 0.3, guidance_scale=2.0, tokens=tokens_of())
    with pytest.raises(ValueError, match="at most context=24 long, got 25"):
        lm.next_token_loss({"tokens": tokens_of(1, 25)})
