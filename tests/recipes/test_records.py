import dataclasses
import json

import pytest
import torch

from dblocks.blocks import DiffusionBlocks
from dblocks.models import ViT
from dblocks.recipes.costs import memory
from dblocks.recipes.data.digits import digits
from dblocks.recipes.records import read_record, train, train_to_record, write_record
from dblocks.recipes.vit import ViTRun, ViTTrainer

TINY = ViTRun(steps=12, points=3, width=12, depth=3, heads=2, patch_size=4, batch_size=16)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def blocks():
    return train(TINY)


@pytest.fixture(scope="module")
def whole():
    return train(dataclasses.replace(TINY, end_to_end=True))


def test_layer_evaluations_are_counted(blocks, whole):
    assert blocks.record["layer_evaluations"] == 12  # one layer a step
    assert whole.record["layer_evaluations"] == 36
    assert (blocks.record["layers_per_step"], whole.record["layers_per_step"]) == (1, 3)
    assert blocks.record["samples"] == whole.record["samples"] == 192


def test_a_block_step_holds_less(blocks, whole):
    for cost in ("activations_mib", "state_mib"):
        assert 0 < blocks.record[cost] < whole.record[cost]


def test_state_is_parameters_gradients_and_both_moments(whole):
    # All but the label table, which the plain network does not use, and one step count each.
    used = [p for n, p in whole.trainer.network.named_parameters() if not n.startswith("target")]
    least = 4 * sum(p.nbytes for p in used) / 2**20
    assert least < whole.record["state_mib"] < 1.05 * least + 0.01


class FrozenInput(ViTTrainer):
    """The patch embedding and the positions are not trained."""

    def _made(self, make):
        def frozen():
            network = make()
            network.patches.requires_grad_(False)
            network.positions.requires_grad_(False)
            return network

        return super()._made(frozen)


@pytest.mark.parametrize("end_to_end", [True, False])
def test_frozen_parameters_count_once_in_the_state(end_to_end):
    run = dataclasses.replace(TINY, end_to_end=end_to_end)
    trainer = FrozenInput(run, *digits())
    for step in range(12):
        trainer.step(step)
    block = 0
    trainer.loss(trainer.batch(0), block).backward()
    other = [p for layer in trainer.network.layers[1:] for p in layer.parameters()]
    others = set() if end_to_end else {id(p) for p in other}
    expected = 0
    for p in trainer.network.parameters():
        if id(p) not in others:  # those of other blocks are not held
            # Also a gradient, two moments, and the count of steps in 4 bytes.
            expected += p.nbytes if p.grad is None else 4 * p.nbytes + 4
    trainer.network.zero_grad(set_to_none=True)
    assert memory(trainer)["state_mib"] * 2**20 == expected


class FrozenLayers(ViTTrainer):
    """One layer of each block is not trained."""

    def _made(self, make):
        network, model = super()._made(make)
        for layer in network.layers[::2]:
            layer.requires_grad_(False)
        return network, model


@pytest.mark.parametrize("shared", ["train", "private"])
def test_frozen_layers_of_other_blocks_are_not_held(shared):
    trainer = FrozenLayers(dataclasses.replace(TINY, depth=6, shared=shared), *digits())
    for step in range(12):
        trainer.step(step)
    layers, found = trainer.network.layers, []
    for block, (first, last) in enumerate(trainer.model.layer_ranges):
        mine = [p for layer in layers[first:last] for p in layer.parameters()]
        assert {p.requires_grad for p in mine} == {False, True}
        # What a worker of this block alone would hold.
        view = trainer.model.block(block)
        trained = [p for p in view.parameters() if p.requires_grad]
        frozen = [p for p in view.parameters() if not p.requires_grad]
        trainer.loss(trainer.batch(0), block).backward()
        found.append(
            sum(p.nbytes for p in frozen)
            + sum(3 * p.nbytes + 4 + (0 if p.grad is None else p.nbytes) for p in trained)
        )
        trainer.network.zero_grad(set_to_none=True)
    assert memory(trainer)["state_mib"] * 2**20 == max(found)


def test_curve_ends_in_the_accuracy(blocks, whole):
    for trained in (blocks, whole):
        curve = trained.record["curve"]
        assert [point["step"] for point in curve] == [4, 8, 12]
        assert curve[-1]["accuracy"] == trained.record["accuracy"]
    point = blocks.record["curve"][-1]
    assert len(point["blocks_alone"]) == len(point["block_loss"]) == 3
    assert point["blocks_alone"] == blocks.record["blocks_alone"]


def test_record_says_what_was_run_and_where(blocks, whole):
    for trained in (blocks, whole):
        record = json.loads(json.dumps(trained.record))
        assert record["environment"]["torch"] == torch.__version__
        assert record["environment"]["threads"] == torch.get_num_threads()
        assert record["seconds"] > 0
    assert ViTRun.from_dict(blocks.record["run"]) == TINY
    for key in ("accuracy_by_denoising_steps", "accuracy_from_noise"):
        assert set(blocks.record[key]) == {"1", "2", "3", "4", "6", "12"}
        assert whole.record[key] is None
    assert (blocks.record["adaln"], whole.record["adaln"]) == (True, False)
    assert isinstance(whole.trainer.network, ViT)
    assert whole.trainer.model is None


def test_nothing_counts_on_the_network_that_is_returned(blocks):
    assert not any(module._forward_hooks for module in blocks.trainer.model.modules())


def test_record_is_written_whole(tmp_path):
    path = tmp_path / "new" / "a.json"
    record = train_to_record(dataclasses.replace(TINY, steps=1, points=1), path)
    assert read_record(path) == json.loads(json.dumps(record))
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"format": 99}'])
def test_a_broken_record_is_a_clear_error(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json .*delete it to repeat the run"):
        read_record(path)


def test_write_replaces(tmp_path):
    path = tmp_path / "a.json"
    for value in (1, 2):
        write_record(path, {"format": 1, "value": value})
    assert read_record(path)["value"] == 2


def test_a_network_is_saved_before_its_results_are_measured(monkeypatch):
    kept = []

    def fail(self, last):
        raise RuntimeError("no results")

    monkeypatch.setattr(ViTTrainer, "results", fail)
    with pytest.raises(RuntimeError, match="no results"):
        train(TINY, save=lambda trainer: kept.append(trainer.trained))
    assert [type(network) for network in kept] == [DiffusionBlocks]
