import math

import pytest
import torch

from dblocks.models import RecurrentLM
from dblocks.recipes import recurrent
from dblocks.recipes.data.text import load_corpus
from dblocks.recipes.records import train
from dblocks.recipes.recurrent import GPU, RecurrentRun

SIZES = {"width": 16, "depth": 2, "heads": 2, "context": 20, "batch_size": 4}
SIZES |= {"prelude": 1, "coda": 1, "mean_recurrence": 3, "backprop_depth": 2}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("".join(f"{i} is followed by {i + 1}. " for i in range(60)))
    return str(path)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(recurrent, "STEPS", (1, 2))
    monkeypatch.setattr(recurrent, "SAMPLE_STEPS", 2)


def run_of(story, **fields):
    return RecurrentRun(**{"steps": 2, "points": 1, "data": story, **SIZES, **fields})


def test_run_round_trips():
    for run in (RecurrentRun(lr=3e-4, kv_heads=1), GPU):
        assert RecurrentRun.from_json(run.to_json()) == run


def test_the_larger_recipe_is_a_model_of_its_own():
    config = GPU.model_config(50_257)
    assert (config.prelude, config.core, config.coda, config.width) == (2, 4, 2, 1024)
    assert GPU.bf16
    assert GPU.device == "cuda"


def test_only_the_denoiser_is_conditioned(story):
    assert run_of(story).trainer().network.noise_embedding is not None
    assert run_of(story, end_to_end=True).trainer().network.noise_embedding is None


@pytest.mark.parametrize("end_to_end", [False, True])
def test_runs_of_one_seed_are_bitwise_equal(story, end_to_end):
    def losses(seed):
        trainer = run_of(story, seed=seed, end_to_end=end_to_end).trainer()
        return [trainer.step(step) for step in range(3)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_autocast_computes_in_bfloat16(story, end_to_end):
    trainer = run_of(story, bf16=True, end_to_end=end_to_end).trainer()
    dtypes = set()
    trainer.network.layers[0].mlp.register_forward_hook(lambda *a: dtypes.add(a[-1].dtype))
    assert math.isfinite(sum(trainer.step(step)[1] for step in range(3)))
    assert dtypes == {torch.bfloat16}


def test_the_record_of_a_block(story):
    record = train(run_of(story)).record
    assert record["layers_per_step"] == 1 + 2 + 1  # each layer once
    assert record["samples_written"].keys() == {"1", "2"}
    assert record["bits_by_steps"].keys() == {"1"}
    assert record["bound"]["bits"] > record["bound"]["by_block"][0] > 0
    assert record["parameters"] == sum(
        p.numel() for p in run_of(story).trainer().network.parameters()
    )
    assert record["windows"] == recurrent.STEPS_WINDOWS
    assert record["sha256"] == load_corpus(story).sha256
    assert all(bits > 0 for bits in (record["bits"], *record["bits_by_steps"].values()))
    assert {len(text) for many in record["samples_written"].values() for text in many} == {4}


def test_the_published_form_is_one_option_away(story):
    run = run_of(story, part="selection", **recurrent.RECIPE.published)
    assert (run.rows, run.head, run.top_share, run.conditioning) == ("doubled", "learned", 0, "dit")
    # Prelude on clean rows; two core layers on both halves; the coda's layer on noisy rows alone.
    assert train(run).record["layers_per_step"] == 1 + 2 * 2 + 1


def test_the_record_of_the_plain_model_counts_all_recurrences(story):
    run, drawn = run_of(story, end_to_end=True, steps=4), []
    trainer = run.trainer()
    draw = trainer.network.draw_recurrences
    generator = trainer.generator
    for _ in range(4):
        drawn.append(draw(generator))
        torch.randint(2**63 - 1, (), generator=generator)  # the seed of the state
    record = train(run).record
    assert record["layer_evaluations"] == sum(1 + 2 * r + 1 for r in drawn)
    assert record["samples_written"].keys() == record["bits_by_steps"].keys() == {"1", "2", "3"}
    assert record["bound"] is None
    assert not record["adaln"]


@pytest.mark.parametrize("recurrences", [1, 9])
def test_the_memory_of_the_plain_model_is_that_of_its_mean_recurrences(
    story, monkeypatch, recurrences
):
    run = run_of(story, end_to_end=True, part="selection")
    expected = train(run).record["activations_mib"]
    monkeypatch.setattr(RecurrentLM, "draw_recurrences", lambda *_: recurrences)
    found = train(run).record
    assert found["layers_per_step"] == 1 + 2 * recurrences + 1
    assert found["activations_mib"] == expected


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("blocks", [2, 3, 6])
def test_no_number_of_steps_that_is_measured_skips_a_block(story, monkeypatch, blocks):
    monkeypatch.setattr(recurrent, "STEPS", (1, 2, 4))
    record = train(run_of(story, blocks=blocks, depth=6)).record
    counts = {2: {"1", "2", "4"}, 3: {"1", "3", "4"}, 6: {"1", "6"}}[blocks]
    assert record["samples_written"].keys() == counts


def test_a_run_that_chooses_a_learning_rate_measures_no_more_than_that_needs(story):
    record = train(run_of(story, part="selection")).record
    assert record["bits"] > 0
    assert not {"bits_by_steps", "samples_written"} & record.keys()


def test_measuring_repeats(story):
    trainer = run_of(story).trainer()
    assert trainer.bits(windows=4) == trainer.bits(windows=4)
    with pytest.raises(ValueError, match="num_steps must be 1 or None in blocks"):
        trainer.bits(num_steps=3)
    assert trainer.samples(num_steps=3) == trainer.samples(num_steps=3)
