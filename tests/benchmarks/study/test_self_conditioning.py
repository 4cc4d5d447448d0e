import dataclasses
import math

import pytest
import torch

from benchmarks.study import layers, running, vit_study
from benchmarks.study.causal_lm import EVALUATIONS
from benchmarks.study.self_conditioning.causal_lm import SelfCausalLMRun
from benchmarks.study.self_conditioning.networks import (
    BEFORE,
    ConditionedBlocks,
    ConditionedLM,
    ConditionedViT,
    chain,
    product,
)
from benchmarks.study.self_conditioning.runs import FORWARD, layers_per_step
from benchmarks.study.self_conditioning.vit import SelfViTRun, SelfViTTrainer
from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.models import CausalLM, CausalLMConfig, ViT, ViTConfig
from dblocks.models.vit import classify
from dblocks.recipes.metrics import NOISE_SEED
from dblocks.recipes.records import train
from dblocks.sampling import initial_noise, next_token_nll

pytestmark = pytest.mark.usefixtures("one_thread")
K = 5
SIZES = {
    "vit": {
        "image_size": 8, "channels": 1, "patch_size": 4, "width": 16, "depth": 6, "heads": 2,
        "num_classes": K, "conditioning": "official", "gate_init": 1.0,
    },
    "lm": {
        "vocab_size": K, "context": 8, "width": 16, "depth": 6, "heads": 2, "rows": "single",
        "head": "posterior", "conditioning": "none",
    },
}  # fmt: skip
KINDS = {
    "vit": (ViT, ConditionedViT, ViTConfig),
    "lm": (CausalLM, ConditionedLM, CausalLMConfig),
}
CONFIG = BlocksConfig(3, top_share=0.6, weighting="none")


def blocks_of(kind, share=1.0):
    """The same weights in blocks without and with the condition, whose W is not zero."""
    plain, conditioned, config = KINDS[kind]
    torch.manual_seed(0)
    network = plain(config(**SIZES[kind]))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    other = conditioned(config(**SIZES[kind]))
    missing = other.load_state_dict(network.state_dict(), strict=False)
    assert missing == (["before.weight"], [])
    assert not other.before.weight.any()
    return DiffusionBlocks(network, CONFIG), ConditionedBlocks(other, CONFIG, share)


def batch_of(kind, n=6):
    generator = torch.Generator().manual_seed(1)
    if kind == "lm":
        return {"tokens": torch.randint(K, (n, 8), generator=generator)}
    return {
        "images": torch.randn(n, 1, 8, 8, generator=generator),
        "labels": torch.randint(K, (n,), generator=generator),
    }


def read_by_calls(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


def start(kind, blocks, n=6):
    shape = (n, 8, 16) if kind == "lm" else (n, 16)
    generator = torch.Generator().manual_seed(2)
    return initial_noise(shape, blocks.config.noise_schedule, generator=generator)


both = pytest.mark.parametrize("kind", ["vit", "lm"])


@both
def test_at_zero_weights_the_condition_changes_no_bit(kind):
    plain, conditioned = blocks_of(kind)
    batch, z = batch_of(kind), start(kind, plain)
    sigma = z.new_full((len(z),), plain.config.noise_schedule.sigma_max)
    cond = read_by_calls(batch)
    alone = [plain.logits(z, sigma, block=b, **cond).log_softmax(-1) for b in range(3)]
    for got, expected in zip(chain(conditioned, z, **cond), alone, strict=True):
        assert torch.equal(got, expected)
    for block in range(3):
        draw = plain.draw(batch, block, generator=torch.Generator().manual_seed(3))
        given = {**batch, BEFORE: alone[0].exp()}
        expected, got = plain.loss_at(batch, block, draw), conditioned.loss_at(given, block, draw)
        assert torch.equal(got.losses, expected.losses)


@both
def test_without_the_entry_it_is_the_network_without_the_condition(kind):
    plain, conditioned = blocks_of(kind)
    torch.nn.init.normal_(conditioned.base_model.before.weight)
    batch = batch_of(kind)
    if kind == "vit":
        images = batch["images"]
        assert torch.equal(classify(conditioned, images), classify(plain, images))
    else:
        tokens = batch["tokens"]
        nll = [
            next_token_nll(model, tokens, generator=torch.Generator().manual_seed(0))
            for model in (plain, conditioned)
        ]
        assert torch.equal(*nll)


@both
@pytest.mark.parametrize("block", [0, 1, 2])
def test_no_gradient_reaches_the_blocks_before(kind, block):
    _, conditioned = blocks_of(kind)
    torch.nn.init.normal_(conditioned.base_model.before.weight)
    ran, differentiated = [], []

    def forward(at, layer):
        layer.register_forward_hook(lambda *_: ran.append((at, torch.is_grad_enabled())))
        layer.register_full_backward_hook(lambda *_: differentiated.append(at))

    for at, layer in enumerate(conditioned.base_model.layers):
        forward(at // 2, layer)
    conditioned.loss(
        batch_of(kind), block, generator=torch.Generator().manual_seed(0)
    ).loss.backward()
    expected = [(b, b == block) for b in range(block + 1) for _ in range(2)]
    assert ran == expected
    assert differentiated == [block] * 2
    for at, layer in enumerate(conditioned.base_model.layers):
        has = any(p.grad is not None for p in layer.parameters())
        assert has == (at // 2 == block)
    gradient = conditioned.base_model.before.weight.grad
    assert (gradient is not None and bool(gradient.any())) == (block > 0)


@both
def test_a_block_is_given_what_the_chain_of_those_before_it_predicts(kind):
    _, conditioned = blocks_of(kind)
    torch.nn.init.normal_(conditioned.base_model.before.weight)
    batch, z = batch_of(kind), start(kind, conditioned)
    cond = read_by_calls(batch)
    sigma = z.new_full((len(z),), conditioned.config.noise_schedule.sigma_max)
    first, second, third = chain(conditioned, z, **cond)
    assert torch.equal(first, conditioned.logits(z, sigma, block=0, **cond).log_softmax(-1))
    for block, before, got in ((1, first, second), (2, second, third)):
        expected = conditioned.logits(z, sigma, block=block, **cond, before=before.exp())
        assert torch.equal(got, expected.log_softmax(-1))
        assert not torch.allclose(got, conditioned.logits(z, sigma, block=block, **cond))
    assert len(chain(conditioned, z, 2, **cond)) == 2
    mean = (first + second + third) / 3
    torch.testing.assert_close(product([first, second, third]), mean.log_softmax(-1))


def test_a_prediction_of_a_token_knows_those_before_it_only():
    _, conditioned = blocks_of("lm")
    torch.nn.init.normal_(conditioned.base_model.before.weight)
    tokens, z = batch_of("lm")["tokens"], start("lm", conditioned)
    changed = tokens.clone()
    changed[:, 4] = (tokens[:, 4] + 1) % K
    for a, b in zip(
        chain(conditioned, z, tokens=tokens), chain(conditioned, z, tokens=changed), strict=True
    ):
        torch.testing.assert_close(a[:, :5], b[:, :5], rtol=0, atol=1e-6)
        assert not torch.allclose(a[:, 5], b[:, 5])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_steps_sees_the_block_before(share):
    _, conditioned = blocks_of("vit", share)
    seen, made = [], conditioned.before
    conditioned.before = lambda *args: seen.append(args[1]) or made(*args)
    generator = torch.Generator().manual_seed(0)
    batch = batch_of("vit")
    for step in range(60):
        conditioned.loss(batch, step % 3, generator=generator)
    assert set(seen) <= {1, 2}
    assert len(seen) == pytest.approx(40 * share, abs=8 if share == 0.5 else 0)


@both
def test_what_is_wrong_is_refused(kind):
    _, conditioned = blocks_of(kind)
    z, cond = start(kind, conditioned), read_by_calls(batch_of(kind))
    with pytest.raises(ValueError, match="before must hold probabilities of shape"):
        conditioned.logits(z, 80.0, block=1, **cond, before=torch.zeros(2, 3))
    if kind == "lm":
        with pytest.raises(ValueError, match="single rows of one token each, got rows='doubled'"):
            ConditionedLM(CausalLMConfig(**{**SIZES["lm"], "rows": "doubled"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, "share must be between 0 and 1"),
        ({"block": 1}, "block must be left out"),
        ({"end_to_end": True}, "end_to_end must be left out"),
        ({"resident": True}, "resident must be left out"),
        ({"blocks": 1}, "blocks must be 2 or more"),
        ({"shared": "frozen"}, "shared must not be 'frozen'"),
    ],
)
def test_runs_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelfViTRun(**options)


def test_padding_is_refused_in_every_step():
    _, conditioned = blocks_of("lm", share=0.0)
    batch = {**batch_of("lm"), "attention_mask": torch.ones(6, 8, dtype=torch.long)}
    for block in range(3):
        with pytest.raises(ValueError, match="must have no padding, got an attention_mask"):
            conditioned.loss(batch, block, generator=torch.Generator().manual_seed(0))


TINY = {"width": 16, "depth": 3, "heads": 2, "batch_size": 64, "points": 2}


def test_a_vit_learns_digits_by_its_chain():
    run = SelfViTRun(steps=120, lr=4e-3, **{**TINY, "batch_size": 32})
    trained = train(run)
    record, trainer = trained.record, trained.trainer
    assert trainer.network.before.weight.any()
    assert min(record["blocks_alone"]) > 0.2  # chance is .1
    assert record["accuracy"] > 0.25
    assert record["without_condition"]["accuracy"] > 0.2
    assert record["curve"][-1]["accuracy"] == record["accuracy"]
    extra = record["layer_evaluations"] - run.steps
    assert record["forward_only"] == extra
    assert record["work"] == pytest.approx(run.steps + extra / 3, abs=0.1)
    expected = layers_per_step(run.depth, run.blocks, run.share) * run.steps
    assert record["work"] == pytest.approx(expected, rel=0.1)


TEXT = {"width": 32, "depth": 3, "heads": 2, "context": 32, "windows": 8, "points": 1}


def test_a_language_model_learns_by_its_chain():
    run = SelfCausalLMRun(steps=80, lr=8e-3, part="selection", **TEXT)
    record = train(run).record
    vocabulary = record["model"]["vocab_size"]
    assert max(record["chain_bits"]) < math.log2(vocabulary) - 1
    assert record["bits"] == record["chain_bits"][-1]
    assert record["product_bits"] < math.log2(vocabulary) - 1
    # The first block has no condition: two ways to the same number.
    assert record["chain_bits"][0] == pytest.approx(record["first_bits"], rel=1e-6)
    assert record["forward_only"] == record["layer_evaluations"] - run.steps


def test_bits_are_the_cross_entropy_of_the_last_block():
    run = SelfCausalLMRun(steps=1, **TEXT)
    trainer = run.trainer()
    torch.nn.init.normal_(trainer.network.before.weight)
    text = trainer.corpus.evaluated
    window = type(text)(text.tokens[: run.context], run.context)
    trainer.corpus = dataclasses.replace(trainer.corpus, evaluated=window)
    found = trainer.chain_bits(None)
    tokens = text.tokens[None, : run.context].long()
    generator = torch.Generator().manual_seed(NOISE_SEED)
    shape = (*tokens.shape, run.width)
    z = initial_noise(shape, trainer.model.config.noise_schedule, generator=generator)
    p = chain(trainer.model, z, tokens=tokens)[-1].exp()
    picked = p[0, torch.arange(1, run.context), tokens[0, 1:]]
    assert found["chain_bits"][-1] == pytest.approx(-picked.log2().mean().item(), rel=1e-5)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    run = SelfViTRun(steps=9, **{**TINY, "batch_size": 8})
    monkeypatch.setattr(running, "EVERY", 4)
    expected = running.train_kept(run, tmp_path / "whole.json", tmp_path / "kept")
    step = SelfViTTrainer.step
    killed = []

    def once(self, number):
        if number == 6 and not killed:
            killed.append(number)
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(SelfViTTrainer, "step", once)
    with pytest.raises(KeyboardInterrupt):
        running.train_kept(run, tmp_path / "a.json", tmp_path / "kept")
    record = running.train_kept(run, tmp_path / "a.json", tmp_path / "kept")
    for key in ("accuracy", "blocks_alone", "curve", "layer_evaluations", "forward_only"):
        assert record[key] == expected[key]


def test_weights_begin_as_those_of_the_blocks_without_the_condition():
    run = SelfViTRun(steps=1, **TINY)
    plain = {f.name: getattr(run, f.name) for f in dataclasses.fields(run) if f.name != "share"}
    ours = run.trainer().network.state_dict()
    theirs = type(run).__mro__[1](**plain).trainer().network.state_dict()
    assert ours.keys() - theirs.keys() == {"before.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_all_randomness_comes_from_the_generator():
    losses = []
    for _ in range(2):
        _, conditioned = blocks_of("vit", 0.5)
        optimizers = make_optimizers(conditioned, lambda p: torch.optim.SGD(p, lr=0.1))
        generator = torch.Generator().manual_seed(5)
        steps = [
            train_step(conditioned, batch_of("vit"), optimizers, generator=generator)
            for _ in range(6)
        ]
        losses.append([step.loss.item() for step in steps])
    assert losses[0] == losses[1]


def test_rows_do_as_much_work_as_the_others():
    blocks = vit_study.FASHION.row("blocks").run
    budget = blocks.steps * blocks.depth // blocks.blocks
    for name, forward in (("blocks_self", FORWARD), ("blocks_self_calls", 1.0)):
        run = vit_study.FASHION.row(name).run
        per_step = layers_per_step(run.depth, run.blocks, run.share, forward)
        assert run.steps * per_step == pytest.approx(budget, rel=1e-3)
        steps = {"steps": run.steps, "share": 0.5}
        assert dataclasses.asdict(run) == dataclasses.asdict(blocks) | steps
    run = layers.TEXT.row("blocks_self").run
    per_step = layers_per_step(run.depth, run.blocks, run.share)
    assert run.steps * per_step == pytest.approx(EVALUATIONS, rel=1e-3)
