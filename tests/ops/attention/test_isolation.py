"""What a row must not see changes no bit of it, whatever it holds: forward and each gradient."""

import itertools

import pytest
import torch
from attention_tools import NEW_OPTION_IMPLS, ON_GPU

from dblocks.functional import doubled_attention
from tools import DEVICE, normal

T = 7
ENDS = [0, 3, 3, 7]
RANGES = [[0, 7], [2, 5], [3, 3]]
EXTRA = {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]), "window": 3, "softcap": 3.0}
LAYOUTS = [("clean_noisy", "both"), ("noisy_clean", "both"), ("noisy_clean", "noisy")]
BAD = (float("nan"), float("inf"))

pytestmark = pytest.mark.skipif(ON_GPU, reason="composed on the CPU only")


def results(call, inputs, upstream):
    """o, dq, dk and dv."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = call(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, upstream)]


def check_isolation(call, N, query, outside, zero):
    """NaN or inf in the rows `outside` [N, T] of any input changes no bit of the others.

    With `zero`, the results of these rows are 0.
    """
    rows = T if query == "noisy" else 2 * T
    q, upstream = (normal(N, 4, rows, 16, seed=seed) for seed in (0, 1))
    k, v = (normal(N, 2, 2 * T, 16, seed=seed) for seed in (2, 3))
    given = [q, k, v, upstream]
    expected = results(call, given[:3], upstream)
    # Of each of q, k, v and upstream, and of each result.
    both = outside.repeat(1, 2)
    at = both if query == "both" else outside
    for which, value in itertools.product(range(4), BAD):
        changed = [x.clone() for x in given]
        changed[which].transpose(1, 2)[both if which in (1, 2) else at] = value
        got = results(call, changed[:3], changed[3])
        for name, a, b, mask in zip("oqkv", got, expected, (at, at, both, both), strict=True):
            a, b = a.transpose(1, 2), b.transpose(1, 2)
            assert torch.equal(a[~mask], b[~mask]), (name, "qkvg"[which], value)
            assert not zero or not a[mask].any(), (name, "qkvg"[which], value)


def compiled(call):
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, backend="aot_eager")


def caller(impl, options, compiles):
    call = lambda q, k, v: doubled_attention(q, k, v, impl=impl, **options)
    return compiled(call) if compiles else call


CASES = [("reference", True), ("reference", False), *((impl, False) for impl in NEW_OPTION_IMPLS)]


@pytest.mark.parametrize(("impl", "compiles"), CASES)
@pytest.mark.parametrize("size", [1, 2])
def test_documents(impl, compiles, size):
    ends = torch.tensor(ENDS, dtype=torch.int32, device=DEVICE)
    outside = (torch.arange(T, device=DEVICE) < 3)[None]
    call = caller(impl, {"cu_seqlens": ends, "block_size": size}, compiles)
    check_isolation(call, 1, "both", outside, zero=False)
    check_isolation(call, 1, "both", ~outside, zero=False)


@pytest.mark.parametrize("impl", ["reference", *NEW_OPTION_IMPLS])
@pytest.mark.parametrize(("order", "query"), LAYOUTS)
@pytest.mark.parametrize("extra", [{}, EXTRA], ids=["plain", "extra"])
def test_documents_with_options(impl, order, query, extra):
    ends = torch.tensor(ENDS, dtype=torch.int32, device=DEVICE)
    outside = (torch.arange(T, device=DEVICE) < 3)[None]
    options = {"cu_seqlens": ends, "order": order, "query": query, "block_size": 2, **extra}
    check_isolation(caller(impl, options, False), 1, query, outside, zero=False)


@pytest.mark.parametrize("impl", ["reference", *NEW_OPTION_IMPLS])
@pytest.mark.parametrize(("order", "query"), LAYOUTS)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("extra", [{}, EXTRA], ids=["plain", "extra"])
def test_padding(impl, order, query, size, extra):
    valid = torch.tensor(RANGES, dtype=torch.int32, device=DEVICE)
    position = torch.arange(T, device=DEVICE)
    outside = (position < valid[:, :1]) | (position >= valid[:, 1:])
    options = {"valid": valid, "order": order, "query": query, "block_size": size, **extra}
    check_isolation(caller(impl, options, False), 3, query, outside, zero=True)


@pytest.mark.parametrize("impl", NEW_OPTION_IMPLS)
@pytest.mark.parametrize("extra", [{}, EXTRA], ids=["plain", "extra"])
def test_samples(impl, extra):
    """Of a batch: the others do not see it, with the same range of positions or another."""
    outside = torch.tensor([True, False, False], device=DEVICE)[:, None].expand(3, T)
    valid = torch.tensor([[0, 7], [0, 7], [2, 5]], dtype=torch.int32, device=DEVICE)
    for given in ({}, {"valid": valid}):
        call = caller(impl, extra | given, False)
        q, g, k, v = (normal(3, 4, 2 * T, 16, seed=seed) for seed in range(4))
        expected = results(call, (q, k, v), g)
        for x in (q, k, v, g):
            changed = [y.clone() for y in (q, k, v, g)]
            next(y for y, z in zip(changed, (q, k, v, g), strict=True) if z is x)[0] = BAD[0]
            got = results(call, changed[:3], changed[3])
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a[~outside[:, 0]], b[~outside[:, 0]])
