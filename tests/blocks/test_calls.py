"""Which file calls which in a training step: calls go one way."""

import sys
from pathlib import Path

import pytest
import torch
from convert_tools import batch_of, blocks_of

import dblocks
from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from tools import batch, seeded, vit

PACKAGE = Path(dblocks.__file__).resolve().parent
APART = ("ops/", "kernels/")  # where an op's own gradients are called back


def file_of(frame):
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else None


def calls_of(function):
    """Pairs of files of the package, of which the first one calls the second."""
    calls = set()

    def seen(frame, event, _):
        called = file_of(frame) if event == "call" else None
        caller = frame.f_back
        while called and caller and not file_of(caller):
            caller = caller.f_back
        if called and caller and file_of(caller) != called:
            calls.add((file_of(caller), called))

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(before)
    return {pair for pair in calls if not any(file.startswith(APART) for file in pair)}


def reached(calls, file):
    """All files that are called from one, at any distance."""
    found, todo = set(), [file]
    while todo:
        here = todo.pop()
        new = {called for caller, called in calls if caller == here} - found
        found |= new
        todo += new
    return found


def test_a_training_step_calls_downwards():
    model = DiffusionBlocks(vit(), BlocksConfig(3))
    optimizers = make_optimizers(model, torch.optim.SGD)
    train_step(model, batch(), optimizers, block=0)  # checks of numbers take place once
    calls = calls_of(lambda: train_step(model, batch(), optimizers, block=1, generator=seeded()))
    files = {file for pair in calls for file in pair}
    assert len(files) <= 10
    assert {"blocks/training.py", "blocks/denoiser.py", "models/vit.py", "nn/layer.py"} <= files
    assert not {file for file in files if file in reached(calls, file)}
    assert "blocks/network.py" not in files  # it divides a network; a step is the denoiser's


@pytest.mark.parametrize("shared", ["train", "private"])
def test_a_step_of_a_converted_model_calls_downwards(shared):
    model = blocks_of("llama", config={"shared": shared}, clean_loss_weight=0.5)
    optimizers = make_optimizers(model, torch.optim.SGD)
    text = batch_of("llama")
    calls = calls_of(lambda: train_step(model, text, optimizers, block=1, generator=seeded()))
    files = {file for pair in calls for file in pair}
    assert {"blocks/denoiser.py", "integrations/convert/clean_loss.py"} <= files
    assert not {file for file in files if file in reached(calls, file)}


def test_a_circle_would_be_found():
    assert "a" in reached({("a", "b"), ("b", "c"), ("c", "a")}, "a")
