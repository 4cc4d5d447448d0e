import math

import pytest
import torch

from dblocks.recipes.columns import SAMPLES
from dblocks.recipes.data.text import load_corpus
from dblocks.recipes.masked_lm import GPU, MaskedLMRun
from dblocks.recipes.records import train
from dblocks.recipes.text_run import PROMPT
from dblocks.schedules import MaskSchedule

SIZES = {"width": 16, "depth": 3, "heads": 2, "context": 20, "batch_size": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("".join(f"{i} is followed by {i + 1}. " for i in range(60)))
    return str(path)


def run_of(story, **fields):
    return MaskedLMRun(**{"steps": 2, "points": 1, "data": story, **SIZES, **fields})


def test_run_round_trips():
    for run in (MaskedLMRun(lr=3e-4, schedule="cosine", draw="t"), GPU):
        assert MaskedLMRun.from_json(run.to_json()) == run


def test_the_larger_recipe_is_a_model_of_its_own():
    config = GPU.model_config(50_257)
    assert (config.width, config.heads, config.context) == (768, 12, 1024)
    assert GPU.bf16
    assert GPU.device == "cuda"


def test_end_to_end_is_one_block_of_the_same_network(story):
    blocks, whole = (run_of(story, end_to_end=e).trainer() for e in (False, True))
    assert whole.model.config.num_blocks == 1
    assert whole.model.layer_ranges == ((0, 3),)
    assert blocks.model.layer_ranges == ((0, 1), (1, 2), (2, 3))
    assert blocks.network.config == whole.network.config
    assert isinstance(whole.model.config.schedule, MaskSchedule)
    first, second = (trainer.network.state_dict() for trainer in (blocks, whole))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("end_to_end", [False, True])
def test_runs_of_one_seed_are_bitwise_equal(story, end_to_end):
    def losses(seed):
        trainer = run_of(story, seed=seed, end_to_end=end_to_end).trainer()
        return [trainer.step(step) for step in range(2)]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_autocast_computes_in_bfloat16(story):
    trainer, dtypes = run_of(story, bf16=True).trainer(), set()
    trainer.network.layers[0].mlp.register_forward_hook(lambda *a: dtypes.add(a[-1].dtype))
    assert math.isfinite(sum(trainer.step(step)[1] for step in range(6)))
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("end_to_end", [False, True])
def test_the_record_tells_the_bound_and_what_sampling_ran(story, end_to_end):
    record = train(run_of(story, steps=4, points=2, end_to_end=end_to_end)).record
    layers, blocks = (3, 1) if end_to_end else (1, 3)
    assert record["layers_per_step"] == layers
    assert record["layer_evaluations"] == 4 * layers
    assert record["samples"] == 16
    assert 0 < record["bits_error"] < record["bits"]
    shares, bits = zip(*record["bits_by_share"], strict=True)
    assert len(shares) == 12
    assert sum(bits) / 12 == pytest.approx(record["bits"])
    assert len(record["calls"]) == len(record["rows"]) == blocks
    assert sum(record["rows"]) <= SAMPLES * (20 - PROMPT)  # at most one for each written token
    (texts,) = record["samples_written"].values()
    assert {len(text) for text in texts} == {20 - PROMPT}
    assert record["sha256"] == load_corpus(story).sha256
    assert [point["step"] for point in record["curve"]] == [2, 4]
    assert all(point["bits"] > 0 for point in record["curve"])


def test_points_divide_among_any_number_of_blocks(story):
    trainer = run_of(story, blocks=5, depth=5).trainer()
    assert len(trainer.bits(windows=2).by_ratio) == 15


def test_measures_repeat(story):
    trainer = run_of(story).trainer()
    torch.nn.init.normal_(trainer.network.embedding.weight)
    assert trainer.bits() == trainer.bits()
    assert trainer.results({}) == trainer.results({})
