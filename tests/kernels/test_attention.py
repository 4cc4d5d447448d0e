"""The Triton kernels of doubled_attention, in tiles so small that few rows need many of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dblocks.kernels import _attention, reference
from dblocks.kernels._attention import Settings, Tiles
from dblocks.kernels.attention import doubled_attention_fwd
from dblocks.kernels.attention_bwd import doubled_attention_bwd
from dblocks.ops import _attention_op
from dblocks.testing import LAYOUTS, assert_within_budget, make
from tools import DEVICE, normal, op

SMALL = Settings(Tiles(32, 16, 4, 1), Tiles(32, 16, 4, 1), Tiles(16, 16, 4, 1))
TALL = Settings(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(32, 32, 4, 1))
PLAIN = {"block_size": 1, "token": False, "scale": 0.25, "cu_seqlens": None, "noisy_only": False}


@pytest.fixture(autouse=True)
def _poisoned_empty():
    """Fills torch.empty with NaN, so that an output that was not written cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def forward(q, k, v, options, tiles=SMALL):
    return doubled_attention_fwd(q, k, v, **options, tiles=tiles and tiles.forward)


def gradients(do, q, k, v, options, tiles=SMALL):
    o, lse = forward(q, k, v, options, tiles)
    return doubled_attention_bwd(do, q, k, v, o, lse, **options, needs=[True, True], tiles=tiles)


def expected(q, k, v, options):
    return reference.doubled_attention(
        q, k, v,
        block_size=options["block_size"],
        clean_causal="token" if options["token"] else "block",
        scale=options["scale"],
        cu_seqlens=options["cu_seqlens"],
        query="noisy" if options["noisy_only"] else "both",
    )  # fmt: skip


def expected_gradients(do, q, k, v, options):
    """In float64, and in float32 with what enters a matrix product or is stored rounded."""
    leaves = [x.double().detach().requires_grad_() for x in (q, k, v)]
    ref64 = torch.autograd.grad(expected(*leaves, options)[0], leaves, do.double())
    round_ = lambda x: x.to(q.dtype).float()
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = q.float() @ keys.mT * options["scale"]
    p = scores.masked_fill(~mask(k.shape[2] // 2, options), -torch.inf).softmax(-1)
    delta = (do.float() * round_(round_(p) @ values)).sum(-1, keepdim=True)
    ds = round_(p * (do.float() @ values.mT - delta))
    dk, dv = ds.mT @ q.float() * options["scale"], round_(p).mT @ do.float()
    grads = (ds @ keys * options["scale"], *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv)))
    return ref64, [x.to(q.dtype) for x in grads]


def documents(*ends):
    return torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)


def mask(T, options):
    rows = reference.doubled_mask(
        T,
        block_size=options["block_size"],
        clean_causal="token" if options["token"] else "block",
        cu_seqlens=options["cu_seqlens"],
        device=DEVICE,
    )
    return rows[T:] if options["noisy_only"] else rows


@st.composite
def problems(draw, min_tokens):
    T = draw(st.integers(min_tokens, 36))
    heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3)]))
    packed = draw(st.booleans())
    N = 1 if packed else draw(st.sampled_from([1, 2]))
    ends = sorted(draw(st.lists(st.integers(0, T), max_size=4))) if packed else []
    noisy_only = draw(st.booleans())
    D = draw(st.sampled_from([16, 24, 32, 40]))
    options = {
        "block_size": draw(st.one_of(st.just(1), st.sampled_from([2, 3, 8, 16, 21, 128]))),
        "token": draw(st.booleans()),
        "scale": draw(st.sampled_from([D**-0.5, 0.7, -0.2])),
        "cu_seqlens": documents(*ends, T) if packed else None,
        "noisy_only": noisy_only,
    }
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))

    def tensor(count, rows):
        layout = draw(st.sampled_from(LAYOUTS))
        if draw(st.booleans()):
            by_rows = make((N, rows, count, D), layout, dtype, generator, device=DEVICE)
            return by_rows.transpose(1, 2)
        return make((N, count, rows, D), layout, dtype, generator, device=DEVICE)

    rows = T if noisy_only else 2 * T
    q, do = (tensor(heads * group, rows) for _ in range(2))
    k, v = (tensor(heads, 2 * T) for _ in range(2))
    return do, q, k, v, options


@given(problem=problems(1), tiles=st.sampled_from([SMALL, TALL]))
def test_output_and_log_sum_are_within_budget(problem, tiles):
    _, q, k, v, options = problem
    got = forward(q, k, v, options, tiles)
    ref64 = expected(q.double(), k.double(), v.double(), options)
    for name, *tensors in zip(("o", "lse"), got, ref64, expected(q, k, v, options), strict=True):
        assert_within_budget(*tensors, name)
    assert got[0].transpose(1, 2).is_contiguous()


# Each example runs four kernels in many programs.
@settings(max_examples=settings().max_examples // 2)
# Of a softmax over one key dq and dk are rounding alone: see the test of one token.
@given(problem=problems(3), tiles=st.sampled_from([SMALL, TALL]))
def test_gradients_are_within_budget(problem, tiles):
    do, q, k, v, options = problem
    if options["cu_seqlens"] is not None and options["cu_seqlens"].diff().max() < 3:
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
    if options["noisy_only"]:
        q, do = q[:, :, T:], do[:, :, T:]
    o, lse = forward(q, k, v, options, None)
    grads = doubled_attention_bwd(do, q, k, v, o, lse, **options, needs=[True, True])
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
    return [slice(N)] if options["cu_seqlens"] is None else [slice(i, i + 1) for i in range(N)]


@pytest.mark.parametrize(("change", "ends"), CASES, ids=str)
def test_a_key_changes_the_rows_that_see_it_and_no_other_bit(change, ends):
    T, D = 18, 16
    options = PLAIN | change | {"cu_seqlens": documents(*ends) if ends else None}
    q, k, v = (normal(1, 1, 2 * T, D, seed=seed) for seed in range(3))
    q = q[:, :, T:] if options["noisy_only"] else q
    before, _ = forward(q, k, v, options)
    own = torch.eye(2 * T, dtype=torch.bool, device=DEVICE)[:, None, :, None]
    q, k, v = q.expand(2 * T, -1, -1, -1), torch.where(own, k - 1, k), torch.where(own, v + 8, v)
    after = torch.cat([forward(q[i], k[i], v[i], options)[0] for i in runs(options, 2 * T)])
    assert torch.equal((after != before).any(-1).any(1).T, mask(T, options))


@pytest.mark.parametrize(("change", "ends"), CASES[2::2], ids=str)
def test_an_upstream_row_changes_the_keys_that_it_sees_and_no_other_bit(change, ends):
    T, D = 18, 16
    options = PLAIN | change | {"cu_seqlens": documents(*ends) if ends else None}
    do, q, k, v = (normal(1, 1, 2 * T, D, seed=seed) for seed in range(4))
    if options["noisy_only"]:
        do, q = do[:, :, T:], q[:, :, T:]
    o, lse = forward(q, k, v, options)
    rows = q.shape[2]
    own = torch.eye(rows, dtype=torch.bool, device=DEVICE)
    inputs = (do, q, k, v, o, lse)
    before = doubled_attention_bwd(*inputs, **options, needs=[True, True], tiles=SMALL)
    other = torch.where(own[:, None, :, None], do + 8, do)
    inputs = [x.expand(rows, *x.shape[1:]) for x in (q, k, v, o, lse)]
    after = [
        doubled_attention_bwd(
            other[i], *(x[i] for x in inputs), **options, needs=[True, True], tiles=SMALL
        )
        for i in runs(options, rows)
    ]
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
    q = q[:, :, 20:] if options["noisy_only"] else q
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
    q, k, v = (normal(1 if packed else 2, h, 20, 16, seed=h) for h in (4, 2, 2))
    options = (2, True, 0.25, cu_seqlens, False)
    forward_op, backward_op = (op(f"doubled_attention_{d}", "triton") for d in ("fwd", "bwd"))
    torch.library.opcheck(forward_op, (q, k, v, *options))
    o, lse = forward_op(q, k, v, *options)
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(backward_op, (o, q, k, v, o, lse, *options, needs))


def call(q, k, v, *, block_size=1, query="both"):
    return _attention_op.fused(
        q, k, v, block_size=block_size, clean_causal="block", scale=0.25, cu_seqlens=None,
        query=query,
    )  # fmt: skip


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
    f = lambda q, k, v: call(q.sin(), k, v, block_size=3).square().sum()
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
