import pytest
import torch

from dblocks.kernels import noise
from dblocks.kernels._common.runs import _block_length, plan_runs
from dblocks.ops._dispatch import planned


def meta(*shape, strides=None):
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    return x if strides is None else torch.empty_strided(shape, strides, device="meta")


def test_dense_tensors_are_walked_by_sample_and_others_by_token():
    dense, chunk = meta(4, 64, 768), meta(4, 64, 2304)[..., 768:1536]
    assert plan_runs([dense], 1)[:4] == (4, 1, 64 * 768, 1)
    assert plan_runs([dense], 8)[:4] == (32, 8, 8 * 768, 1)
    assert plan_runs([dense, chunk], 8)[:4] == (256, 64, 768, 8)
    assert plan_runs([dense], 1, by_token=True)[:4] == (256, 64, 768, 64)


@pytest.mark.parametrize("L", [1, 5, 33, 100, 768, 3072, 4099, 150_528])
def test_blocks_cover_a_run_with_little_waste(L):
    block = _block_length(L)
    chunks = -(-L // block)
    assert block & (block - 1) == 0
    assert chunks * block >= L
    assert L <= 64 or chunks * block <= 2 * L


def test_steps_divide_lengths_and_strides():
    for D, offset, step in ((768, 0, 8), (12, 8, 4), (12, 2, 1), (7, 0, 1), (8, None, 8)):
        chunk = meta(2, 4, 3 * D)[..., D : 2 * D]
        runs = plan_runs([chunk], 1, offset=offset)
        assert step == runs.VEC


def test_sizes_beyond_32_bits():
    runs = plan_runs([meta(3, 2**20, 4096)], 1, offset=2**40)
    assert runs.L == 2**32
    assert runs.programs == 3 * 2**20
    assert runs.strides(meta(3, 2**20, 4096))[0] * runs.VEC == 2**32


@pytest.mark.skipif(torch.cuda.is_available(), reason="maps a file as a CPU tensor")
def test_a_sample_stride_beyond_32_bits(tmp_path):
    # A sparse file: 4 GiB of addresses, a few pages of memory.
    stride = 2**31 + 8
    path = str(tmp_path / "samples")
    base = torch.from_file(path, shared=True, size=stride + 64, dtype=torch.bfloat16)
    y = base.as_strided((2, 4, 8), (stride, 16, 1))
    y.copy_(torch.randn(2, 4, 8))
    sigma = torch.tensor([0.5, 2.0])
    inject = planned(noise.noise_inject_fwd)
    for part in (y, y[:, :1]):
        got = inject(part, sigma, None, 1, 2**33, 0.5, torch.float32, True)
        dense = part.contiguous()
        same = inject(dense, sigma, None, 1, 2**33, 0.5, torch.float32, True)
        assert torch.equal(got[0], same[0])
