"""Exact posteriors: what a noisy embedding adds to a prediction, against Bayes' rule by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dblocks.blocks import BlocksConfig, DiffusionBlocks
from dblocks.models.language_model import Hidden
from dblocks.models.vit import Hidden as ViTHidden
from dblocks.schedules import NoiseSchedule
from dblocks.schedules.noise import SIGMA_MAX, SIGMA_MIN
from lm_tools import SINGLE, lm_of, recurrent_of, tokens_of
from tools import DEVICE, normal, randomized, seeded, vit

WIDTH = 16
SCALE = 3.0
# From sigma_min to sigma_max, even in ln sigma.
SIGMAS = st.floats(0, 1).map(lambda u: SIGMA_MIN * (SIGMA_MAX / SIGMA_MIN) ** u)
SCHEDULE = NoiseSchedule()


def with_exact_norms(model):
    """Signs for target embeddings: the norm of their rows is that of the formula to the bit."""
    signs = torch.randn(model.target_embedding.weight.shape, generator=seeded(5)).sign()
    model.target_embedding.weight.data.copy_(signs)
    return model


def language_model(kind, **options):
    options = {**SINGLE, "embed_scale": SCALE, "width": WIDTH, **options}
    lm = recurrent_of(**options) if kind == "recurrent" else lm_of(**options)
    return with_exact_norms(randomized(lm))


def classifier(**options):
    options = {"head": "posterior", "width": WIDTH, "embed_scale": SCALE, **options}
    return with_exact_norms(randomized(vit(**options)))


def predict(network, hidden, z, level):
    return network.target.predict(network.features(hidden), z, level)


def bayes(prior, z, rows, sigma):
    """ln p(k | z) from ln p(k) [..., K] and z [..., D], all densities written out, in float64."""
    prior, z, rows = prior.double(), z.double(), rows.double()
    D = rows.shape[1]
    square = (z[..., None, :] - rows).square().sum(-1)
    normal_density = -square / (2 * sigma**2) - D / 2 * math.log(2 * math.pi * sigma**2)
    joint = prior.log_softmax(-1) + normal_density
    return joint - joint.logsumexp(-1, keepdim=True)


def level_of(shape, sigma, dtype=torch.float64):
    return SCHEDULE.level(torch.full(shape, sigma, dtype=dtype, device=DEVICE))


@settings(max_examples=25)
@given(
    sigma=SIGMAS,
    kind=st.sampled_from(["causal", "recurrent"]),
    tied=st.booleans(),
    rows=st.sampled_from(["single", "doubled"]),
    each=st.sampled_from(["sample", "token"]),
)
def test_language_models(sigma, kind, tied, rows, each):
    lm = language_model(kind, tied=tied, rows=rows).double()
    tokens, hidden = tokens_of(2, 5), Hidden(normal(2, 5, WIDTH, seed=1).double(), None)
    level = level_of((2,) if each == "sample" else (2, 5), sigma)
    y = lm.target.embed({"tokens": tokens}).double()
    z = y + sigma * normal(2, 5, WIDTH).double()
    prior = predict(lm, hidden, torch.zeros_like(z), level)
    got = predict(lm, hidden, z, level)
    assert got.dtype == torch.float64
    expected = bayes(prior, z, lm.target_embedding.rows(), sigma)
    torch.testing.assert_close(got.log_softmax(-1), expected, rtol=1e-9, atol=1e-8)
    # And the prior is the output head's, whatever the level.
    f = torch.nn.functional.rms_norm(hidden.x, (WIDTH,), lm.norm.weight, lm.norm.eps)
    matrix = lm.target_embedding.rows().double() / SCALE if tied else lm.output_head.weight
    head = lm.log_logit_scale.exp() * f @ matrix.T
    torch.testing.assert_close(prior, head, rtol=1e-9, atol=1e-9)
    denoised = lm.target.denoise(got, z, level)
    expected = expected.exp() @ lm.target_embedding.rows().double()
    torch.testing.assert_close(denoised, expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=25)
@given(sigma=SIGMAS, conditioning=st.sampled_from(["dit", "none"]))
def test_classifiers(sigma, conditioning):
    model = classifier(conditioning=conditioning).double()
    hidden = ViTHidden(normal(4, 3, WIDTH, seed=1).double(), None)
    level, labels = level_of((4,), sigma), torch.arange(4, device=DEVICE)
    z = model.target.embed({"labels": labels}).double() + sigma * normal(4, WIDTH).double()
    prior = predict(model, hidden, torch.zeros_like(z), level)
    got = predict(model, hidden, z, level)
    expected = bayes(prior, z, model.target_embedding.rows(), sigma)
    torch.testing.assert_close(got.log_softmax(-1), expected, rtol=1e-9, atol=1e-8)


@settings(max_examples=10)
@given(sigma=SIGMAS, tied=st.booleans())
def test_rows_of_any_embedding_are_of_one_norm_but_for_rounding(sigma, tied):
    """Rows are normalised in float32; |E_k|^2 / (2 sigma^2) differs by that."""
    lm = randomized(lm_of(**SINGLE, tied=tied)).double()
    hidden, level = Hidden(normal(2, 5, WIDTH, seed=1).double(), None), level_of((2,), sigma)
    z = lm.target.embed({"tokens": tokens_of(2, 5)}).double() + sigma * normal(2, 5, 16).double()
    prior = predict(lm, hidden, torch.zeros_like(z), level)
    expected = bayes(prior, z, lm.target_embedding.rows(), sigma)
    got = predict(lm, hidden, z, level).log_softmax(-1)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-8 + 2**-22 / sigma**2)


# Under autocast


def bounds(logits):
    """What float32 may be off by: a product and a sum over 16 numbers, of logits so large."""
    return 20 * torch.finfo(torch.float32).eps * logits.abs().max().item() + 1e-5


@pytest.mark.parametrize("sigma", [SIGMA_MIN, 0.05, SIGMA_MAX])
@pytest.mark.parametrize("tied", [True, False])
def test_noise_is_read_in_float32_under_autocast(tied, sigma):
    """In bfloat16 the error at sigma_min would be thousands of nats at this norm."""
    lm, tokens = language_model("causal", tied=tied), tokens_of(2, 5)
    hidden, level = Hidden(normal(2, 5, WIDTH, seed=1), None), level_of((2, 5), sigma, torch.float)
    z = lm.target.embed({"tokens": tokens}) + sigma * normal(2, 5, WIDTH)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got, features = predict(lm, hidden, z, level), lm.features(hidden)
        losses = lm.target.score(features, z, level, z, torch.zeros(()), {"tokens": tokens})
        others = lm.target.score(
            features, z, level, z, torch.zeros(()), {"tokens": (tokens + 1) % 11}
        )
    assert got.dtype == losses.dtype == torch.float32
    prior = predict(
        lm.double(),
        Hidden(hidden.x.double(), None),
        torch.zeros_like(z).double(),
        level_of((2, 5), sigma),
    )
    exact = bayes(prior, z, lm.target_embedding.rows(), sigma)
    limit = bounds(got)
    assert limit < 20
    assert (got.log_softmax(-1).double() - exact).abs().max() < limit
    # The loss is that of these logits; the first token of a sequence is not scored.
    for price, labels in ((losses, tokens), (others, (tokens + 1) % 11)):
        expected = -exact.gather(-1, labels[..., None])[..., 0]
        expected[:, 0] = 0
        assert (price.double() - expected * 10 / 8).abs().max() < 2 * limit


@pytest.mark.parametrize("sigma", [SIGMA_MIN, 0.05, SIGMA_MAX])
def test_a_classifier_reads_noise_in_float32_under_autocast(sigma):
    model, images = classifier(), normal(4, 3, 8, 8, seed=2)
    labels = torch.arange(4, device=DEVICE)
    level = level_of((4,), sigma, torch.float)
    z = model.target.embed({"labels": labels}) + sigma * normal(4, WIDTH)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        condition = model.embed_condition({"images": images})
        hidden = model.run_layers(model.layers, level.c_in[:, None] * z, level, condition)
        got, prior = (predict(model, hidden, noisy, level) for noisy in (z, torch.zeros_like(z)))
    assert got.dtype == torch.float32
    exact = bayes(prior, z, model.target_embedding.rows(), sigma)
    assert (got.log_softmax(-1).double() - exact).abs().max() < bounds(got)


@pytest.mark.parametrize("kind", ["causal", "recurrent"])
def test_parameters_may_be_bfloat16(kind):
    model = DiffusionBlocks(language_model(kind, tied=False).bfloat16(), BlocksConfig(2))
    tokens = tokens_of(2, 5)
    y = model.base_model.target.embed({"tokens": tokens})
    logits = model.logits(y, SIGMA_MIN, tokens=tokens)
    assert logits.dtype == torch.float32
    assert torch.equal(logits.argmax(-1), tokens)
    assert model.loss({"tokens": tokens}, 1, generator=seeded()).loss.isfinite()
