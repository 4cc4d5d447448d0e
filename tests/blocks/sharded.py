"""One training step of sharded blocks in two processes, against one process; run by a test."""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from convert_tools import blocks_of, shaken
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from dblocks.blocks import BlocksConfig, DiffusionBlocks, make_optimizers, train_step
from dblocks.scale import data_parallel
from lm_tools import lm_of
from tools import randomized, seeded, vit

N = 4


def cases():
    tokens = {"tokens": torch.randint(5, 11, (N, 8), generator=seeded(1))}
    images = {
        "images": torch.randn(N, 3, 8, 8, generator=seeded(1)),
        "labels": torch.arange(N) % 5,
    }
    config = BlocksConfig(2)
    yield "vit", DiffusionBlocks(randomized(vit()), config), images
    for rows in ("single", "doubled"):
        yield rows, DiffusionBlocks(randomized(lm_of(rows=rows)), config), tokens
        yield f"llama-{rows}", shaken(blocks_of("llama", rows=rows, clean_loss_weight=0.0)), tokens


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_one_block(blocks, mesh, mine, rank):
    """Another block in each process: the same error in both, and no parameter moves."""
    optimizers = make_optimizers(data_parallel(blocks, mesh, "fsdp"), sgd)
    before = {n: whole(p).clone() for n, p in blocks.named_parameters()}
    with pytest.raises(ValueError, match=r"the same in all processes.* got blocks \[0, 1\]"):
        train_step(blocks, mine, optimizers, block=rank)
    assert all(torch.equal(before[n], whole(p)) for n, p in blocks.named_parameters())
    train_step(blocks, mine, optimizers, block=1, generator=seeded())
    assert any(not torch.equal(before[n], whole(p)) for n, p in blocks.named_parameters())


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def main(folder):
    torch.set_num_threads(1)
    rank = int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, blocks, batch in cases():
        alone, sharded = blocks, copy.deepcopy(blocks)
        data_parallel(sharded, mesh, "fsdp")
        mine = {k: v[rank * N // 2 : (rank + 1) * N // 2] for k, v in batch.items()}
        for block in range(2):
            expected = alone.loss(batch, block, generator=seeded(7)).loss
            found = sharded.loss(mine, block, generator=seeded(7)).loss
            mean = found.detach().clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / 2, expected)
            expected.backward()
            found.backward()
        grads = {n: p.grad for n, p in alone.named_parameters()}
        for n, p in sharded.named_parameters():
            assert isinstance(p, DTensor), n
            assert (p.grad is None) == (grads[n] is None), n
            if p.grad is not None:
                torch.testing.assert_close(whole(p.grad), grads[n], rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            cond = {k: v for k, v in batch.items() if k != "labels"}
            z = torch.randn(
                N,
                *((8,) if "tokens" in batch else ()),
                alone.base_model.target.rows().shape[1],
                generator=seeded(3),
            )
            expected = alone.logits(z, 1.0, block=1, **cond)
            torch.testing.assert_close(
                sharded.logits(z, 1.0, block=1, **cond), expected, rtol=1e-4, atol=1e-4
            )
        if name == "vit":
            check_one_block(copy.deepcopy(alone), mesh, mine, rank)
        print("right", name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
