import copy
import math

import pytest
import torch

from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.models import CausalLMConfig
from lm_tools import CLOSE, KINDS, SIZES, adamw, blocks_of, lm_of, tokens_of
from tools import DEVICE, normal, randomized, seeded

# Training


def pattern(n=16, seed=0):
    """Sequences that count upwards from a random token, modulo 8."""
    first = torch.randint(8, (n, 1), generator=seeded(seed))
    return {"tokens": ((first + torch.arange(8)) % 8).to(DEVICE)}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_learn_a_pattern(kind):
    lm = lm_of(conditioning=kind, depth=3, gate_init=1.0, width=32, logit_scale=4.0)
    model = DiffusionBlocks(lm, BlocksConfig(3, weighting="none"))
    optimizers, generator = make_optimizers(model, adamw), seeded()
    before = [model.loss(pattern(), b, generator=seeded(b)).losses.mean() for b in range(3)]
    for step in range(120):
        train_step(model, pattern(seed=step), optimizers, block=step % 3, generator=generator)
    for b in range(3):
        after = model.loss(pattern(), b, generator=seeded(b)).losses.mean()
        assert after < 0.6 * before[b]


def test_end_to_end_learns_a_pattern():
    lm = lm_of(conditioning="none", depth=2, width=32, logit_scale=4.0)
    optimizer = adamw(lm.parameters())
    for step in range(100):
        optimizer.zero_grad()
        lm.next_token_loss(pattern(seed=step)).backward()
        optimizer.step()
    assert lm.next_token_loss(pattern(seed=1000)) < 0.5  # log 11 = 2.4 for all tokens alike


@pytest.mark.parametrize("shared", ["train", "frozen", "private"])
def test_a_step_touches_its_block_only(shared):
    model = DiffusionBlocks(randomized(lm_of(tied=False)), BlocksConfig(3, shared=shared))
    optimizers = make_optimizers(model, adamw)
    before = [[p.clone() for p in model.block_parameters(b)] for b in range(3)]
    train_step(model, {"tokens": tokens_of()}, optimizers, block=1, generator=seeded())
    for b in range(3):
        same = [
            torch.equal(p, q) for p, q in zip(model.block_parameters(b), before[b], strict=True)
        ]
        assert all(same) if b != 1 else not any(same)


def test_every_parameter_of_a_block_gets_a_gradient():
    model = blocks_of(tied=False)
    model.loss({"tokens": tokens_of()}, 0, generator=seeded()).loss.backward()
    for name, p in model.base_model.named_parameters():
        inside = not name.startswith("layers") or name.startswith(("layers.0", "layers.1"))
        assert (p.grad is not None and p.grad.isfinite().all()) == inside, name


@pytest.mark.parametrize("kind", ["dit", "official"])
@pytest.mark.parametrize("sigma", [0.002, 80.0])
def test_autocast_is_finite_at_the_ends(kind, sigma):
    model, z = blocks_of(conditioning=kind), normal(2, 8, 16)
    batch = {"tokens": tokens_of()}
    draw = model.draw(batch, 0, generator=seeded())
    draw = draw._replace(sigma=torch.full_like(draw.sigma, sigma))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        result = model.loss_at(batch, 0, draw)
        logits = model.logits(sigma * z, sigma, **batch)
    assert logits.dtype == result.loss.dtype == torch.float32
    result.loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(t.isfinite().all() for t in (logits, result.loss, *grads))


def test_parameters_may_be_bfloat16():
    model = blocks_of().bfloat16()
    result = model.loss({"tokens": tokens_of()}, 1, generator=seeded())
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert result.loss.isfinite()
    assert model.base_model(tokens_of()).dtype == torch.float32


@pytest.mark.parametrize("packed", [False, True])
def test_a_loss_compiles_as_one_graph(packed):
    model = blocks_of(depth=3)
    batch = {"tokens": tokens_of(1)}
    if packed:
        batch["cu_seqlens"] = torch.tensor([0, 3, 8], dtype=torch.int32, device=DEVICE)
    draw = model.draw(batch, 1, generator=seeded())
    compiled = torch.compile(model.loss_at, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch, 1, draw), model.loss_at(batch, 1, draw), **CLOSE)


def test_end_to_end_compiles_as_one_graph():
    lm, batch = randomized(lm_of(depth=2)), {"tokens": tokens_of()}
    compiled = torch.compile(lm.next_token_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(batch), lm.next_token_loss(batch))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_and_deepcopy(kind):
    lm, tokens = randomized(lm_of(conditioning=kind)), tokens_of()
    fresh = lm_of(conditioning=kind)
    fresh.load_state_dict(lm.state_dict())
    assert torch.equal(fresh(tokens), lm(tokens))
    assert torch.equal(copy.deepcopy(lm)(tokens), lm(tokens))


def test_an_empty_batch():
    model = blocks_of()
    tokens = torch.empty(0, 8, dtype=torch.int64, device=DEVICE)
    assert model.base_model(tokens).shape == (0, 8, 11)
    assert model.logits(torch.empty(0, 8, 16, device=DEVICE), 0.3, tokens=tokens).shape == (
        0,
        8,
        11,
    )


# Errors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": 0}, "depth must be positive, got 0"),
        ({"kv_heads": 0}, "kv_heads must be positive or None, got 0"),
        ({"tokens_per_sigma": 0}, "tokens_per_sigma must be positive or None, got 0"),
        ({"rope_theta": 0.0}, "rope_theta must be positive and finite, got 0.0"),
        ({"logit_scale": math.inf}, "logit_scale must be positive and finite, got inf"),
        ({"gate_init": -1.0}, "gate_init must be a finite number >= 0, got -1.0"),
        ({"heads": 5}, "width must be an even multiple of heads, .* got 16 and 5"),
        ({"heads": 16, "kv_heads": 1}, "width must be an even multiple of heads, .* got 16 and 16"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 4 and 3"),
        ({"conditioning": "film"}, "conditioning must be one of .*, got 'film'"),
    ],
)
def test_config_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        lm_of(**values)


def test_config_json():
    config = CausalLMConfig(**SIZES, tokens_per_sigma=None)
    assert CausalLMConfig.from_json(config.to_json()) == config
    assert CausalLMConfig(width=100, heads=2, mlp_ratio=8 / 3).hidden_dim == 272


def ends(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": None}, ValueError, "must hold a tensor 'tokens', got"),
        ({"tokens": [1, 2]}, ValueError, "with tokens of type list; it is"),
        ({"tokens": torch.ones(1, 4).int()}, TypeError, "tokens must be int64, got torch.int32"),
        ({"tokens": torch.ones(4).long()}, ValueError, r"shape \[N, T\] .* got \[4\]"),
        ({"tokens": torch.ones(1, 0).long()}, ValueError, r"T >= 1, got \[1, 0\]"),
        ({"tokens": torch.ones(1, 13).long()}, ValueError, "at most context=12 long, got 13"),
        (
            {"tokens": torch.full((1, 4), 11)},
            ValueError,
            r"tokens must be in 0\.\.10, got 11\.\.11",
        ),
        (
            {"tokens": torch.full((1, 4), -1)},
            ValueError,
            r"tokens must be in 0\.\.10, got -1\.\.-1",
        ),
        ({"loss_mask": torch.ones(1, 4)}, TypeError, "loss_mask must be a bool tensor, got"),
        ({"loss_mask": torch.ones(4) > 0}, ValueError, r"shape of the tokens, \[1, 4\], got \[4\]"),
        ({"cu_seqlens": [0, 4]}, TypeError, "cu_seqlens must be an int32 tensor, got list"),
        ({"cu_seqlens": ends(0, 4, dtype=torch.int64)}, TypeError, "got torch.int64; call .int()"),
        ({"cu_seqlens": ends(0)}, ValueError, r"at least one document, got \[1\]"),
        ({"cu_seqlens": ends(0, 3)}, ValueError, r"end with T = 4, got \[0, 3\]"),
        ({"cu_seqlens": ends(1, 4)}, ValueError, r"end with T = 4, got \[1, 4\]"),
        ({"cu_seqlens": ends(0, 3, 2, 4)}, ValueError, "never decrease"),
        (
            {"cu_seqlens": ends(0, 8), "tokens": torch.ones(2, 8).long()},
            ValueError,
            "cu_seqlens needs N = 1, got N = 2; pack",
        ),
        (
            {"cu_seqlens": ends(0, 1, 14), "tokens": torch.ones(1, 14).long()},
            ValueError,
            "documents must be at most context=12 long, got 13",
        ),
    ],
)
def test_batches_are_checked(change, error, message):
    lm = lm_of().cpu()
    batch = {"tokens": torch.ones(1, 4).long(), **change}
    with pytest.raises(error, match=message):
        DiffusionBlocks(lm, BlocksConfig(3)).loss(batch, 0)
    with pytest.raises(error, match=message):
        lm.next_token_loss(batch)


def test_what_does_not_go_together_is_an_error():
    model = blocks_of(tokens_per_sigma=3)
    with pytest.raises(ValueError, match="a multiple of tokens_per_sigma=3 long, got 8; pad them"):
        model.loss({"tokens": tokens_of()}, 0)
    with pytest.raises(ValueError, match="guidance_scale must be 1"):
        model(normal(2, 8, 16), 0.3, guidance_scale=2.0, tokens=tokens_of())
