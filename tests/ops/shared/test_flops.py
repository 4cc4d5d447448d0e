"""What PyTorch's flop counter counts: useful work, whoever does it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dblocks.functional import adaln, doubled_attention, linear_cross_entropy
from dblocks.kernels import reference
from dblocks.ops import _flops
from tools import DEVICE, normal, op


def counted(f, *leaves):
    """The flops of a forward, and of it and its backward."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    with FlopCounterMode(display=False) as both:
        with FlopCounterMode(display=False) as forward:
            loss = f(*leaves).sum()
        loss.backward()
    return forward.get_total_flops(), both.get_total_flops()


@pytest.mark.parametrize("impl", ["triton", "composed"])
@pytest.mark.parametrize("query", ["both", "noisy"])
@pytest.mark.parametrize(("block_size", "clean_causal"), [(1, "block"), (4, "block"), (4, "token")])
def test_attention_counts_the_pairs_that_are_allowed(impl, query, block_size, clean_causal):
    N, H, T, width = 1, 2, 6, 16
    q, k, v = (normal(N, h, 2 * T, width, seed=h) for h in (H, 1, 1))
    q = q if query == "both" else q[:, :, T:]
    options = {"block_size": block_size, "clean_causal": clean_causal}

    def f(*qkv):
        return doubled_attention(*qkv, query=query, impl=impl, **options)

    mask = reference.doubled_mask(T, **options)
    pairs = N * H * int((mask if query == "both" else mask[T:]).sum())
    assert counted(f, q, k, v) == (4 * width * pairs, 14 * width * pairs)


@pytest.mark.parametrize("window", [1, 3, 10, 20])
@pytest.mark.parametrize("block_size", [1, 3])
def test_pairs_within_a_window(window, block_size):
    T = 10
    i, j = torch.arange(T)[:, None], torch.arange(T)
    near = i - j < window
    noisy = ((j // block_size <= i // block_size) & near).sum()
    token = ((j <= i) & near).sum()
    pairs = _flops.doubled_pairs
    assert pairs(T, block_size, window, token=False, both=False) == noisy
    assert pairs(T, block_size, window, token=False, both=True) == 2 * noisy
    assert pairs(T, block_size, window, token=True, both=True) == noisy + token


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_counts_its_three_products(impl, reduction):
    R, D, V = 6, 8, 11
    h, weight, target = normal(R, D), normal(V, D), torch.arange(R, device=DEVICE)

    def f(h, weight):
        return linear_cross_entropy(h, weight, target, reduction=reduction, impl=impl)

    assert counted(f, h, weight)[1] == 3 * 2 * R * D * V
    assert counted(lambda h: f(h, weight), h)[1] == 2 * 2 * R * D * V
    with FlopCounterMode(display=False) as counter:
        f(h, weight)
    assert counter.get_total_flops() == 2 * R * D * V


def test_a_counter_sees_an_op_that_is_launched_directly_otherwise():
    x = normal(2, 4, 16)
    seen = []

    class See(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with See():
        adaln(x, None, None, impl="triton")
    assert op("adaln_fwd", "triton") in seen
