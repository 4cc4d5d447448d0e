"""Targets: what they own, how often they are checked, and that they go where their network goes."""

import copy
import io
import math
import pickle
from typing import ClassVar

import pytest
import torch
from masked_tools import lm_of as masked_of
from torch import nn

from dblocks.blocks import (
    BlocksConfig,
    ClassTarget,
    DiffusionBlocks,
    Features,
    L2Target,
    MaskedTokenTarget,
    OutputHead,
    TokenTarget,
    make_optimizers,
    train_step,
)
from dblocks.blocks.targets import token_batch
from dblocks.nn import LabelEmbedding, Modulation, NoiseEmbedding
from dblocks.schedules import MASKED, MaskSchedule, NoiseSchedule
from lm_tools import lm_of, recurrent_of, tokens_of
from tools import DEVICE, normal, randomized, seeded

D, K = 16, 11


class Sizes:
    vocab_size, context = K, 12


class Small(nn.Module):
    """Three methods; subclasses hold a target as an attribute."""

    def __init__(self):
        super().__init__()
        self.noise = NoiseEmbedding(D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def embed_condition(self, batch, drop):
        return self.before(batch)

    def run_layers(self, layers, z_in, level, condition):
        x = condition + z_in + self.noise(level.c_noise)
        for layer in layers:
            x = x + layer(x).tanh()
        return x

    def features(self, hidden):
        return hidden


class Points(Small):
    batch: ClassVar = {"points": normal(4, D)}

    def __init__(self):
        super().__init__()
        self.target = L2Target("points")

    def before(self, batch):
        return 0.0


class Classes(Small):
    batch: ClassVar = {"images": normal(4, D), "labels": torch.arange(4, device=DEVICE)}

    def __init__(self, kind="posterior"):
        super().__init__()
        self.labels, self.head = LabelEmbedding(K, D), nn.Linear(D, K)
        head = self.head
        if kind == "learned":
            self.modulation = Modulation(D, 2)
            head = OutputHead(self.head, modulation=self.modulation)
        self.target = ClassTarget(self.labels, head, kind)

    def before(self, batch):
        return batch["images"]


class Tokens(Small):
    batch: ClassVar = {"tokens": tokens_of(4, 6)}

    def __init__(self):
        super().__init__()
        self.table, self.head = LabelEmbedding(K, D), nn.Linear(D, K)
        self.target = TokenTarget(self.table, self.head, Sizes, head="learned")

    def before(self, batch):
        return self.table(batch["tokens"]).roll(1, 1)


class Masked(Small):
    batch: ClassVar = {"tokens": tokens_of(4, 6)}

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(K + 1, D), nn.Linear(D, K)
        self.target = MaskedTokenTarget(self.head, Sizes)

    def before(self, batch):
        return 0.0

    def run_layers(self, layers, z_in, level, condition):
        z = self.table(torch.where(z_in == MASKED, K, z_in))
        x = z + self.noise(level.c_noise)[:, None]
        for layer in layers:
            x = x + layer(x).tanh()
        return x


SMALL = (Points, Classes, Tokens, Masked)


def blocks_of(kind, shared="train"):
    torch.manual_seed(0)
    schedule = MaskSchedule() if kind is Masked else NoiseSchedule()
    model = DiffusionBlocks(kind(), BlocksConfig(2, schedule=schedule, shared=shared))
    return randomized(model.to(DEVICE))


def loss_of(model, block=1):
    base = getattr(model, "base_model", None)
    batch = (base if isinstance(base, Small) else next(iter(model.copies.values()))).batch
    return model.loss(batch, block, generator=seeded()).loss


# Once a step


@pytest.mark.parametrize("make", [lm_of, recurrent_of, masked_of])
def test_a_step_checks_its_tokens_once(make, monkeypatch):
    calls = []
    check = token_batch.check_tokens
    monkeypatch.setattr(token_batch, "check_tokens", lambda *a: calls.append(1) or check(*a))
    schedule = MaskSchedule() if make is masked_of else NoiseSchedule()
    model = DiffusionBlocks(make(), BlocksConfig(2, schedule=schedule))
    optimizers = make_optimizers(model, torch.optim.SGD)
    mask = torch.ones(2, 8, dtype=torch.bool, device=DEVICE)
    train_step(model, {"tokens": tokens_of(), "loss_mask": mask}, optimizers, block=1)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", SMALL)
def test_a_step_checks_its_batch_once(kind, monkeypatch):
    model, calls = blocks_of(kind), []
    target = model.base_model.target
    check = type(target).check
    monkeypatch.setattr(type(target), "check", lambda *a: calls.append(type(a[1])) or check(*a))
    loss_of(model)
    assert calls.count(dict) == 1
    # Apart from it, draw and loss_at are public, and check what they are given.
    draw = model.draw(kind.batch, 1, generator=seeded())
    assert torch.equal(model.loss_at(kind.batch, 1, draw).loss, loss_of(model))


# They go where their network goes


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("shared", ["train", "private"])
def test_a_target_goes_with_copies_pickles_views_and_casts(kind, shared):
    model = blocks_of(kind, shared)
    expected, keys = loss_of(model), set(model.state_dict())
    assert not any("target" in key for key in keys)
    twin = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for other in (twin, pickled, loaded):
        assert torch.equal(loss_of(other), expected)
        mine = {id(p) for p in other.parameters()}
        held = {id(p) for b in range(2) for p in other.parts(b)[0].target.parameters()}
        assert held <= mine
        randomized(other)  # no parameter is shared with the first
    assert torch.equal(loss_of(model), expected)
    view = model.block(1)
    assert torch.equal(view.loss(kind.batch, generator=seeded()).loss, expected)
    alone = pickle.loads(pickle.dumps(view))
    assert sum(p.numel() for p in alone.parameters()) == sum(p.numel() for p in view.parameters())
    double = twin.double().parts(1)[0].target
    assert all(p.dtype == torch.float64 for p in double.parameters())


@pytest.mark.parametrize("kind", SMALL)
def test_a_network_of_three_methods_compiles(kind):
    model = blocks_of(kind)
    draw = model.draw(kind.batch, 1, generator=seeded())
    torch._dynamo.reset()  # another overlap would make it a symbol
    compiled = torch.compile(model.loss_at, fullgraph=True, backend="eager")
    found = compiled(kind.batch, 1, draw).loss
    torch._dynamo.reset()
    torch.testing.assert_close(found, model.loss_at(kind.batch, 1, draw).loss)


def test_private_copies_share_the_target_only():
    model = DiffusionBlocks(Classes().to(DEVICE), BlocksConfig(2, shared="private"))
    tables = [next(iter(model.parts(b)[0].target.parameters())) for b in range(2)]
    assert tables[0] is not tables[1]
    assert torch.equal(*tables)
    assert not any(t.requires_grad for t in tables)
    heads = {id(model.parts(b)[0].target.output_head.linear.weight) for b in range(2)}
    assert len(heads) == 2
    copied = model.parts(1)[0]
    assert copied.target.output_head.linear is copied.head


# What they own


@pytest.mark.parametrize("kind", ["posterior", "learned"])
def test_a_class_target_is_its_formula(kind):
    model = randomized(Classes(kind).to(DEVICE))
    z, f, cond = normal(4, D, seed=1), normal(4, D, seed=2), normal(4, D, seed=3)
    sigma = torch.tensor([0.2, 0.3, 0.5, 1.0], device=DEVICE)
    level = NoiseSchedule().level(sigma)
    rows = model.labels.rows()
    if kind == "posterior":
        expected = model.head(f) + z @ rows.T / sigma[:, None] ** 2
        features = f
    else:
        m = level.c_skip[:, None] * z + level.c_out[:, None] * f
        shift, scale = model.modulation(cond, 4)
        expected = model.head(m * (1 + scale) + shift)
        features = Features(f, cond)
    logits = model.target.predict(features, z, level)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    denoised = model.target.denoise(logits, z, level)
    torch.testing.assert_close(denoised, expected.softmax(-1) @ rows, rtol=1e-4, atol=1e-4)


def test_a_fixed_target_keeps_its_matrices():
    lm = randomized(lm_of())
    fixed = lm.target.fixed()
    assert fixed.rows() is fixed.rows()
    kept = fixed.rows().clone()
    lm.target_embedding.weight.data.mul_(-1)
    assert torch.equal(fixed.rows(), kept)
    assert torch.equal(lm.target.rows(), -kept)


@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    [
        (Points, {"points": None}, ValueError, "a batch must hold a tensor 'points', got the keys"),
        (Points, {"points": torch.ones(4, D).long()}, TypeError, "points must be floating point"),
        (Classes, {"images": None}, ValueError, "must hold a tensor 'images'"),
        (Classes, {"labels": torch.ones(3).long()}, ValueError, "4 images and 3 labels; pair them"),
        (Tokens, {"tokens": torch.ones(2, 13).long()}, ValueError, "at most context=12 long"),
        (Masked, {"cu_seqlens": torch.ones(2).int()}, ValueError, "must not hold 'cu_seqlens'"),
    ],
)
def test_batches_are_checked(kind, change, error, message):
    model = blocks_of(kind).cpu()
    batch: ClassVar = {key: value.cpu() for key, value in kind.batch.items()} | change
    with pytest.raises(error, match=message):
        model.loss(batch, 0)


def test_kinds_of_heads_are_checked():
    with pytest.raises(
        ValueError, match=r"head must be one of .*'posterior', 'learned'.*, got 'x'"
    ):
        ClassTarget(LabelEmbedding(K, D), nn.Linear(D, K), "x")


def test_one_block_needs_to_be_named():
    with pytest.raises(ValueError, match="block must say which block's loss to take, got None"):
        blocks_of(Points).loss(Points.batch)


class Adapted(nn.Linear):
    """As a linear layer with an adapter: its weight is not all that it computes with."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_computes_something_else_is_refused(tied):
    with pytest.raises(TypeError, match=r"must be an nn\.Linear.*got a Adapted"):
        ClassTarget(LabelEmbedding(3, 4), Adapted(4, 3))
    if tied:
        return
    network = lm_of(tied=False)
    model = DiffusionBlocks(network, BlocksConfig(3))
    network.output_head = Adapted(*reversed(network.output_head.weight.shape), bias=False)
    with pytest.raises(TypeError, match="merge its adapter"):
        model.loss({"tokens": tokens_of()}, 0)


def test_an_embedding_without_rows_of_one_norm_is_refused():
    with pytest.raises(TypeError, match=r"such as a dblocks\.nn\.LabelEmbedding"):
        ClassTarget(nn.Embedding(3, 4), nn.Linear(4, 3))


class Given(Small):
    """Features [N, 1, D] or of another width, and a head of any size."""

    def __init__(self, head, kind, shape=(D,)):
        super().__init__()
        self.head, self.shape = head, shape
        self.target = ClassTarget(LabelEmbedding(K, D), OutputHead(head), kind, given="points")

    def before(self, batch):
        return batch["points"]

    def features(self, hidden):
        return hidden[:, :1].expand(-1, math.prod(self.shape)).reshape(len(hidden), *self.shape)


POINTS = {"points": normal(4, D), "labels": torch.arange(4, device=DEVICE)}


@pytest.mark.parametrize("kind", ["posterior", "learned"])
@pytest.mark.parametrize("size", [1, K - 1, K + 1])
def test_a_head_of_another_size_is_refused(kind, size):
    model = DiffusionBlocks(Given(nn.Linear(D, size), kind).to(DEVICE), BlocksConfig(2))
    message = rf"logits must have shape \[4, {K}\], .* got \[4, {size}\] from features \[4, {D}\]"
    with pytest.raises(ValueError, match=message):
        model.loss(POINTS, 0)
    with pytest.raises(ValueError, match=message):
        model(normal(4, D), 80.0, points=POINTS["points"])


@pytest.mark.parametrize("kind", ["posterior", "learned"])
@pytest.mark.parametrize("shape", [(1, D), (3, D), ()])
def test_class_features_are_a_row_a_sample(kind, shape):
    model = DiffusionBlocks(Given(nn.Linear(D, K), kind, shape).to(DEVICE), BlocksConfig(2))
    with pytest.raises(ValueError, match=r"features must have shape \[4, (D|16)\], a row for each"):
        model.loss(POINTS, 0)


def test_features_of_a_learned_head_are_as_wide_as_the_embedding():
    model = DiffusionBlocks(Given(nn.Linear(8, K), "learned", (8,)).to(DEVICE), BlocksConfig(2))
    with pytest.raises(ValueError, match=r"features must have shape \[4, 16\], .* got \[4, 8\]"):
        model.loss(POINTS, 0)
    narrow = DiffusionBlocks(Given(nn.Linear(8, K), "posterior", (8,)).to(DEVICE), BlocksConfig(2))
    assert narrow.loss(POINTS, 0).loss.isfinite()


@pytest.mark.parametrize("size", [K - 1, K + 1])
def test_heads_of_tokens_have_a_row_a_token(size):
    model = lm_of(tied=False)
    model.output_head = nn.Linear(model.config.width, size, device=DEVICE)
    with pytest.raises(
        ValueError, match=rf"a row for each embedding, got a weight of \[{size}, 16"
    ):
        _ = model.target
    target = MaskedTokenTarget(nn.Linear(D, size, device=DEVICE), Sizes)
    with pytest.raises(ValueError, match=rf"V = {K} tokens, got \[2, 3, {size}\]"):
        target.predict(normal(2, 3, D), tokens_of(2, 3), None)
