import math

import pytest
import torch
import torch.nn.functional as nnf
from hub_tools import library
from masked_tools import SIZES, blocks_of, lm_of, tokens_of

from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.checkpoint import load_model, save_model
from dblocks.models import MaskedLMConfig
from dblocks.sampling import bound_terms, unmask
from dblocks.schedules import MASKED, MaskSchedule
from tools import DEVICE, randomized, seeded

KINDS = ("dit", "official", "none")


def masked(tokens, share=0.5, seed=9):
    u = torch.rand(tokens.shape, generator=seeded(seed)).to(tokens.device)
    return torch.where(u < share, MASKED, tokens)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3)


# The network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_of_tokens_and_see_both_sides(kind, tied):
    model, z = blocks_of(conditioning=kind, tied=tied), masked(tokens_of())
    z[:, 3] = MASKED
    logits = model.logits(z, 0.7)
    assert logits.shape == (2, 8, 11)  # the mask is none of them
    assert logits.dtype == torch.float32
    for other in (0, 7):
        changed = z.clone()
        changed[:, other] = (z[:, other] + 1) % 11
        assert not torch.allclose(model.logits(changed, 0.7)[:, 3], logits[:, 3])


def test_tokens_are_copied_and_the_mask_is_never_predicted():
    model, tokens = blocks_of(), tokens_of()
    z = masked(tokens)
    p = model(z, 0.7)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 8, device=DEVICE))
    known = z != MASKED
    assert torch.equal(p[known], nnf.one_hot(tokens, 11).float()[known])
    logits = model.logits(z, 0.7)
    torch.testing.assert_close(p[~known], logits.softmax(-1)[~known])


@pytest.mark.parametrize("kind", ["dit", "official"])
def test_logits_depend_on_the_masked_share_where_there_is_conditioning(kind):
    z = masked(tokens_of())
    model, plain = blocks_of(conditioning=kind), blocks_of(conditioning="none")
    assert not torch.allclose(model.logits(z, 0.6), model.logits(z, 0.9))
    assert torch.equal(plain.logits(z, 0.6), plain.logits(z, 0.9))


def test_the_kind_of_schedule_only_names_the_levels():
    z, lm = masked(tokens_of()), randomized(lm_of())
    share = torch.tensor(0.4, dtype=torch.float64)
    first, *others = (
        DiffusionBlocks(lm, BlocksConfig(3, schedule=schedule)).logits(z, schedule.time_at(share))
        for schedule in map(MaskSchedule, ("linear", "cosine", "poly2"))
    )
    for logits in others:
        torch.testing.assert_close(logits, first, rtol=1e-4, atol=1e-4)


# The loss


@pytest.mark.parametrize("draw", ["alpha", "t"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_weighted_cross_entropy_of_masked_tokens(draw, tied):
    model = blocks_of(schedule=MaskSchedule("cosine", draw), tied=tied)
    batch, schedule = {"tokens": tokens_of(4)}, model.config.schedule
    drawn = model.draw(batch, 1, generator=seeded())
    got = model.loss_at(batch, 1, drawn)
    z = schedule.corrupt(batch["tokens"], schedule.level(drawn.sigma), drawn.seed).z
    logits = model.logits(z, drawn.sigma, block=1)
    costs = nnf.cross_entropy(logits.transpose(1, 2), batch["tokens"], reduction="none")
    losses = (costs * (z == MASKED)).sum(1) / 8
    torch.testing.assert_close(got.losses, losses, rtol=1e-4, atol=1e-5)
    weight = schedule.loss_weight(drawn.sigma, 1, 3, overlap=0.1)
    torch.testing.assert_close(got.weight, weight)
    torch.testing.assert_close(got.loss, (weight * losses).mean(), rtol=1e-4, atol=1e-5)


def test_given_tokens_are_shown_and_not_scored():
    model, tokens = blocks_of(), tokens_of(4)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, :3] = mask[0] = False
    batch = {"tokens": tokens, "loss_mask": mask}
    drawn = model.draw(batch, 0, generator=seeded())
    got = model.loss_at(batch, 0, drawn)
    schedule = model.config.schedule
    z = schedule.corrupt(tokens, schedule.level(drawn.sigma), drawn.seed).z.where(mask, tokens)
    logits = model.logits(z, drawn.sigma, block=0)
    costs = nnf.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    expected = (costs * (z == MASKED)).sum(1) * 4 / mask.sum()
    torch.testing.assert_close(got.losses, expected, rtol=1e-4, atol=1e-5)
    assert got.losses[0] == 0
    nothing = {"tokens": tokens, "loss_mask": torch.zeros_like(mask)}
    with pytest.raises(ValueError, match="at least one token that is scored"):
        model.loss(nothing, 0)
    everything = {"tokens": tokens, "loss_mask": torch.ones_like(mask)}
    torch.testing.assert_close(
        model.loss_at(everything, 0, drawn).loss, model.loss_at({"tokens": tokens}, 0, drawn).loss
    )


def test_weighting_none_leaves_the_losses_alone():
    config = BlocksConfig(3, schedule=MaskSchedule(), weighting="none")
    result = DiffusionBlocks(randomized(lm_of()), config).loss({"tokens": tokens_of()}, 1)
    assert (result.weight == 1).all()
    torch.testing.assert_close(result.loss, result.losses.mean())


@pytest.mark.parametrize(("draw", "with_mask"), [("alpha", True), ("t", False)])
def test_the_loss_compiles_as_one_graph(draw, with_mask):
    model = blocks_of(schedule=MaskSchedule("cosine", draw), depth=3)
    batch = {"tokens": tokens_of(4)}
    if with_mask:
        batch["loss_mask"] = batch["tokens"] < 7
    compiled = torch.compile(model.loss_at, fullgraph=True, backend="aot_eager")
    drawn = model.draw(batch, 1, generator=seeded())
    got, expected = compiled(batch, 1, drawn), model.loss_at(batch, 1, drawn)
    torch.testing.assert_close(got.losses, expected.losses)
    parameters = list(model.block_parameters(1))
    for a, b in zip(
        torch.autograd.grad(got.loss, parameters),
        torch.autograd.grad(expected.loss, parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast_keeps_logits_in_float32():
    model, z = blocks_of(), masked(tokens_of())
    inner = []
    model.base_model.layers[0].mlp.register_forward_hook(lambda *a: inner.append(a[-1].dtype))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = [model.logits(z, 0.9), model(z, 0.9), *model.loss({"tokens": tokens_of()}, 0)]
    assert inner[0] == torch.bfloat16
    assert all(o.dtype == torch.float32 for o in outputs)


# Training


@pytest.mark.parametrize("shared", ["train", "frozen", "private"])
def test_a_step_changes_its_block_only(shared):
    model = blocks_of(shared=shared)
    optimizers = make_optimizers(model, adamw)
    ran = []
    for k, layer in enumerate(model.base_model.layers):
        layer.register_forward_hook(lambda *a, k=k: ran.append(k))
    train_step(model, {"tokens": tokens_of()}, optimizers, block=2)
    ran.clear()
    others = [p for b in (0, 2) for p in model.block_parameters(b)]
    before = [p.clone() for p in others]
    own = [p.clone() for p in model.block_parameters(1)]
    result = train_step(model, {"tokens": tokens_of()}, optimizers, block=1, generator=seeded())
    assert ran == [2, 3]
    assert all(torch.equal(a, b) for a, b in zip(others, before, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.block_parameters(1), own, strict=True))
    low, high = model.config.schedule.range_of(1, 3, overlap=0.1)
    t = result.details.sigma
    assert ((t >= low - 1e-6) & (t <= high + 1e-6)).all()


def test_the_view_of_a_block_is_the_same_denoiser():
    model, z = blocks_of(), masked(tokens_of())
    view, batch = model.block(1), {"tokens": tokens_of()}
    assert torch.equal(view(z, 0.3), model(z, 0.3, block=1))
    ours, whole = view.loss(batch, generator=seeded()), model.loss(batch, 1, generator=seeded())
    assert torch.equal(ours.loss, whole.loss)


def test_print_blocks_prints_times(capsys):
    blocks_of().print_blocks()
    out = capsys.readouterr().out
    assert " t " in out
    assert "0.4646 to 0.2163" in out


def test_blocks_learn_a_repetitive_text():
    """Tokens that follow each other by a rule, which a model of single tokens cannot know."""
    model = DiffusionBlocks(
        lm_of(width=32, gate_init=1.0), BlocksConfig(3, schedule=MaskSchedule("cosine"))
    )
    optimizers, generator = make_optimizers(model, adamw), seeded()

    def batch(n, seed):
        start = torch.randint(11, (n, 1), generator=seeded(seed))
        return ((start + 3 * torch.arange(12)) % 11).to(DEVICE)

    for step in range(360):
        train_step(model, {"tokens": batch(16, step)}, optimizers, generator=generator,
                   clip_grad_norm=1.0)  # fmt: skip
    tokens = batch(200, 1000)
    nats = bound_terms(model, tokens).nats.sum(1).mean() / 12
    assert nats < 0.5 * math.log(11)  # ln(11)/12 = .2 is the least
    gaps = tokens.clone()
    gaps[:, 4:8] = MASKED
    written = unmask(model, gaps, generator=seeded()).tokens
    assert (written == tokens).double().mean() > 0.9


# Saving


@pytest.mark.parametrize("shared", ["train", "private"])
def test_a_saved_model_writes_the_same(tmp_path, shared):
    library("safetensors")
    model = blocks_of(shared=shared, tied=False)
    save_model(tmp_path, model)
    loaded = load_model(tmp_path).to(DEVICE)
    assert loaded.config == model.config
    z = masked(tokens_of())
    for t in (1.0, 0.4, 0.1):
        assert torch.equal(loaded.logits(z, t), model.logits(z, t))
    gaps = torch.full_like(z, MASKED)
    pair = (unmask(m, gaps, num_steps=n, generator=seeded()) for m in (model, loaded) for n in (5,))
    first, second = pair
    assert torch.equal(first.tokens, second.tokens)
    assert first.calls == second.calls


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 18, "heads": 4}, "width must be an even multiple of heads"),
        ({"depth": 0}, "depth must be positive, got 0"),
        ({"kv_heads": 0}, "kv_heads must be positive or None, got 0"),
        ({"mlp_ratio": math.inf}, "mlp_ratio must be positive and finite"),
        ({"gate_init": -1}, "gate_init must be a finite number >= 0"),
        ({"conditioning": "film"}, "conditioning must be one of"),
    ],
)
def test_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedLMConfig(**{**SIZES, **options})


def test_batches_and_states_are_checked():
    model, tokens = blocks_of(), tokens_of()
    cases = [
        ({"tokens": tokens_of(2, 13)}, ValueError, "at most context=12 long, got 13"),
        ({"tokens": tokens + 11}, ValueError, r"tokens must be in 0\.\.10"),
        ({"tokens": tokens.int()}, TypeError, "tokens must be int64"),
        ({}, ValueError, "must hold a tensor 'tokens'"),
        ({"tokens": tokens, "loss_mask": tokens}, TypeError, "loss_mask must be a bool tensor"),
        ({"tokens": tokens, "cu_seqlens": torch.tensor([0, 8]).int()}, ValueError, "'cu_seqlens'"),
    ]
    for batch, error, message in cases:
        with pytest.raises(error, match=message):
            model.loss(batch, 0)
    with pytest.raises(ValueError, match="at most context=12 long, got 13"):
        model(tokens_of(2, 13), 0.5)
    with pytest.raises(TypeError, match="z must be tokens, int64"):
        model(tokens.float(), 0.5)
    with pytest.raises(ValueError, match="so guidance_scale must be 1"):
        model(tokens, 0.5, guidance_scale=2.0)
    with pytest.raises(ValueError, match="sigma must lie in one block"):
        model(tokens, torch.tensor([0.9, 0.1]))
