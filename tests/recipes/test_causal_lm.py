import math

import pytest
import torch

from dblocks.blocks import DiffusionBlocks
from dblocks.recipes import causal_lm
from dblocks.recipes.causal_lm import GPU, PUBLISHED, CausalLMRun
from dblocks.recipes.columns import SAMPLES
from dblocks.recipes.data.text import Text, load_corpus
from dblocks.recipes.data.tokenizers import Characters
from dblocks.recipes.data.windows import scored_windows
from dblocks.recipes.metrics import NOISE_SEED
from dblocks.recipes.metrics.autoregressive import bits_per_character
from dblocks.recipes.records import train
from dblocks.recipes.text_run import PROMPT, continuations
from dblocks.sampling import next_token_nll, product_nll

SIZES = {"width": 16, "depth": 3, "heads": 2, "context": 20, "batch_size": 4}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("".join(f"{i} is followed by {i + 1}. " for i in range(60)))
    return str(path)


def begin(story, **fields):
    return CausalLMRun(**{"steps": 2, "data": story, **SIZES, **fields}).trainer()


def test_run_round_trips():
    for run in (CausalLMRun(lr=3e-4, kv_heads=1), GPU):
        assert CausalLMRun.from_json(run.to_json()) == run


def test_the_larger_recipe_is_a_model_of_its_own():
    config = GPU.model_config(50_257)
    assert (config.width, config.heads, config.kv_heads, config.context) == (768, 12, 4, 1024)
    assert GPU.bf16
    assert GPU.device == "cuda"


def test_only_the_blocked_network_is_conditioned(story):
    assert begin(story).network.noise_embedding is not None
    assert begin(story, end_to_end=True).network.noise_embedding is None


@pytest.mark.parametrize("end_to_end", [False, True])
def test_runs_of_one_seed_are_bitwise_equal(story, end_to_end):
    def losses(seed):
        trainer = begin(story, seed=seed, end_to_end=end_to_end)
        return [trainer.step(step) for step in range(2)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_autocast_computes_in_bfloat16(story):
    trainer = begin(story, bf16=True)
    dtypes = set()
    trainer.network.layers[0].mlp.register_forward_hook(lambda *a: dtypes.add(a[-1].dtype))
    assert math.isfinite(sum(trainer.step(step)[1] for step in range(6)))
    assert dtypes == {torch.bfloat16}


@pytest.fixture(autouse=True)
def _few_temperatures(monkeypatch):
    monkeypatch.setattr(causal_lm, "TEMPERATURES", (0.7, 1.0))


@pytest.mark.parametrize("published", [False, True])
def test_record_counts_the_rows_of_each_layer(story, published):
    fields = PUBLISHED if published else {}
    run = CausalLMRun(steps=4, points=2, data=story, blocks=1, **SIZES, **fields)
    record = train(run).record
    # Doubled: two layers on both halves, the last on noisy rows alone.
    assert record["layers_per_step"] == (5 if published else 3)
    assert record["samples"] == 16
    assert record["adaln"] == published
    # One block is the product of all blocks.
    assert record["product_bits"] == pytest.approx(record["bits"])
    names = {"1@1", "product@0.7", "product@1"}
    assert set(record["samples_written"]) == names
    assert {len(text) for n in names for text in record["samples_written"][n]} == {20 - PROMPT}
    bound = record["bound"]
    assert bound["bits"] > sum(bound["by_block"]) > 0
    assert bound["std_error"] > 0
    assert record["sha256"] == load_corpus(story).sha256
    assert [point["step"] for point in record["curve"]] == [2, 4]
    assert all(point["bits"] > 0 for point in record["curve"])


def test_plain_record_has_one_prediction(story):
    record = train(CausalLMRun(steps=2, points=1, data=story, end_to_end=True, **SIZES)).record
    assert record["layers_per_step"] == 3
    assert not {"product_bits", "bound"} & record.keys()
    assert set(record["samples_written"]) == {"plain@0.7", "plain@1"}
    assert not record["adaln"]


def test_blocks_without_draws_at_the_top_have_no_product(story):
    record = train(CausalLMRun(steps=2, points=1, data=story, **SIZES, **PUBLISHED)).record
    assert "product_bits" not in record
    assert set(record["samples_written"]) == {"1@1", "3@1"}


def test_a_run_that_chooses_a_learning_rate_measures_no_more_than_that_needs(story):
    record = train(CausalLMRun(steps=2, part="selection", data=story, **SIZES)).record
    assert record["product_bits"] > 0
    assert not {"bound", "samples_written"} & record.keys()


def test_tokens_are_written_in_blocks(story):
    record = train(CausalLMRun(steps=2, data=story, tokens_per_block=4, **SIZES)).record
    assert record["model"]["tokens_per_block"] == record["model"]["tokens_per_sigma"] == 4
    assert record["bound"]["bits"] > 0
    plain = CausalLMRun(data=story, tokens_per_block=4, end_to_end=True, **SIZES)
    assert plain.model_config(5).tokens_per_block == 1


def test_results_are_of_no_more_windows_than_asked(story):
    trainer = begin(story, windows=2, part="selection")
    torch.nn.init.normal_(trainer.network.log_logit_scale)
    assert trainer.results({})["bits"] == trainer.bits(windows=2) != trainer.bits()


def test_an_untrained_plain_model_is_near_the_uniform(story):
    trainer = begin(story, end_to_end=True)
    torch.nn.init.constant_(trainer.network.log_logit_scale, -20)
    uniform = math.log2(trainer.corpus.tokenizer.size)
    assert trainer.bits() == pytest.approx(uniform, rel=1e-3)


def test_bits_are_of_characters_and_of_every_token_once(story):
    trainer = begin(story, end_to_end=True)
    text = trainer.corpus.evaluated
    one = bits_per_character(trainer.network, text, 20)
    doubled = Text(text.tokens, 2 * text.characters)
    assert bits_per_character(trainer.network, doubled, 20) == pytest.approx(one / 2)
    short = Text(text.tokens[:20], 20)
    nats = next_token_nll(trainer.network, short.tokens[None]).mean().item()
    assert bits_per_character(trainer.network, short, 20) == pytest.approx(nats / math.log(2))
    assert bits_per_character(trainer.network, text, 20, batch_size=3) == pytest.approx(one)


def test_bits_of_some_windows_are_of_all_parts_of_the_text(story):
    trainer = begin(story, end_to_end=True)
    text = trainer.corpus.evaluated
    pairs = list(scored_windows(text.tokens, 20, 1, windows=3))
    nats = [next_token_nll(trainer.network, t)[m[:, 1:]] for t, m in pairs]
    expected = torch.cat(nats).mean().item() / math.log(2)
    assert trainer.bits(windows=3) == pytest.approx(expected)
    assert trainer.measure() == {"bits": trainer.bits(windows=32), "windows": 32}


def test_blocks_are_measured_with_the_same_noise_each_time(story):
    trainer = begin(story)
    torch.nn.init.normal_(trainer.network.log_logit_scale)
    for options in ({}, {"product": True}):
        assert trainer.bits(**options) == trainer.bits(**options)
    for options in ({"num_steps": 3}, {"product": True}):
        assert trainer.samples(**options) == trainer.samples(**options)
    assert isinstance(trainer.trained, DiffusionBlocks)


def test_the_product_is_scored_as_any_other_model(story):
    trainer = begin(story)
    text = Text(trainer.corpus.evaluated.tokens[:20], 20)
    torch.nn.init.normal_(trainer.network.log_logit_scale)
    generator = torch.Generator().manual_seed(NOISE_SEED)
    nats = product_nll(trainer.model, text.tokens[None], generator=generator).mean().item()
    found = bits_per_character(trainer.model, text, 20, product=True)
    assert found == pytest.approx(nats / math.log(2))


def test_continuations_are_of_the_text():
    text = Text(torch.arange(500), 500)
    prompts, truth = continuations(text, 40)
    assert prompts.shape == (SAMPLES, PROMPT)
    joined = torch.cat([prompts, truth], dim=1)
    assert torch.equal(joined - joined[:, :1], torch.arange(40).expand(SAMPLES, 40))
    assert joined[-1, -1] == 499


def test_a_tokenizer_that_cannot_be_read_is_a_clear_error(story, tmp_path):
    with pytest.raises(ValueError, match="tokenizer must be a readable JSON file"):
        begin(story, tokenizer=str(tmp_path / "none.json"))


def test_a_tokenizer_file_is_used(story, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(Characters("0123456789").to_json())
    trainer = begin(story, tokenizer=str(path))
    assert trainer.network.config.vocab_size == 11
    assert trainer.batches.texts()["tokenizer.json"] == Characters("0123456789").to_json()


@pytest.mark.parametrize("context", [16, 2])
def test_a_context_must_leave_room_for_samples(context):
    with pytest.raises(ValueError, match=f"more than the 16 tokens .* got {context}"):
        CausalLMRun(context=context)


def test_a_text_must_hold_a_window(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("0123456789" * 10)
    with pytest.raises(ValueError, match="held-out text must have at least 20 tokens, one window"):
        CausalLMRun(steps=1, data=str(path), **SIZES).trainer()
