"""Padding before or after texts changes nothing for them, in every family and form."""

import pytest
import torch
import torch.nn.functional as nnf
from family_models import TEXT, T, V, causal_model, encoder_model

from dblocks import BlocksConfig, MaskSchedule
from dblocks.integrations.convert import convert
from dblocks.sampling import bound_terms, generate, likelihood, next_token_nll, unmask
from dblocks.schedules import MASKED
from tools import seeded

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:not fused"),
]
TOKENS = torch.randint(3, V, (3, T), generator=seeded(2))
RANGES = ((0, 8), (3, 8), (0, 5))
MASK = torch.tensor([[int(a <= j < b) for j in range(T)] for a, b in RANGES])
TYPES = torch.arange(T) % 2 + torch.zeros(3, 1, dtype=torch.int64)
# Rotary, learned and OPT's positions, a window and bounds, attentions of their own, ALiBi, sinks.
PLACED = ("llama", "gpt2", "opt", "gemma2", "falcon", "mistral", "gpt_oss")
SOME = (*PLACED, "bloom", "mpt")
NOT_TYPED = ("distilbert", "modernbert")


def causal_blocks(kind, rows, **options):
    blocks = convert(causal_model(kind), BlocksConfig(2), task="tokens", rows=rows, **options)
    return moved(blocks)


def moved(blocks):
    """Modulations and the size of the noise, which start at zero."""
    generator = seeded(1)
    with torch.no_grad():
        for name, p in blocks.base_model.named_parameters():
            if not name.startswith("model."):
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return blocks


def scores(blocks, batch, z, sigma, block=1):
    """Losses at a given state, as training has them."""
    network, schedule = blocks.base_model, blocks.config.schedule
    given, level = network.target.check(batch), schedule.level(sigma)
    condition = network.embed_condition(given)
    layers = blocks.parts(block)[1]
    features = network.features(
        network.run_layers(layers, schedule.scale_in(z, level), level, condition)
    )
    y = network.target.embed(given)
    return network.target.score(features, z, level, y, torch.tensor(0), given)


def gradients(blocks, loss):
    parameters = [p for p in blocks.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def cases(kinds):
    return [(kind, form) for kind in kinds for form in ("single", "doubled")]


def check_logits(blocks, **options):
    z = torch.randn(3, T, blocks.base_model.width, generator=seeded(3))
    sigma = 1 + torch.rand(3, T, generator=seeded(4))
    with torch.no_grad():
        found = blocks.logits(z, sigma, block=0, tokens=TOKENS, attention_mask=MASK, **options)
        for n, (first, last) in enumerate(RANGES):
            one, part = slice(n, n + 1), slice(first, last)
            of_text = {name: value[one, part] for name, value in options.items()}
            alone = blocks.logits(
                z[one, part], sigma[one, part], block=0, tokens=TOKENS[one, part], **of_text
            )
            error = (found[one, first + 1 : last] - alone[:, 1:]).abs().max()
            assert error < 1e-5 * alone.abs().max()


@pytest.mark.parametrize(("kind", "rows"), cases(SOME))
def test_texts_are_as_if_alone(kind, rows):
    blocks = causal_blocks(kind, rows)
    check_logits(blocks)
    z = torch.randn(3, T, blocks.base_model.width, generator=seeded(3))
    sigma = 1 + torch.rand(3, T, generator=seeded(4))
    scored = torch.rand(3, T, generator=seeded(5)) < 0.8
    for more in ({}, {"loss_mask": scored}):
        batch = {"tokens": TOKENS, "attention_mask": MASK, **more}
        found = scores(blocks, batch, z, sigma)
        assert not found[MASK == 0].any()
        total, count = 0, 0
        for n, (first, last) in enumerate(RANGES):
            one, part = slice(n, n + 1), slice(first, last)
            alone = {"tokens": TOKENS[one, part]} | {k: v[one, part] for k, v in more.items()}
            labels = blocks.base_model.target.check(alone).labels()
            number = (labels >= 0).sum()
            losses = scores(blocks, alone, z[one, part], sigma[one, part])
            total, count = total + losses.mean() * number, count + number
        torch.testing.assert_close(found.mean(), total / count)
        pairs = zip(gradients(blocks, found.mean()), gradients(blocks, total / count), strict=True)
        for ours, expected in pairs:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("each", [4, None])
@pytest.mark.parametrize("rows", ["single", "doubled"])
def test_levels_of_several_tokens(rows, each):
    blocks = causal_blocks("llama", rows, tokens_per_sigma=each)
    batch = {"tokens": TOKENS, "attention_mask": MASK}
    z = torch.randn(3, T, 16, generator=seeded(3))
    sigma = torch.tensor([1.0, 2.0, 3.0])
    levels = sigma if each is None else sigma[:, None] * torch.tensor([1.0, 0.5])
    tokens = levels.view(3, -1).repeat_interleave(T // levels.view(3, -1).shape[1], 1)
    expected = blocks.logits(z, tokens, block=0, **batch)
    found = blocks.logits(z, levels, block=0, **batch)
    torch.testing.assert_close(found[MASK == 1], expected[MASK == 1], rtol=1e-5, atol=1e-5)
    assert blocks.loss(batch, 1, generator=seeded()).loss.isfinite()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_padding_of_any_content_changes_nothing(kind):
    other = torch.where(MASK == 1, TOKENS, (TOKENS + 5) % V)
    for rows in ("single", "doubled"):
        blocks = causal_blocks(kind, rows)
        losses = [
            blocks.loss({"tokens": t, "attention_mask": m}, 1, generator=seeded()).loss
            for t in (TOKENS, other)
            for m in (MASK, MASK.bool())
        ]
        z = torch.randn(3, T, 16, generator=seeded(3))
        for loss in losses[1:]:
            # The noise of embeddings is that of each place, and padding has its own.
            torch.testing.assert_close(loss, losses[0])
        given = {"tokens": TOKENS, "attention_mask": torch.ones(3, T, dtype=torch.bool)}
        torch.testing.assert_close(
            blocks.logits(z, torch.tensor(1.0), block=0, **given),
            blocks.logits(z, torch.tensor(1.0), block=0, tokens=TOKENS),
        )


@pytest.mark.parametrize("kind", PLACED)
def test_the_models_own_loss_and_places(kind):
    """Against transformers with the same mask, and places as its generate() counts them."""
    blocks = causal_blocks(kind, "single")
    network, model = blocks.base_model, blocks.base_model.model
    places = (MASK.cumsum(1) - 1).clamp(min=0)
    shown = MASK.bool() & nnf.pad(MASK[:, :-1], (1, 0)).bool()
    labels = torch.where(shown, TOKENS, -100)[:, 1:].flatten()
    apart = places + torch.tensor([[2], [0], [5]]) + (places > 2)
    batch = {"tokens": TOKENS, "attention_mask": MASK}
    with torch.no_grad():
        for ids, more in ((places, {}), (apart, {"position_ids": apart})):
            given = {"attention_mask": MASK, "position_ids": ids, "use_cache": False}
            logits = model(input_ids=TOKENS, **given).logits[:, :-1].flatten(0, 1)
            expected = nnf.cross_entropy(logits.float(), labels)
            torch.testing.assert_close(network.plain_loss(batch | more), expected)
    check_logits(blocks, position_ids=apart)
    check_logits(causal_blocks(kind, "doubled"), position_ids=apart)
    default = network.plain_loss(batch)
    whole = network.plain_loss(batch | {"position_ids": apart})
    assert not torch.allclose(whole, default, rtol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_clean_loss_of_padded_texts(kind):
    blocks = causal_blocks(kind, "single", clean_loss_weight=1.0)
    batch = {"tokens": TOKENS, "attention_mask": MASK}
    draw = blocks.draw(batch, 1, generator=seeded())
    found = gradients(blocks, blocks.clean_loss(batch, 1, draw))
    total = sum(
        blocks.clean_loss({"tokens": TOKENS[n : n + 1, a:b]}, 1, draw) * (b - a - 1)
        for n, (a, b) in enumerate(RANGES)
    )
    expected = gradients(blocks, total / sum(b - a - 1 for a, b in RANGES))
    assert any(g.any() for g in found)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", ["single", "doubled"])
def test_text_is_written_after_padded_prompts(rows):
    blocks = causal_blocks("gpt2", rows)
    options = {"max_new_tokens": 3, "num_steps": 2, "cache": False}
    expected = generate(
        blocks, [t[a:b] for t, (a, b) in zip(TOKENS, RANGES, strict=True)], **options,
        generator=seeded(),
    )  # fmt: skip
    for mask in (MASK, MASK.bool()):
        found = generate(blocks, TOKENS, attention_mask=mask, **options, generator=seeded())
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="no holes"):
        generate(blocks, TOKENS, attention_mask=HOLES, **options)
    with pytest.raises(TypeError, match=r"needs prompts in one tensor \[N, P\], got a list"):
        generate(blocks, TOKENS.tolist(), attention_mask=MASK, **options)


# Encoders


def ranges_of(kind):
    """What a batch may hold beside tokens and a mask."""
    return {} if kind in NOT_TYPED else {"token_type_ids": TYPES % types_of(kind)}


def types_of(kind):
    return encoder_model(kind, "masks").config.type_vocab_size


@pytest.mark.parametrize("kind", TEXT)
def test_masked_texts_are_as_if_alone(kind):
    config = BlocksConfig(2, schedule=MaskSchedule())
    blocks = moved(convert(encoder_model(kind, "masks"), config, task="tokens", mask_token_id=2))
    network, more = blocks.base_model, ranges_of(kind)
    places = torch.arange(T).expand(3, T) + 3
    z = torch.where(torch.rand(3, T, generator=seeded(3)) < 0.5, MASKED, TOKENS)
    t = torch.tensor([0.3, 0.6, 0.9])
    for ids in ({}, {"position_ids": places}):
        batch = {"tokens": TOKENS, "attention_mask": MASK, **more, **ids}
        known = {k: v for k, v in batch.items() if k != "tokens"}
        found = blocks.logits(z, t, block=0, **known)
        losses, total, own = scores(blocks, batch, z, t), 0, 0
        count = (z == MASKED)[MASK == 1].sum()
        for n, (a, b) in enumerate(RANGES):
            text = {k: v[n : n + 1, a:b] for k, v in (more | ids).items()}
            state, level = z[n : n + 1, a:b], t[n : n + 1]
            alone = blocks.logits(state, level, block=0, **text)
            real = alone.isfinite()
            error = (found[n : n + 1, a:b] - alone)[real].abs().max()
            assert error < 1e-5 * alone[real].abs().max()
            text["tokens"] = TOKENS[n : n + 1, a:b]
            total = total + scores(blocks, text, state, level)[0] * (b - a)
            own = own + network.plain_loss(text, state) * (state == MASKED).sum()
        torch.testing.assert_close(losses.mean() * MASK.sum(), total)
        for ours, theirs in zip(
            gradients(blocks, losses.mean() * MASK.sum()), gradients(blocks, total), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(network.plain_loss(batch, z), own / count)
        assert blocks.loss(batch, 1, generator=seeded()).loss.isfinite()


@pytest.mark.parametrize("kind", TEXT)
def test_classified_texts_are_as_if_alone(kind):
    model = encoder_model(kind, "classes")
    blocks = moved(convert(model, BlocksConfig(2), task="classes"))
    more, labels = ranges_of(kind), torch.tensor([0, 3, 1])
    z = torch.randn(3, blocks.base_model.width, generator=seeded(3))
    with torch.no_grad():
        for ids in ({}, {"position_ids": torch.arange(T).expand(3, T) + 3}):
            batch = {"tokens": TOKENS, "attention_mask": MASK, **more, **ids}
            found = blocks.logits(z, torch.tensor(1.0), block=0, **batch)
            own = 0
            for n, (a, b) in enumerate(RANGES):
                text = {k: v[n : n + 1, a:b] for k, v in (more | ids).items()}
                text["tokens"] = TOKENS[n : n + 1, a:b]
                alone = blocks.logits(z[n : n + 1], torch.tensor(1.0), block=0, **text)
                torch.testing.assert_close(found[n : n + 1], alone, rtol=1e-4, atol=1e-5)
                logits = model(input_ids=text.pop("tokens"), **text).logits
                own = own + nnf.cross_entropy(logits, labels[n : n + 1]) / 3
            loss = blocks.base_model.plain_loss(batch | {"labels": labels})
            torch.testing.assert_close(loss, own)
        if more.get("token_type_ids") is not None and types_of(kind) > 1:
            others = batch | {"token_type_ids": 1 - more["token_type_ids"]}
            assert not torch.allclose(blocks.logits(z, torch.tensor(1.0), block=0, **others), found)


# What is refused


HOLES = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]]).expand(3, T)
WRONG = [
    (HOLES, ValueError, r"no holes and no row .* got \[1, 1, 0, 1, .* in row 0"),
    (MASK * torch.tensor([[1], [0], [1]]), ValueError, r"got \[0, 0, .* in row 1"),
    (MASK[:, None, None] * MASK[:, None, :, None], ValueError, r"\[3, 8\], got \[3, 1, 8, 8\]"),
    (MASK[:, :5], ValueError, r"shape of the tokens, \[3, 8\], got \[3, 5\]"),
    (2 * MASK, ValueError, "must be 0 or 1"),
    ((1 - MASK.float()) * -1e9, ValueError, "must be 0 or 1"),
    (MASK[0], ValueError, r"\[3, 8\], got \[8\]; give each text a row of its own"),
    (MASK[:1], ValueError, r"\[3, 8\], got \[1, 8\]; give each text a row of its own"),
    (MASK.to(torch.complex64), TypeError, r"0 and 1, got torch\.complex64"),
    (MASK.tolist(), TypeError, "got list"),
]


@pytest.mark.parametrize(("mask", "error", "message"), WRONG)
def test_masks_that_are_refused(mask, error, message):
    causal = causal_blocks("llama", "single")
    config = BlocksConfig(2, schedule=MaskSchedule())
    masked = convert(encoder_model("bert", "masks"), config, task="tokens", mask_token_id=2)
    classes = convert(encoder_model("bert", "classes"), BlocksConfig(2), task="classes")
    batch = {"tokens": TOKENS, "attention_mask": mask}
    for blocks in (causal, masked, classes):
        labels = {"labels": torch.zeros(3, dtype=torch.int64)} if blocks is classes else {}
        with pytest.raises(error, match=message):
            blocks.loss(batch | labels, 0)
        with pytest.raises(error, match=message):
            blocks.base_model.plain_loss(batch | labels, torch.full_like(TOKENS, MASKED))
    with pytest.raises(error, match=message):
        causal.logits(torch.zeros(3, T, 16), torch.tensor(1.0), block=0, **batch)


@pytest.mark.parametrize("task", ["causal", "masks", "classes"])
def test_forms_of_masks_and_ids(task):
    """Those that tokenizers and collators make, in training and in calls."""
    sigma, more, name = torch.tensor(0.5), {}, "tokens"
    if task == "causal":
        blocks, z = causal_blocks("llama", "single"), torch.randn(3, T, 16, generator=seeded(3))
    elif task == "masks":
        config = BlocksConfig(2, schedule=MaskSchedule())
        blocks = convert(encoder_model("bert", "masks"), config, task="tokens", mask_token_id=2)
        z, name = torch.where(torch.arange(T) % 2 == 0, MASKED, TOKENS), ""
    else:
        blocks = convert(encoder_model("bert", "classes"), BlocksConfig(2), task="classes")
        z, more = torch.randn(3, 16, generator=seeded(3)), {"labels": torch.tensor([0, 3, 1])}
    tokens = {"tokens": TOKENS}
    ids = torch.tensor([7, 3, 4, 5, 11, 12, 2, 1])
    whole = {"attention_mask": MASK, "position_ids": ids.expand(3, T)}
    forms = [{"attention_mask": MASK.float()}, {"attention_mask": MASK.to(torch.uint8)}]
    forms += [{"position_ids": form} for form in (ids, ids[None], ids.int(), ids[None].short())]
    if task != "causal":
        whole["token_type_ids"] = TYPES.expand(3, T)
        forms += [{"token_type_ids": TYPES[0]}, {"token_type_ids": TYPES[:1].int()}]

    def outcome(given):
        loss = blocks.loss({**tokens, **more, **given}, 1, generator=seeded()).loss
        call = given | (tokens if name else {})
        return loss, blocks.logits(z, sigma, block=0, **call)

    with torch.no_grad():
        expected = outcome(whole)
        assert not torch.allclose(outcome({**whole, "position_ids": None})[1], expected[1])
        for form in forms:
            for found, right in zip(outcome(whole | form), expected, strict=True):
                assert torch.equal(found, right), form.keys()
        alone = {key: value for key, value in whole.items() if key != "attention_mask"}
        alike = {key: value[0] for key, value in alone.items()}
        for found, right in zip(outcome(alike), outcome(alone), strict=True):
            assert torch.equal(found, right)


def test_likelihoods_of_padded_texts(monkeypatch):
    """Of converted models, with noise that depends on a token's place in its text alone."""
    noise = 80 * torch.randn(T, 16, generator=seeded(3))
    top = lambda model, tokens, _: noise[: tokens.shape[1]].expand(len(tokens), -1, -1)
    monkeypatch.setattr(likelihood, "_noise_at_top", top)
    for rows in ("single", "doubled"):
        blocks = causal_blocks("llama", rows)
        found = next_token_nll(blocks, TOKENS, attention_mask=MASK, generator=seeded())
        for n, (a, b) in enumerate(RANGES):
            alone = next_token_nll(blocks, TOKENS[n : n + 1, a:b], generator=seeded())
            torch.testing.assert_close(found[n, a : b - 1], alone[0], rtol=1e-4, atol=1e-4)
            assert not found[n, :a].any()
            assert not found[n, b - 1 :].any()
    config = BlocksConfig(2, schedule=MaskSchedule())
    for kind in ("bert", "roberta"):
        model = convert(encoder_model(kind, "masks"), config, task="tokens", mask_token_id=2)
        gaps = TOKENS.masked_fill(torch.rand(3, T, generator=seeded(3)) < 0.7, MASKED)
        written = unmask(
            model, gaps, attention_mask=MASK, num_steps=4, generator=seeded()
        ).tokens  # fmt: skip
        for n, (a, b) in enumerate(RANGES):
            text = gaps[n : n + 1, a:b].expand(3, -1)
            alone = unmask(model, text, num_steps=4, generator=seeded()).tokens
            assert torch.equal(written[n, a:b], alone[n])
        terms = bound_terms(model, TOKENS, attention_mask=MASK, points=2)
        other = torch.where(MASK == 1, TOKENS, 5)
        assert torch.allclose(
            bound_terms(model, other, attention_mask=MASK, points=2).nats, terms.nats
        )


def test_ids_that_are_refused():
    causal = causal_blocks("llama", "single")
    classes = convert(encoder_model("bert", "classes"), BlocksConfig(2), task="classes")
    labels = torch.zeros(3, dtype=torch.int64)
    for ids, message in (
        (TOKENS + 30, r"position_ids must be in 0\.\.3[13], got"),
        (TOKENS[:, :2], r"position_ids must have the shape .* \[3, 2\]"),
    ):
        for blocks, more in ((causal, {}), (classes, {"labels": labels})):
            with pytest.raises(ValueError, match=message):
                blocks.loss({"tokens": TOKENS, "position_ids": ids, **more}, 0)
    for ids in (TOKENS.float(), TOKENS.bool(), TOKENS.tolist()):
        with pytest.raises(TypeError, match="position_ids must be a tensor of integers, got"):
            causal.loss({"tokens": TOKENS, "position_ids": ids}, 0)
    with pytest.raises(ValueError, match=r"token_type_ids must be in 0\.\.1, got"):
        classes.loss({"tokens": TOKENS, "token_type_ids": TOKENS, "labels": labels}, 0)
    packed = {"tokens": TOKENS[:1], "cu_seqlens": torch.tensor([0, 3, 8], dtype=torch.int32)}
    for name in ("attention_mask", "position_ids"):
        with pytest.raises(ValueError, match=f"{name} must be None with cu_seqlens"):
            causal.loss(packed | {name: torch.ones_like(TOKENS[:1])}, 0)
    with pytest.raises(ValueError, match="'token_type_ids' too"):
        causal.loss({"tokens": TOKENS, "token_type_ids": TYPES}, 0)
    distilled = convert(encoder_model("distilbert", "classes"), BlocksConfig(2), task="classes")
    with pytest.raises(ValueError, match="'token_type_ids' too"):
        distilled.loss({"tokens": TOKENS, "token_type_ids": TYPES, "labels": labels}, 0)
