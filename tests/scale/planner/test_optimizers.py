"""What is planned for each optimizer, beside its own bytes and what PyTorch's tracker counts."""

import json

import pytest
import torch

from dblocks.__main__ import main
from dblocks.blocks import DiffusionBlocks, make_optimizers
from dblocks.models import CausalLM, CausalLMConfig
from dblocks.scale.planner.costs import Costs
from dblocks.scale.planner.optimizers import USES, use
from dblocks.scale.planner.subject import block_loss, of_network

CONFIG = CausalLMConfig(vocab_size=64, context=64, width=64, depth=2, heads=2)
FACTORIES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3, foreach=False),
    "muon": lambda p: [
        torch.optim.Muon([q for q in p if q.ndim == 2], lr=1e-3),
        torch.optim.AdamW([q for q in p if q.ndim != 2], lr=1e-3, fused=True),
    ],
}


def stepped(parameters, name):
    """The optimizers after a step on gradients of ones."""
    made = FACTORIES[name](parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizers = made if isinstance(made, list) else [made]
    for optimizer in optimizers:
        optimizer.step()
    return optimizers


def test_every_optimizer_is_here():
    assert set(FACTORIES) == set(USES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", USES)
def test_states_are_as_large_as_those_of_the_optimizer(name, dtype):
    shapes = (3,), (5, 7), (7, 5), (2, 3, 4), (1, 9)
    if dtype == torch.bfloat16 and name == "adamw":
        shapes = shapes[1:]
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    states = [s for o in stepped(parameters, name) for s in o.state.values()]
    counted = sum(x.nbytes for s in states for x in s.values() if isinstance(x, torch.Tensor))
    assert use(parameters, name).state == counted
    weights = sum(p.nbytes for p in parameters)
    assert use(parameters, name, average=True).state == counted + weights
    assert use(parameters, name, average=True).temporaries == use(parameters, name).temporaries


def tracked_peak(dm, batch, name):
    """The peak of a step by PyTorch's MemTracker, after one that makes the state."""
    from torch.distributed._tools.mem_tracker import MemTracker

    optimizers = make_optimizers(dm, FACTORIES[name])
    moved = optimizers.of_block(0)

    def step():
        block_loss(dm, batch).backward()
        for optimizer in moved:
            optimizer.step()
        dm.zero_grad(set_to_none=True)

    step()
    tracker = MemTracker()
    tracker.track_external(dm, *moved)
    with tracker:
        step()
    (found,) = tracker.get_tracker_snapshot("peak").values()
    inputs = sum(x.nbytes for x in batch.values())
    return found["Total"] - inputs


@pytest.mark.parametrize(
    ("name", "length", "moment"),
    [
        ("adamw", 64, "end of the forward"),
        ("sgd", 64, "end of the forward"),
        ("adamw-foreach", 2, "optimizer"),
        ("adafactor", 2, "optimizer"),
        ("muon", 2, "optimizer"),
    ],
)
def test_peaks_are_close_to_those_of_the_memory_tracker(name, length, moment):
    """It sees the temporaries of single operations too, which are not planned."""
    pytest.importorskip("torch.distributed._tools.mem_tracker")
    subject = of_network(CONFIG, length=length)
    torch.manual_seed(0)
    dm = DiffusionBlocks(CausalLM(CONFIG), subject.config(1, "train"))
    planned = Costs(subject, 1, optimizer=name).block(0, 2).peak
    counted = tracked_peak(dm, subject.batch(1), name)
    print(planned, counted / planned.bytes)
    assert planned.moment == moment
    assert 0.95 <= counted / planned.bytes <= 1.07


def test_the_plan_has_the_bytes_of_an_average(tmp_path, capsys):
    sizes = ("plan", "vit", "--memory", "1GiB", "--width", "16", "--heads", "2", "--depth", "2")
    found = []
    for flags in ((), ("--ema", "0.99")):
        path = tmp_path / f"{len(found)}.json"
        assert main([*sizes, *flags, "--json", str(path)]) == 0
        found.append(json.loads(path.read_text()))
    assert [plan["average"] for plan in found] == [False, True]
    for without, kept in zip(found[0]["ways"], found[1]["ways"], strict=True):
        trained = without["gradients"]
        assert kept["optimizer"] == without["optimizer"] + trained
        assert kept["peak"] >= without["peak"] + trained
    assert main([*sizes, "--ema", "1"]) == 2
    assert "--ema must be at least 0 and less than 1" in capsys.readouterr().err
