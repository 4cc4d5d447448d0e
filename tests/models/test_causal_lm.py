import math

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.modules.module import register_module_forward_hook

from dblocks import functional as F
from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.models import CausalLM, CausalLMConfig
from dblocks.nn import rotary_of
from lm_tools import CLOSE, KINDS, SIZES, blocks_of, lm_of, recurrent_of, tokens_of
from tools import DEVICE, normal, randomized, seeded

# The two halves


class Rows(CausalLM):
    """Lets a test change the clean rows, as no batch can."""

    def __init__(self, config):
        super().__init__(config)
        self.added = 0

    def embed_condition(self, batch, drop=None):
        context = super().embed_condition(batch, drop)
        return context._replace(x=context.x + self.added)


def test_nothing_leaks_through_a_whole_block():
    model = DiffusionBlocks(randomized(Rows(CausalLMConfig(**SIZES)).to(DEVICE)), BlocksConfig(2))
    T, tokens, z = 6, tokens_of(1, 6), normal(1, 6, 16, seed=1).requires_grad_()
    sigma = torch.full((1,), 0.5, device=DEVICE)
    clean = torch.zeros(1, T, 16, device=DEVICE, requires_grad=True)
    model.base_model.added = clean
    for block in range(2):
        logits = model.logits(z, sigma, block=block, tokens=tokens)
        for i in range(T):
            to_clean, to_noisy = torch.autograd.grad(
                logits[:, i].sin().sum(), (clean, z), retain_graph=True
            )
            assert torch.equal(to_clean[0].abs().sum(-1) > 0, torch.arange(T, device=DEVICE) < i)
            assert torch.equal(to_noisy[0].abs().sum(-1) > 0, torch.arange(T, device=DEVICE) == i)


def clean_rows(model, batch, z, sigma, block):
    """What a block's layers leave of the clean rows, layer after layer."""
    lm, layers = model.parts(block)
    context, level = lm.embed_condition(batch), model.config.schedule.level(sigma)
    kept = []
    hooks = [
        layer.attention.qkv.register_forward_pre_hook(
            lambda _, args: kept.append(args[0][:, : batch["tokens"].shape[1]])
        )
        for layer in layers[:-1]
    ]
    lm.run_layers(layers, z, level, context)
    for hook in hooks:
        hook.remove()
    return torch.cat(kept)


def test_clean_rows_know_nothing_of_noise():
    model, batch = blocks_of(), {"tokens": tokens_of()}
    sigmas = (0.3 * torch.ones(2, device=DEVICE), torch.rand(2, 8, device=DEVICE) + 0.1)
    rows = [
        clean_rows(model, batch, normal(2, 8, 16, seed=i), sigma, 1)
        for i, sigma in enumerate(sigmas)
    ]
    assert torch.equal(*rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2,), (2, 4), (2, 8)])
def test_the_noisy_half_is_its_formula(kind, shape):
    """Against dense attention over the whole doubled sequence, every row computed."""
    model = blocks_of(conditioning=kind, depth=4).double()
    lm, layers = model.parts(1)
    tokens, z = tokens_of(), normal(2, 8, 16, seed=1).double()
    sigma = (torch.rand(shape, generator=seeded()) * 0.3 + 0.2).to(DEVICE)
    level = model.config.schedule.level(sigma)
    context = lm.embed_condition({"tokens": tokens})
    per_token = level._replace(
        **{
            name: value.reshape(2, -1).repeat_interleave(8 // value[0].numel(), 1)[..., None]
            for name, value in level._asdict().items()
            if name != "sigma_data"
        }
    )
    z_in = per_token.c_in * z
    entering = lm.noisy_row + lm.noise_scale * z_in / 4  # embed_scale / sqrt(width)
    x = torch.cat([context.x.double(), entering], dim=1)
    cond = None
    if kind != "none":
        cond = lm.noise_embedding(per_token.c_noise[..., 0])
        cond = torch.cat([torch.zeros_like(cond), cond], dim=1)
    i = torch.arange(16, device=DEVICE)
    position, noisy = i % 8, i >= 8
    earlier = position[:, None] > position
    mask = torch.where(noisy[:, None], ~noisy & earlier, ~noisy & (position <= position[:, None]))
    mask |= torch.eye(16, dtype=torch.bool, device=DEVICE)
    for layer in layers:
        x = layer(
            x, cond, rotary=rotary_of(position, 4, 10_000.0),
            attend=lambda q, k, v: nnf.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=True
            ),
        )  # fmt: skip
    x = x[:, 8:]
    f = nnf.rms_norm(x, (16,), lm.norm.weight, lm.norm.eps)
    m = per_token.c_skip * z + per_token.c_out * f
    if kind != "none":
        shift, scale = lm.modulation(cond[:, 8:], 2)
        m = m * (1 + scale) + shift
    expected = lm.log_logit_scale.exp() * m @ lm.target_embedding.rows().double().T
    got = model.logits(z, sigma, block=1, tokens=tokens)
    torch.testing.assert_close(got.double(), expected, **CLOSE)


def test_the_last_layer_of_a_block_computes_noisy_rows_only():
    model, T, rows = blocks_of(), 8, {}
    parts = ("attention.qkv", "attention.out", "mlp")
    named = model.base_model.layers.named_modules()
    names = {module: name for name, module in named if name.endswith(parts)}

    def record(module, args, _):
        if module in names:
            rows.setdefault(names[module], []).append(args[0].shape[1])

    # Of all modules: the last layer of doubled rows refuses a hook of its own.
    handle = register_module_forward_hook(record)
    try:
        model.logits(normal(2, T, 16), 0.3, tokens=tokens_of(2, T))  # block 1: layers 2 and 3
    finally:
        handle.remove()
    assert not any(name.startswith(("0", "1", "4", "5")) for name in rows)
    assert rows["2.attention.qkv"] == rows["2.attention.out"] == [2 * T]
    assert rows["2.mlp"] == [T, T]
    assert rows["3.attention.qkv"] == rows["3.attention.out"] == rows["3.mlp"] == [T]


def test_positions_of_both_halves():
    lm = randomized(lm_of())
    cos = lm.embed_condition({"tokens": tokens_of(1, 5)}).rotary.cos[0, :, 0]
    assert torch.equal(cos[:5], cos[5:])
    torch.testing.assert_close(cos, rotary_of(torch.arange(5).repeat(2), 4, 1e4).cos[0, :, 0])
    packed = {
        "tokens": tokens_of(1, 5),
        "cu_seqlens": torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=DEVICE),
    }
    cos = lm.embed_condition(packed).rotary.cos[0, :, 0]
    assert torch.equal(
        cos[[0, 1, 2, 3, 4]],
        rotary_of(torch.tensor([0, 1, 2, 0, 1]), 4, 1e4).cos[0, :, 0].to(DEVICE),
    )
    assert torch.equal(cos[:5], cos[5:])


# Noise levels and losses


@pytest.mark.parametrize("each", [1, 2, None])
def test_a_noise_level_for_so_many_tokens(each):
    model, batch = blocks_of(tokens_per_sigma=each), {"tokens": tokens_of()}
    result = model.loss(batch, 1, generator=seeded())
    assert result.losses.shape == ((2,) if each is None else (2, 8 // each))
    same = model.draw(batch, 1, generator=seeded())
    per_token = blocks_of(tokens_per_sigma=1)
    per_token.load_state_dict(model.state_dict())
    repeated = same.sigma.reshape(2, -1).repeat_interleave(8 // same.sigma[0].numel(), dim=1)
    tokens = per_token.loss_at(batch, 1, same._replace(sigma=repeated))
    torch.testing.assert_close(
        tokens.losses.view(*result.losses.shape, -1).mean(-1), result.losses, **CLOSE
    )


def test_losses_are_of_the_tokens_that_are_scored():
    model, tokens = blocks_of(), tokens_of()
    mask = torch.rand(2, 8, generator=seeded()).to(DEVICE) < 0.6
    draw = model.draw({"tokens": tokens}, 0, generator=seeded())
    got = model.loss_at({"tokens": tokens, "loss_mask": mask}, 0, draw)
    lm, layers = model.parts(0)
    level = model.config.schedule.level(draw.sigma)
    noised = F.noise_inject(lm.target_embedding(tokens), draw.sigma, draw.seed)
    hidden = lm.run_layers(layers, noised.z_in, level, lm.embed_condition({"tokens": tokens}))
    ce = nnf.cross_entropy(
        lm.target.predict(lm.features(hidden), noised.z, level).transpose(1, 2),
        tokens,
        reduction="none",
    )
    scored = mask & (torch.arange(8, device=DEVICE) > 0)
    torch.testing.assert_close(got.losses.mean(), ce[scored].mean(), **CLOSE)
    assert torch.equal(got.losses != 0, scored)
    none = model.loss_at({"tokens": tokens, "loss_mask": torch.zeros_like(mask)}, 0, draw)
    assert none.loss == 0


@pytest.mark.parametrize("weighting", ["edm", "clamped", "none", "batch_mean"])
def test_weightings_are_what_their_names_say(weighting):
    model = DiffusionBlocks(randomized(lm_of()), BlocksConfig(3, weighting=weighting))
    result = model.loss({"tokens": tokens_of()}, 2, generator=seeded())
    w = model.config.schedule.loss_weight(result.sigma)
    expected = {
        "edm": (w * result.losses).mean(),
        "clamped": (w.clamp(max=20) * result.losses).mean(),
        "none": result.losses.mean(),
        "batch_mean": w.mean() * result.losses.mean(),
    }
    torch.testing.assert_close(result.loss, expected[weighting])


@settings(max_examples=10)
@given(st.data())
def test_packed_documents_equal_separate_sequences(data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any))
    lengths[0] = max(lengths[0], 2)  # one document is scored
    model = blocks_of(depth=3)
    documents = [tokens_of(1, length, seed=i) for i, length in enumerate(lengths) if length]
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)
    batch = {"tokens": torch.cat(documents, dim=1), "cu_seqlens": ends}
    T = batch["tokens"].shape[1]
    z, sigma = normal(1, T, 16), torch.rand(1, T, generator=seeded()).to(DEVICE) + 0.1
    got = model.logits(z, sigma, block=1, **batch)
    plain = model.base_model(**batch)
    start, nats, count = 0, 0.0, 0
    for document in documents:
        part = slice(start, start := start + document.shape[1])
        alone = model.logits(z[:, part], sigma[:, part], block=1, tokens=document)
        torch.testing.assert_close(got[:, part], alone, **CLOSE)
        torch.testing.assert_close(plain[:, part], model.base_model(document), **CLOSE)
        count += document.shape[1] - 1
        if document.shape[1] > 1:
            nats += model.base_model.next_token_loss({"tokens": document}) * (document.shape[1] - 1)
    torch.testing.assert_close(
        model.base_model.next_token_loss(batch), torch.as_tensor(nats / count), **CLOSE
    )


def test_packed_documents_train():
    model = blocks_of()
    ends = torch.tensor([0, 3, 8], dtype=torch.int32, device=DEVICE)
    losses = model.loss({"tokens": tokens_of(1), "cu_seqlens": ends}, 0, generator=seeded()).losses
    assert torch.equal((losses == 0).nonzero()[:, 1].cpu(), torch.tensor([0, 3]))


# The plain model


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_model_is_causal(kind):
    lm, tokens = randomized(lm_of(conditioning=kind)), tokens_of()
    logits = lm(tokens)
    assert logits.dtype == torch.float32
    for j in range(8):
        other = tokens.clone()
        other[:, j] = (other[:, j] + 1) % 11
        changed = (lm(other) != logits).any(-1).any(0)
        assert torch.equal(changed, torch.arange(8, device=DEVICE) >= j)


def test_the_loss_of_the_plain_model():
    lm, tokens = randomized(lm_of()), tokens_of()
    expected = nnf.cross_entropy(lm(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(lm.next_token_loss({"tokens": tokens}), expected)
    mask = torch.arange(8, device=DEVICE).expand(2, 8) < 5
    expected = nnf.cross_entropy(lm(tokens)[:, :4].flatten(0, 1), tokens[:, 1:5].flatten())
    masked = lm.next_token_loss({"tokens": tokens, "loss_mask": mask})
    torch.testing.assert_close(masked, expected)
    with pytest.raises(ValueError, match="at least one token that is scored"):
        lm.next_token_loss({"tokens": tokens[:, :1]})


def test_the_plain_model_without_conditioning_is_llama():
    lm = lm_of(conditioning="none", tied=False, kv_heads=None)
    names = {name.partition(".0.")[2] or name for name in lm.state_dict() if ".1." not in name}
    assert {
        "target_embedding.weight", "output_head.weight", "norm.weight", "log_logit_scale",
        "norm1.weight", "norm2.weight", "attention.qkv.weight", "attention.out.weight",
        "mlp.fc1.weight", "mlp.fc2.weight",
    } <= names  # fmt: skip
    assert not any("bias" in name or "modulation" in name for name in names)


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_head(tied):
    lm = randomized(lm_of(tied=tied, embed_scale=3.0, logit_scale=2.0))
    lm.log_logit_scale.data.fill_(math.log(2.0))
    weight = lm.target_embedding.rows() / 3 if tied else lm.output_head.weight
    torch.testing.assert_close(lm.target.matrices().weight, weight)
    model, z = DiffusionBlocks(lm, BlocksConfig(3)), normal(2, 8, 16)
    logits = model.logits(z, 0.3, tokens=tokens_of())
    torch.testing.assert_close(
        model(z, 0.3, tokens=tokens_of()), logits.softmax(-1) @ lm.target_embedding.rows()
    )
    lm.log_logit_scale.data.fill_(math.log(4.0))
    torch.testing.assert_close(model.logits(z, 0.3, tokens=tokens_of()), 2 * logits)
    assert lm_of(logit_scale=2.0).log_logit_scale.exp().item() == pytest.approx(2.0)


@pytest.mark.parametrize("make", [lm_of, recurrent_of])
def test_the_bias_of_a_replaced_output_head_counts_end_to_end(make):
    torch.manual_seed(0)
    model, batch = make(tied=False), {"tokens": tokens_of()}
    V, D = model.output_head.weight.shape
    model.output_head = torch.nn.Linear(D, V, device=DEVICE)
    torch.nn.init.zeros_(model.output_head.weight)
    options = {"num_recurrences": 2} if make is recurrent_of else {}
    loss = model.next_token_loss(batch, **options)
    expected = model.output_head.bias.log_softmax(0)
    logits = model.next_token_logits(batch["tokens"], num_steps=options.get("num_recurrences", 1))
    torch.testing.assert_close(logits.log_softmax(-1), expected.expand_as(logits))
    torch.testing.assert_close(loss, -expected[batch["tokens"][:, 1:]].mean())
    loss.backward()
    assert model.output_head.bias.grad.any()
