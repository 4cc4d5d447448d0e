"""The Triton kernels of doubled_attention, in tiles so small that few rows need many of them."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dblocks.kernels import _attention, reference
from dblocks.kernels._attention import Options, Settings, Tiles
from dblocks.kernels.attention import doubled_attention_fwd
from dblocks.kernels.attention_bwd import doubled_attention_bwd
from dblocks.ops import _attention_op
from dblocks.testing import LAYOUTS, assert_within_budget, make
from tools import DEVICE, ROOT, normal, op

SMALL = Settings(Tiles(32, 16, 4, 1), Tiles(32, 16, 4, 1), Tiles(16, 16, 4, 1))
TALL = Settings(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(32, 32, 4, 1))
PLAIN = {"block_size": 1, "token": False, "scale": 0.25}


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """Fills torch.empty with NaN, so that an output that was not written cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def forward(q, k, v, options, tiles=SMALL):
    return doubled_attention_fwd(q, k, v, Options(**options), tiles=tiles and tiles.forward)


def backward(do, q, k, v, o, lse, options, tiles=SMALL):
    inputs = (do, q, k, v, o, lse, Options(**options))
    return doubled_attention_bwd(*inputs, needs=[True, True], tiles=tiles)


def gradients(do, q, k, v, options, tiles=SMALL):
    return backward(do, q, k, v, *forward(q, k, v, options, tiles), options, tiles)


def arguments(options):
    """Of the reference, but for those of the queries."""
    o = Options(**options)
    return {
        "block_size": o.block_size,
        "clean_causal": "token" if o.token else "block",
        "order": "noisy_clean" if o.noisy_first else "clean_noisy",
        "cu_seqlens": o.cu_seqlens,
        "valid": o.valid,
        "window": o.window,
    }


def expected(q, k, v, options):
    o = Options(**options)
    return reference.doubled_attention(
        q, k, v, **arguments(options), scale=o.scale, softcap=o.softcap,
        alibi_slopes=o.alibi_slopes, query="noisy" if o.noisy_only else "both",
    )  # fmt: skip


def expected_gradients(do, q, k, v, options):
    """In float64, and in float32 with what enters a matrix product or is stored rounded."""
    leaves = [x.double().detach().requires_grad_() for x in (q, k, v)]
    ref64 = torch.autograd.grad(expected(*leaves, options)[0], leaves, do.double())
    o, T, group = Options(**options), k.shape[2] // 2, q.shape[1] // k.shape[1]
    round_ = lambda x: x.to(q.dtype).float()
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = q.float() @ keys.mT * o.scale
    slope = 1.0
    if o.softcap is not None:
        scores = o.softcap * torch.tanh(scores / o.softcap)
        slope = 1 - (scores / o.softcap).square()
    if o.alibi_slopes is not None:
        at = torch.arange(T, device=DEVICE).repeat(2)
        distance = (at[: q.shape[2], None] - at).abs()
        scores = scores - o.alibi_slopes[..., None, None] * distance
    seen = mask(T, options).unsqueeze(-3)
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1).where(seen, 0)
    delta = (do.float() * round_(round_(p) @ values)).sum(-1, keepdim=True)
    ds = round_(p * (do.float() @ values.mT - delta) * slope)
    dk, dv = ds.mT @ q.float() * o.scale, round_(p).mT @ do.float()
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return ref64, [x.to(q.dtype) for x in (ds @ keys * o.scale, dk, dv)]


def documents(*ends):
    return torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)


def ranges(*limits):
    return torch.tensor(limits, dtype=torch.int32, device=DEVICE)


def noisy_rows(T, options):
    """Of both halves."""
    return slice(0, T) if options.get("noisy_first") else slice(T, 2 * T)


def mask(T, options):
    rows = reference.doubled_mask(T, **arguments(options), device=DEVICE)
    return rows[..., noisy_rows(T, options), :] if options.get("noisy_only") else rows


@st.composite
def problems(draw):
    T = draw(st.integers(1, 36))
    heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))
    kind = draw(st.sampled_from(["whole", "packed", "padded"]))
    N = 1 if kind == "packed" else draw(st.sampled_from([1, 2]))
    limits = st.lists(st.integers(0, T), min_size=2, max_size=2).map(sorted)
    D, DV = draw(st.sampled_from([(16, 16), (24, 24), (40, 40), (32, 16), (16, 40)]))
    options = {
        "block_size": draw(st.one_of(st.just(1), st.sampled_from([2, 3, 8, 16, 21, 128]))),
        "token": draw(st.booleans()),
        "scale": draw(st.sampled_from([D**-0.5, 0.7, -0.2, 0.0])),
        "noisy_only": draw(st.booleans()),
        "noisy_first": draw(st.booleans()),
        "window": draw(st.sampled_from([None, None, 1, 3, 10, 40])),
        "softcap": draw(st.sampled_from([None, None, 0.5, 20.0])),
    }
    if kind == "packed":
        options["cu_seqlens"] = documents(*sorted(draw(st.lists(st.integers(0, T)))), T)
    if kind == "padded":
        options["valid"] = ranges(*(draw(limits) for _ in range(N)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(heads * group,), (N, heads * group)]))
        options["alibi_slopes"] = torch.rand(shape, generator=generator).to(DEVICE)
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))

    def tensor(count, rows, width):
        layout = draw(st.sampled_from(LAYOUTS))
        if draw(st.booleans()):
            by_rows = make((N, rows, count, width), layout, dtype, generator, device=DEVICE)
            return by_rows.transpose(1, 2)
        return make((N, count, rows, width), layout, dtype, generator, device=DEVICE)

    rows = T if options.get("noisy_only") else 2 * T
    q, do = (tensor(heads * group, rows, width) for width in (D, DV))
    k, v = (tensor(heads, 2 * T, width) for width in (D, DV))
    return do, q, k, v, options


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


SEVERAL = {"block_size": 3, "window": 4, "softcap": 2.0, "alibi_slopes": [0.5, 1.0]}
FORMS = pytest.mark.parametrize("change", [{}, SEVERAL, {"noisy_only": True}], ids=str)


def halved(change):
    """Tensors of 2 heads and T = 18 under `change`, with their options."""
    options = PLAIN | change
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.tensor(options["alibi_slopes"], device=DEVICE)
    do, q, k, v = (normal(1, 2, 36, 16, seed=seed) for seed in range(4))
    if options.get("noisy_only"):
        do, q = (x[:, :, noisy_rows(18, options)] for x in (do, q))
    return [do, q, k, v], options


def results(inputs, options):
    do, q, k, v = inputs
    o, lse = forward(q, k, v, options)
    return [o, *backward(do, q, k, v, o, lse, options)]


@FORMS
def test_either_order_of_the_halves_gives_the_same_bits(change):
    inputs, options = halved(change)
    swapped = [x if x.shape[2] == 18 else x.roll(18, 2) for x in inputs]
    for a, b in zip(
        results(inputs, options), results(swapped, options | {"noisy_first": True}), strict=True
    ):
        assert torch.equal(a, b if a.shape[2] == 18 else b.roll(18, 2))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, of the poison
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@FORMS
def test_nothing_leaves_a_document(change, value):
    inputs, options = halved(change)
    options["cu_seqlens"] = documents(5, 5, 12, 18)
    before = results(inputs, options)
    poisoned = [x.clone() for x in inputs]
    for x in poisoned:
        x.unflatten(2, (-1, 18))[:, :, :, 5:12] = value
    for a, b in zip(before, results(poisoned, options), strict=True):
        a, b = (x.unflatten(2, (-1, 18)) for x in (a, b))
        assert torch.equal(a[:, :, :, :5], b[:, :, :, :5])
        assert torch.equal(a[:, :, :, 12:], b[:, :, :, 12:])
        assert not b[:, :, :, 5:12].isfinite().any()


@pytest.mark.parametrize("limits", [(0, 18), (3, 11), (17, 18), (4, 4)])
@FORMS
def test_rows_outside_of_valid_are_zero_and_change_nothing(change, limits):
    inputs, options = halved(change)
    start, end = limits
    whole = dict(options)
    options["valid"] = ranges(limits)
    inside = torch.zeros(18, dtype=torch.bool, device=DEVICE)
    inside[start:end] = True
    nan = torch.tensor(float("nan"), device=DEVICE)
    poisoned = [x.where(inside.repeat(x.shape[2] // 18)[:, None], nan) for x in inputs]
    got = results(poisoned, options)
    for x in got:
        assert not x[:, :, ~inside.repeat(x.shape[2] // 18)].any()
    # What is left is a sequence of its own.
    cut = lambda x: x[:, :, inside.repeat(x.shape[2] // 18)]
    for a, b in zip(got, results([cut(x) for x in inputs], whole), strict=True):
        assert torch.equal(cut(a), b)


def test_nothing_leaves_what_is_valid():
    inputs, options = halved({})
    options["valid"] = ranges((3, 11))
    inputs[3][:, :, 5] = float("nan")  # a clean value that later rows see
    o, dq, dk, dv = results(inputs, options)
    assert o[:, :, 6:11].isnan().all()
    inside = torch.zeros(36, dtype=torch.bool, device=DEVICE)
    inside[3:11] = inside[21:29] = True
    for x in (o, dq, dk, dv):
        assert not x[:, :, ~inside].any()


def test_the_first_rows_see_only_themselves():
    T = 20
    q, k, v = (normal(2, 2, 2 * T, 16, seed=seed) for seed in range(3))
    o, lse = forward(q, k, v, PLAIN)
    for row in (0, T):
        assert torch.equal(o[:, :, row], v[:, :, row])
        own = (q[:, :, row].double() * k[:, :, row].double()).sum(-1) * PLAIN["scale"]
        torch.testing.assert_close(lse[:, :, row], own.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("noisy_only", [False, True])
def test_one_token(dtype, noisy_only):
    q, k, v, do = (normal(3, 2, 2, 32, seed=seed).to(dtype) for seed in range(4))
    if noisy_only:
        q, do = q[:, :, 1:], do[:, :, 1:]
    options = PLAIN | {"noisy_only": noisy_only}
    o, _ = forward(q, k, v, options)
    assert torch.equal(o, v[:, :, 1:] if noisy_only else v)
    dq, dk, dv = gradients(do, q, k, v, options)
    assert torch.equal(dv[:, :, -1], do[:, :, -1])
    assert torch.equal(dv[:, :, 0], torch.zeros_like(do[:, :, 0]) if noisy_only else do[:, :, 0])
    # dp and delta are one sum of D products, added in two orders.
    keys, values = (x[:, :, 1:] if noisy_only else x for x in (k, v))
    cancelling = (do.double() * values.double()).abs().sum(-1, keepdim=True) * PLAIN["scale"]
    bound = 32 * torch.finfo(torch.float32).eps * cancelling
    assert (dq.double().abs() <= bound * keys.double().abs()).all()
    assert (dk[:, :, -1:].double().abs() <= (bound * q.double().abs())[:, :, -1:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block_size", [1, 4])
def test_large_logits_stay_finite(dtype, block_size):
    options = PLAIN | {"block_size": block_size}
    q, k, v, do = (normal(1, 2, 60, 16, seed=seed).to(dtype) for seed in range(4))
    q, k = 50 * q, 50 * k
    o, lse = forward(q, k, v, options)
    ref64 = expected(q.double(), k.double(), v.double(), options)
    eager = expected(q, k, v, options)
    assert_within_budget(o, ref64[0], eager[0])
    assert_within_budget(lse, ref64[1], eager[1])
    assert all(grad.isfinite().all() for grad in gradients(do, q, k, v, options))


INTERPRETED_BFLOAT16 = """
import torch
from dblocks.ops._attention_op import fused
from dblocks.kernels import reference
from dblocks.testing import assert_within_budget
torch.manual_seed(0)
for size, count in ((1, "both"), (3, "both"), (3, "noisy")):
    rows = 12 if count == "noisy" else 24
    options = dict(block_size=size, clean_causal="block", scale=0.25, cu_seqlens=None, query=count,
        order="clean_noisy", valid=None, window=None, softcap=None, alibi_slopes=None)
    tensors = [torch.randn(1, 2, n, 16).bfloat16() for n in (rows, 24, 24, rows)]
    def results(f, dtype):
        *leaves, do = (x.to(dtype).requires_grad_() for x in tensors)
        o = f(*leaves)
        return [o, *torch.autograd.grad(o, leaves, do.detach())]
    plain = lambda *x: reference.doubled_attention(*x, **options)[0]
    got = results(lambda *x: fused(*x, **options), torch.bfloat16)
    ref64, eager = results(plain, torch.float64), results(plain, torch.bfloat16)
    for name, *x in zip(("o", "dq", "dk", "dv"), got, ref64, eager):
        print(name, float((x[0] - x[1]).abs().max()), float((x[2] - x[1]).abs().max()))
        torch.testing.assert_close(x[0].double(), x[1], atol=0.02, rtol=0.01)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
def test_interpreted_bfloat16_is_right_without_the_rounding_of_the_tests():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED_BFLOAT16]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="maps a file as a CPU tensor")
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_32_bits(tmp_path, dim):
    # A sparse file: gigabytes of addresses, a few pages of memory.
    shape, strides = (2, 2, 40, 16), [2048, 1024, 16, 1]
    strides[dim] = (2**31 if dim < 2 else 2**26) + 8
    size = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    base = torch.from_file(str(tmp_path / "x"), shared=True, size=size, dtype=torch.float16)
    x = base.as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    assert size > 2**31
    results = []
    for tensor in (x, x.contiguous()):
        results.append([*forward(*3 * [tensor], PLAIN), *gradients(*4 * [tensor], PLAIN)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    cu_seqlens = documents(4, 10) if packed else None
    valid = None if packed else ranges((0, 7), (2, 10))
    q, k, v = (normal(1 if packed else 2, h, 20, 16, seed=h) for h in (4, 2, 2))
    options = (2, True, 0.25, cu_seqlens, False, True, valid, 5, 9.0, normal(4).abs())
    forward_op, backward_op = (op(f"doubled_attention_{d}", "triton") for d in ("fwd", "bwd"))
    torch.library.opcheck(forward_op, (q, k, v, *options))
    o, lse = forward_op(q, k, v, *options)
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(backward_op, (o, q, k, v, o, lse, *options, needs))


def call(q, k, v, **options):
    given = {
        "block_size": 1, "clean_causal": "block", "scale": 0.25, "cu_seqlens": None,
        "query": "both", "order": "clean_noisy", "valid": None, "window": None, "softcap": None,
        "alibi_slopes": None,
    }  # fmt: skip
    return _attention_op.fused(q, k, v, **given | options)


def test_each_input_may_need_a_gradient_alone():
    tensors = [normal(1, h, 20, 16, seed=h) for h in (2, 1, 1)]
    leaves = [x.clone().requires_grad_() for x in tensors]
    every = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    for i, grad in enumerate(every):
        inputs = [*tensors[:i], leaves[i], *tensors[i + 1 :]]
        (own,) = torch.autograd.grad(call(*inputs).square().sum(), leaves[i])
        assert torch.equal(own, grad)
    assert not call(*tensors).requires_grad


def test_any_upstream_gradient():
    leaves = [normal(1, 2, 20, 16, seed=seed).half().requires_grad_() for seed in range(3)]
    o = call(*leaves)
    plain = torch.autograd.grad(o, leaves, torch.ones_like(o), retain_graph=True)
    for summed in (o.sum(), o.float().sum()):
        grads = torch.autograd.grad(summed, leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(plain, grads, strict=True))
    upstream = normal(16, 20, 2, 1).half()
    odd = torch.autograd.grad(o, leaves, upstream.permute(3, 2, 1, 0), retain_graph=True)
    even = torch.autograd.grad(o, leaves, upstream.permute(3, 2, 1, 0).contiguous())
    assert all(torch.equal(a, b) for a, b in zip(odd, even, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 8, 16), (2, 2, 0, 16)])
@pytest.mark.parametrize("query", ["both", "noisy"])
def test_empty(shape, query):
    q, k, v = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(3))
    q = q[:, :, : shape[2] // 2] if query == "noisy" else q
    o = call(q, k, v, query=query)
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    assert o.shape == q.shape
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.filterwarnings("default")  # Inductor's own deprecations
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph(backend):
    leaves = [normal(2, h, 20, 16, seed=h).requires_grad_() for h in (4, 2, 2)]
    options = {"valid": ranges((0, 7), (2, 10)), "window": 4, "softcap": 9.0}
    options["alibi_slopes"] = torch.ones(4, device=DEVICE)
    f = lambda q, k, v: call(q.sin(), k, v, block_size=3, **options).square().sum()
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    own = torch.autograd.grad(f(*leaves), leaves)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), own, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("width", "block_size", "message"),
    [
        (8, 1, "Dh a multiple of 8 from 16 to 256, got 8; use impl='composed'"),
        (20, 1, "got 20"),
        (264, 1, "got 264"),
        (16, 129, "block_size <= 128, got 129; use impl='composed' or impl='reference'"),
    ],
)
def test_what_the_kernels_do_not_take(width, block_size, message):
    q, k, v = (torch.randn(1, 1, 4, width, device=DEVICE) for _ in range(3))
    with pytest.raises(ValueError, match=message):
        call(q, k, v, block_size=block_size)


def test_every_width_has_tiles_that_cover_it():
    targets = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942")
    for target in targets:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for width in range(16, 257, 8):
                for tile in _attention.settings(width, dtype, target):
                    assert min(tile.BLOCK_M, tile.BLOCK_K) >= 16  # of matrix instructions
                    assert not any(n & (n - 1) for n in tile[:3])
