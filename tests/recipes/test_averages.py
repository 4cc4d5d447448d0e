"""`--ema`: the average of the weights against its formula, and wherever blocks are trained."""

import dataclasses
import json
import shutil

import pytest
import torch
from process_tools import in_processes

from dblocks.__main__ import main
from dblocks.checkpoint import load_safetensors
from dblocks.recipes.averages import exchange, keep_average
from dblocks.recipes.vit import ViTRun

pytestmark = pytest.mark.usefixtures("one_thread")
VIT = ("train", "vit", "--steps", "12", "--batch-size", "8", "--width", "12", "--depth", "2")
VIT += ("--heads", "2", "--points", "2", "--blocks", "2")
EMA = ("--ema", "0.6")


def train(out, *flags):
    assert main([*VIT, "--out", str(out), *flags]) == 0
    return (out / "model.safetensors").read_bytes()


def curve(out):
    return json.loads((out / "run.json").read_text())["curve"]


def test_the_average_of_each_step_and_back():
    generator = torch.Generator().manual_seed(0)
    p, unused = (torch.nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(2))
    optimizer = torch.optim.AdamW([p, unused], lr=0.1, fused=True)
    keep_average(optimizer, 0.4)
    expected = None
    for n in range(6):
        p.grad = torch.randn(3, 2, generator=generator)
        optimizer.step()
        rate = min(0.4, (1 + n) / (10 + n))  # .1, 2/11, .25, 4/13, 5/14, .4
        now = p.detach().double()
        expected = now if expected is None else rate * expected + (1 - rate) * now
    weights, other = p.detach().clone(), unused.detach().clone()
    exchange(None, [optimizer])
    torch.testing.assert_close(p.detach(), expected.float(), rtol=1e-6, atol=1e-7)
    assert torch.equal(unused, other)
    exchange(None, [optimizer])
    assert torch.equal(p, weights)


def test_training_is_as_without_and_what_is_saved_is_the_average(tmp_path):
    plain = train(tmp_path / "plain", "--checkpoint-every", "12")
    assert train(tmp_path / "ema", *EMA, "--checkpoint-every", "12") != plain
    losses = [[p["block_loss"] for p in curve(tmp_path / name)] for name in ("plain", "ema")]
    assert losses[0] == losses[1]
    kept = [tmp_path / n / "checkpoints/step-00000012/model.safetensors" for n in ("plain", "ema")]
    assert kept[0].read_bytes() == kept[1].read_bytes()
    # Without memory the average is the weights.
    assert train(tmp_path / "none", "--ema", "0") == plain
    assert curve(tmp_path / "none") == curve(tmp_path / "plain")


def test_the_same_bits_with_residency_and_after_an_interruption(tmp_path):
    once = train(tmp_path / "once", *EMA, "--checkpoint-every", "6")
    resident = ("--resident", "--prefetch", "all", "--checkpoint-every", "6")
    assert train(tmp_path / "resident", *EMA, *resident) == once
    assert curve(tmp_path / "resident") == curve(tmp_path / "once")
    for name, flags in (("once", ()), ("resident", resident)):
        again = tmp_path / f"{name}-again"
        shutil.copytree(tmp_path / name, again)
        shutil.rmtree(again / "checkpoints/step-00000012")
        assert train(again, *EMA, *flags, "--resume") == once
        assert curve(again) == curve(tmp_path / "once")


def test_jobs_of_a_block_each_make_the_network_of_one_run(tmp_path):
    whole = train(tmp_path / "whole", *EMA, "--shared", "private")
    for block in ("0", "1"):
        assert main([*VIT, *EMA, "--block", block, "--out", str(tmp_path / "jobs")]) == 0
    assert main(["merge", str(tmp_path / "merged"), str(tmp_path / "jobs")]) == 0
    assert (tmp_path / "merged/model.safetensors").read_bytes() == whole


def test_averages_of_what_blocks_share_are_averaged_too(tmp_path):
    train(tmp_path, *EMA, "--shared", "reduce", "--reduce-every", "5")
    held = load_safetensors(tmp_path / "model.safetensors")
    copied = [name for name in held if name.startswith("copies.0.")]
    assert len(copied) > 5
    for name in copied:
        assert torch.equal(held[name], held[name.removeprefix("copies.0.")]), name


def test_averages_do_not_change_what_is_trained_where_blocks_took_no_step_yet():
    sizes = {"batch_size": 8, "width": 12, "depth": 4, "heads": 2, "blocks": 4}
    run = ViTRun(steps=8, shared="reduce", reduce_every=1, ema=0.6, **sizes)
    plain, averaged = dataclasses.replace(run, ema=None).trainer(), run.trainer()
    for step in range(4):
        assert averaged.step(step) == plain.step(step)
        weights = averaged.trained.state_dict()
        for name, wanted in plain.trained.state_dict().items():
            assert torch.equal(weights[name], wanted), (step, name)


def test_end_to_end(tmp_path):
    plain = train(tmp_path / "plain", "--end-to-end")
    assert train(tmp_path / "ema", "--end-to-end", *EMA) != plain
    assert [p["block_loss"] for p in curve(tmp_path / "ema")] == [
        p["block_loss"] for p in curve(tmp_path / "plain")
    ]


def test_the_cosine_ends_where_it_is_told_and_records_say_what_is_new():
    run = ViTRun(steps=100, warmup=0.1, lr=1e-3, lr_end=1e-4, ema=0.999)
    assert [run.lr_at(s) for s in (9, 55, 100)] == pytest.approx([1e-3, 5.5e-4, 1e-4])
    assert ViTRun.from_dict(run.to_dict()) == run
    assert not {"ema", "lr_end"} & ViTRun().to_dict().keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ema": 1.0}, "ema must be at least 0 and less than 1, got 1.0"),
        ({"ema": -0.1}, "ema must be at least 0"),
        ({"lr_end": 2e-3}, "lr_end must be between 0 and lr 0.001, got 0.002"),
    ],
)
def test_values_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ViTRun(**options)


@pytest.mark.long
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_that_share_a_block(tmp_path, sharding):
    one = ("--blocks", "1", "--shared", "private", *EMA, "--crop", "pad", "--flip")
    one += ("--rand-augment",)  # of the whole batch, of which each process takes its part
    train(tmp_path / "one", *one)
    command = [*VIT, *one, "--sharding", sharding, "--checkpoint-every", "6"]
    command += ["--out", str(tmp_path / "out")]
    codes, written = in_processes(2, ["-m", "dblocks", *command], tmp_path)
    assert codes == [0, 0], "\n".join(written)
    found, wanted = (load_safetensors(tmp_path / f / "model.safetensors") for f in ("out", "one"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)
