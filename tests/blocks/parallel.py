"""Steps of a DistributedDataParallel in two processes, against one process; run by a test."""

import copy
import dataclasses
import sys

import pytest
import torch
import torch.distributed as dist
from sharded import cases
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dblocks import functional as F
from dblocks.blocks import make_optimizers, train_step
from dblocks.integrations.convert import convert
from tools import seeded


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def part(batch, rank):
    return {name: values[2 * rank : 2 * rank + 2] for name, values in batch.items()}


def parameters_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def check_steps(blocks, batch, rank):
    alone, parallel = blocks, copy.deepcopy(blocks)
    parallel = DistributedDataParallel(parallel, find_unused_parameters=True)
    one, two = make_optimizers(alone, sgd), make_optimizers(parallel, sgd)
    for step, block in enumerate((0, 1, 0)):
        before = parameters_of(parallel.module)
        mine = part(batch, rank)
        found = train_step(parallel, mine, two, block=block, generator=seeded(step)).loss
        wanted = train_step(alone, batch, one, block=block, generator=seeded(step)).loss
        dist.all_reduce(found)
        torch.testing.assert_close(found / 2, wanted)
        after = parameters_of(parallel.module)
        for name, wanted in parameters_of(alone).items():
            torch.testing.assert_close(after[name], wanted, rtol=1e-4, atol=1e-5)
        others = parallel.module.block_parameters(1 - block)
        others = {id(p) for p in others}
        for name, p in parallel.module.named_parameters():
            assert id(p) not in others or torch.equal(before[name], p), name
    drawn = [train_step(parallel, part(batch, rank), two, generator=seeded(rank)).block
             for _ in range(4)]  # fmt: skip
    both = [None, None]
    dist.all_gather_object(both, drawn)
    assert both[0] == both[1]


def check_refusals(blocks, batch, rank):
    parallel = DistributedDataParallel(copy.deepcopy(blocks), find_unused_parameters=True)
    uneven = {name: values[: 1 + rank] for name, values in batch.items()}
    with pytest.raises(ValueError, match=f"must have the same shapes.*in process {rank}"):
        train_step(parallel, uneven, make_optimizers(parallel, sgd), block=0)
    for options, words in (
        ({}, "find_unused_parameters=True"),
        ({"static_graph": True, "find_unused_parameters": True}, "static_graph=False"),
    ):
        parallel = DistributedDataParallel(copy.deepcopy(blocks), **options)
        before = parameters_of(parallel)
        with pytest.raises(ValueError, match=words):
            train_step(parallel, batch, make_optimizers(parallel, sgd), block=0)
        assert all(torch.equal(before[n], p) for n, p in parallel.named_parameters())


def check_one_block(blocks, batch, rank):
    """Another block in each process: the same error in both, and no parameter moves."""
    parallel = DistributedDataParallel(copy.deepcopy(blocks), find_unused_parameters=True)
    optimizers = make_optimizers(parallel, sgd)
    for given in ((0, 1), (1, 0)):
        before = parameters_of(parallel)
        with pytest.raises(ValueError, match="must be the same in all processes") as raised:
            train_step(parallel, part(batch, rank), optimizers, block=given[rank])
        assert all(p.grad is None for p in parallel.parameters())
        assert all(torch.equal(before[n], p) for n, p in parallel.named_parameters())
        both = [None, None]
        dist.all_gather_object(both, str(raised.value))
        assert both[0] == both[1]
        assert "got blocks [0, 1]" in both[0]
        train_step(parallel, part(batch, rank), optimizers, block=1, generator=seeded())
        assert any(not torch.equal(before[n], p) for n, p in parallel.named_parameters())
    with (
        parallel.no_sync(),
        pytest.raises(ValueError, match=r"must not be called within no_sync\(\)"),
    ):
        train_step(parallel, part(batch, rank), optimizers, block=1)
    one = DistributedDataParallel(blocks.block(rank), find_unused_parameters=True)
    with pytest.raises(ValueError, match=r"the same in all processes.* got blocks \[0, 1\]"):
        train_step(one, part(batch, rank), make_optimizers(one, sgd))


def check_private_block(blocks, batch, rank):
    """One converted block alone, whose layers lie in one order in both processes."""
    config = dataclasses.replace(blocks.config, shared="private")
    model = copy.deepcopy(blocks.base_model.model)
    alone = convert(model, config, task="tokens").block(1)
    parallel = DistributedDataParallel(copy.deepcopy(alone), find_unused_parameters=True)
    one, two = make_optimizers(alone, sgd), make_optimizers(parallel, sgd)
    train_step(parallel, part(batch, rank), two, generator=seeded())
    train_step(alone, batch, one, generator=seeded())
    for name, wanted in parameters_of(alone).items():
        found = parameters_of(parallel.module)[name]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def check_sharded_rows():
    x, shift, scale = (
        torch.randn(*shape, 8, generator=seeded(i)) for i, shape in enumerate([(2, 3), (2,), (2,)])
    )
    wanted = F.adaln(x, shift, scale)
    mesh = init_device_mesh("cpu", (2,))
    rows, *modulation = (distribute_tensor(t, mesh, [Shard(0)]) for t in (x, shift, scale))
    heads = distribute_tensor(torch.randn(2, 1, 4, 8), mesh, [Shard(0)])
    for call in (
        lambda: F.adaln(rows, *modulation),
        lambda: F.gated_residual(rows, rows, modulation[0]),
        lambda: F.residual_adaln(rows, rows, modulation[0], *modulation),
        lambda: F.linear_cross_entropy(rows[0], shift, torch.zeros(3, dtype=torch.int64)),
        lambda: F.doubled_attention(heads, heads, heads),
    ):
        with pytest.raises(TypeError, match=r"DTensor.*to_local"):
            call()
    whole = F.adaln(rows, *modulation, impl="reference").full_tensor()
    torch.testing.assert_close(whole, wanted)


def main(folder):
    torch.set_num_threads(1)
    rank = int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    check_sharded_rows()
    for name, blocks, batch in cases():
        if name == "llama-single":
            check_private_block(blocks, batch, rank)
        if name in ("vit", "doubled", "llama-doubled"):
            if name == "vit":
                check_refusals(blocks, batch, rank)
                check_one_block(copy.deepcopy(blocks), batch, rank)
            check_steps(blocks, batch, rank)
            print("right", name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
