"""Residency on the counting device: run by a test in a process of its own, prints JSON."""

import gc
import json
import sys
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from counting_device import NAME, counting
from stream_trace import traced

from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.blocks.memory import SavedActivations
from dblocks.models import CausalLM, CausalLMConfig
from dblocks.scale import resident
from dblocks.scale.transfers import Transfers
from tools import seeded

BLOCKS, STEPS = 3, 2
OPTIMIZERS = {
    "default": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "capturable": lambda p: torch.optim.AdamW(p, lr=1e-3, capturable=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def make(kind, width=32):
    torch.manual_seed(0)
    config = CausalLMConfig(vocab_size=64, width=width, depth=6, heads=4, gate_init=1.0)
    model = DiffusionBlocks(CausalLM(config), BlocksConfig(BLOCKS, shared="frozen"))
    return model, make_optimizers(model, OPTIMIZERS[kind])


def batch():
    return {"tokens": torch.randint(64, (2, 16), generator=seeded(1)).to(NAME)}


def trained(kind, steps=16, width=32, order=None, **options):
    """The order of blocks, the losses, the weights and state, and the peak of the later half."""
    gc.collect()
    before = counting.bytes()
    model, optimizers = make(kind, width)
    residency = None
    if order is None:
        residency = resident(model, optimizers, NAME, steps_per_visit=STEPS, **options)
    else:
        # Of a device of another kind this makes new parameters.
        optimizers = make_optimizers(model.to(NAME), OPTIMIZERS[kind])
    generator, given, losses, blocks, peak = seeded(3), batch(), [], [], 0
    for i in range(steps):
        if order is not None:
            torch.randint(BLOCKS, (), generator=generator)  # as the draw of a block
        counting.reset_peak()
        block = None if order is None else order[i]
        result = train_step(model, given, optimizers, block=block, generator=generator)
        peak = max(peak, counting.peak())
        blocks.append(result.block)
        losses.append(result.loss)
    if residency is not None:
        residency.release()
    tensors = [t.cpu() for t in model.state_dict().values()]
    tensors += [
        value.cpu()
        for o in optimizers
        for values in o.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    ]
    return blocks, [x.item() for x in losses], tensors, peak - before


def same(one, other):
    pairs = zip(one[2], other[2], strict=True)
    return one[1] == other[1] and all(torch.equal(a, b) for a, b in pairs)


def bits():
    """Whether the results are those without residency."""
    found = {}
    for kind in OPTIMIZERS:
        given = trained(kind, prefetch="all")
        plain = trained(kind, order=given[0])
        found[kind] = same(given, plain)
        if kind == "default":
            for options in (
                {"prefetch": "none"},
                {"prefetch": "parameters"},
                {"prefetch": "all", "host": "file"},
            ):
                found[" ".join(options.values())] = same(trained(kind, **options), plain)
    return found


def bounds():
    """Peaks, and what they may be: P, A, S and X in bytes."""
    model, _ = make("default", 64)
    P = max(sum(p.nbytes for p in model.block_parameters(b)) for b in range(BLOCKS))
    model.to(NAME)
    S = sum(p.nbytes for p in model.shared_parameters()) + sum(b.nbytes for b in model.buffers())
    given = batch()
    with SavedActivations(model.parameters()) as saved:
        kept = model.loss(given, 0, generator=seeded(0)).loss
    A = saved.bytes
    del model, kept, saved
    found = {"P": P, "S": S, "A": A}
    for kind, X in (("fused", 0), ("default", P)):
        for prefetch, more in (("none", 0), ("parameters", P), ("all", 3 * P)):
            peak = trained(kind, width=64, prefetch=prefetch)[3]
            found[f"{kind} {prefetch}"] = (peak, max(4 * P + A, 4 * P + X) + S + more)
    return found


@contextmanager
def without(method):
    with patch.object(Transfers, method, lambda self, *mark: None):
        yield


def faults():
    """What a missing wait does: whether losses are NaN."""
    order = trained("default", prefetch="all")[0]
    plain = trained("default", order=order)
    found = {"all waits": same(trained("default", prefetch="all"), plain)}
    with without("compute_waits"):
        result = trained("default", prefetch="all")
    found["no wait for a block"] = any(x != x for x in result[1])
    return found


@contextmanager
def late_waits():
    """Copies back wait for the computation only when they are under way."""
    wait, mark = Transfers.wait_for_compute, Transfers.mark

    def marked(self):
        wait(self)
        return mark(self)

    with without("wait_for_compute"), patch.object(Transfers, "mark", marked):
        yield


FAULTS = {
    "all waits": nullcontext,
    "no wait before a copy back": lambda: without("wait_for_compute"),
    "a wait after a copy back": late_waits,
    "no wait for a block": lambda: without("compute_waits"),
}


def order():
    """What the recorded order of accesses and waits says, of each fault."""
    found = {}
    for name, fault in FAULTS.items():
        for prefetch in ("none", "all"):
            with traced(NAME) as trace, fault():
                trained("default", steps=8, prefetch=prefetch)
            sides = sorted({stream for stream, _ in trace.conflicts})
            found[f"{name}, {prefetch}"] = sides if trace.copies else None
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({name: globals()[name]() for name in sys.argv[1:]}))
