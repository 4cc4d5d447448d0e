"""Which file calls which in a training step: calls go one way."""

import pytest
import torch
from call_tools import calls_of, circles
from convert_tools import batch_of, blocks_of, model_of

from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from tools import batch, seeded, vit

INTEGRATIONS = "integrations/"
APART = ("ops/", "kernels/")  # where an op's own gradients are called back


def steps(calls):
    """What is left of calls without those of the ops."""
    return {
        pair for pair in calls if not any(file is None or file.startswith(APART) for file in pair)
    }


def test_a_training_step_calls_downwards():
    model = DiffusionBlocks(vit(), BlocksConfig(3))
    optimizers = make_optimizers(model, torch.optim.SGD)
    train_step(model, batch(), optimizers, block=0)  # checks of numbers take place once
    every = calls_of(lambda: train_step(model, batch(), optimizers, block=1, generator=seeded()))
    calls = steps(every)
    files = {file for pair in calls for file in pair}
    assert len(files) <= 10
    assert {"blocks/training.py", "blocks/denoiser.py", "models/vit.py", "nn/layer.py"} <= files
    assert not circles(calls)
    assert not circles(every)
    assert "blocks/network.py" not in files  # it divides a network; a step is the denoiser's


@pytest.mark.parametrize("shared", ["train", "private"])
def test_a_step_of_a_converted_model_calls_downwards(shared):
    model = blocks_of("llama", config={"shared": shared}, clean_loss_weight=0.5)
    optimizers = make_optimizers(model, torch.optim.SGD)
    text = batch_of("llama")
    train_step(model, text, optimizers, block=0)  # checks of numbers take place once
    every = calls_of(lambda: train_step(model, text, optimizers, block=1, generator=seeded()))
    calls = steps(every)
    files = {file for pair in calls for file in pair}
    assert {"blocks/denoiser.py", "integrations/convert/clean_loss.py"} <= files
    assert not circles(calls)
    assert not circles(every)


@pytest.mark.parametrize("kind", ["llama", "bert", "vit", "dit"])
def test_convert_calls_downwards(kind):
    """But for choices.py: PyTorch calls it in each operation, and it runs what it is given."""
    model = model_of(kind)
    calls = {
        (caller, called)
        for caller, called in calls_of(lambda: blocks_of(kind, model=model))
        if caller is not None and caller.startswith(INTEGRATIONS) and "choices.py" not in called
    }
    assert ("integrations/convert/apply.py", "integrations/convert/tasks.py") in calls
    assert not circles(calls)
