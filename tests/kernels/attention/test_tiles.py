"""The Triton kernels of doubled_attention, in tiles so small that few rows need many of them."""

import pytest
import torch
from attention_kernel_tools import (
    PLAIN,
    SMALL,
    TALL,
    backward,
    documents,
    expected,
    expected_gradients,
    forward,
    gradients,
    mask,
    problems,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dblocks.testing import assert_within_budget
from tools import DEVICE, normal

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@given(problem=problems(), tiles=st.sampled_from([SMALL, TALL]))
def test_output_and_log_sum_are_within_budget(problem, tiles):
    _, q, k, v, options = problem
    got = forward(q, k, v, options, tiles)
    ref64 = expected(q.double(), k.double(), v.double(), options)
    for name, *tensors in zip(("o", "lse"), got, ref64, expected(q, k, v, options), strict=True):
        assert_within_budget(*tensors, name)
    assert got[0].transpose(1, 2).is_contiguous()


# Each example runs four kernels in many programs.
@settings(max_examples=settings().max_examples // 2)
@given(problem=problems(), tiles=st.sampled_from([SMALL, TALL]))
def test_gradients_are_within_budget(problem, tiles):
    do, q, k, v, options = problem
    if mask(k.shape[2] // 2, options).sum(-1).max() < 3 or options["scale"] == 0:
        # Of a softmax over one key dq and dk are rounding alone: see the test of one token.
        return
    got = gradients(do, q, k, v, options, tiles)
    both = expected_gradients(do, q, k, v, options)
    for name, *tensors in zip(("dq", "dk", "dv"), got, *both, strict=True):
        assert_within_budget(*tensors, name)
        assert tensors[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "change", [{}, {"block_size": 5, "token": True}, {"noisy_only": True}], ids=str
)
def test_tiles_of_the_table(dtype, change):
    T, options = 130, PLAIN | change
    q, k, v, do = (normal(1, 2, 2 * T, 72, seed=seed).to(dtype) for seed in range(4))
    k, v = k[:, :1], v[:, :1]
    if options.get("noisy_only"):
        q, do = q[:, :, T:], do[:, :, T:]
    o, lse = forward(q, k, v, options, None)
    grads = backward(do, q, k, v, o, lse, options, None)
    ref64 = expected(q.double(), k.double(), v.double(), options)
    assert_within_budget(o, ref64[0], expected(q, k, v, options)[0])
    for tensors in zip(grads, *expected_gradients(do, q, k, v, options), strict=True):
        assert_within_budget(*tensors)


# Packed documents: one empty, one of a single token, two that share every kind of tile.
ENDS = (3, 3, 4, 18)
CASES = [
    ({}, None),
    ({}, ENDS),
    ({"noisy_only": True}, ENDS),
    ({"block_size": 7, "token": True}, None),
    ({"block_size": 4}, ENDS),
    ({"block_size": 3, "noisy_only": True}, None),
]


def runs(options, N):
    """One run of N samples, or N runs of one where documents are packed."""
    return [slice(N)] if options.get("cu_seqlens") is None else [slice(i, i + 1) for i in range(N)]


@pytest.mark.parametrize(("change", "ends"), CASES, ids=str)
def test_a_key_changes_the_rows_that_see_it_and_no_other_bit(change, ends):
    T, D = 18, 16
    options = PLAIN | change | ({"cu_seqlens": documents(*ends)} if ends else {})
    q, k, v = (normal(1, 1, 2 * T, D, seed=seed) for seed in range(3))
    q = q[:, :, T:] if options.get("noisy_only") else q
    before, _ = forward(q, k, v, options)
    own = torch.eye(2 * T, dtype=torch.bool, device=DEVICE)[:, None, :, None]
    q, k, v = q.expand(2 * T, -1, -1, -1), torch.where(own, k - 1, k), torch.where(own, v + 8, v)
    after = torch.cat([forward(q[i], k[i], v[i], options)[0] for i in runs(options, 2 * T)])
    assert torch.equal((after != before).any(-1).any(1).T, mask(T, options))


@pytest.mark.parametrize(("change", "ends"), CASES[2::2], ids=str)
def test_an_upstream_row_changes_the_keys_that_it_sees_and_no_other_bit(change, ends):
    T, D = 18, 16
    options = PLAIN | change | ({"cu_seqlens": documents(*ends)} if ends else {})
    do, q, k, v = (normal(1, 1, 2 * T, D, seed=seed) for seed in range(4))
    if options.get("noisy_only"):
        do, q = do[:, :, T:], q[:, :, T:]
    o, lse = forward(q, k, v, options)
    rows = q.shape[2]
    own = torch.eye(rows, dtype=torch.bool, device=DEVICE)
    inputs = (do, q, k, v, o, lse)
    before = backward(*inputs, options)
    other = torch.where(own[:, None, :, None], do + 8, do)
    inputs = [x.expand(rows, *x.shape[1:]) for x in (q, k, v, o, lse)]
    after = [backward(other[i], *(x[i] for x in inputs), options) for i in runs(options, rows)]
    dq, dk, dv = (
        (torch.cat([grads[i] for grads in after]) != before[i]).any(-1).any(1) for i in range(3)
    )
    visible = mask(T, options)
    several = visible.sum(1) > 1  # with one key dq and dk are zero whatever comes from above
    assert torch.equal(dv, visible)
    assert torch.equal(dk[several], visible[several])
    assert not (dk & ~visible).any()
    assert torch.equal(dq[several], own[several])
    assert not (dq & ~own).any()


OPTIONS = pytest.mark.parametrize(
    "change", [{}, {"block_size": 7, "token": True}, {"block_size": 3, "noisy_only": True}], ids=str
)


@OPTIONS
def test_two_runs_agree_bit_for_bit(change):
    options = PLAIN | change
    q, k, v = (normal(1, h, 40, 24, seed=h) for h in (4, 2, 2))
    q = q[:, :, 20:] if options.get("noisy_only") else q
    first, second = (
        [*forward(q, k, v, options), *gradients(q, q, k, v, options)] for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_noisy_queries_alone_give_the_noisy_rows_of_both():
    T = 24
    q, k, v = (normal(2, h, 2 * T, 16, seed=h) for h in (4, 2, 2))
    for block_size in (1, 6):
        both = PLAIN | {"block_size": block_size}
        o, lse = forward(q, k, v, both)
        noisy_o, noisy_lse = forward(q[:, :, T:], k, v, both | {"noisy_only": True})
        torch.testing.assert_close(noisy_o, o[:, :, T:])
        torch.testing.assert_close(noisy_lse, lse[:, :, T:])
