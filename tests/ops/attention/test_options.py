"""doubled_attention with the options that not every layer needs."""

import itertools

import pytest
import torch
from attention_tools import IMPLS as FUSED
from attention_tools import ON_GPU, check, composed_dtype, problems, run, tensors
from hypothesis import given, settings

from dblocks.functional import doubled_attention
from dblocks.kernels import reference
from dblocks.ops._attention import chunks
from tools import DEVICE, op

IMPLS = ("reference", *FUSED)
ORDERS = ("clean_noisy", "noisy_clean")
composed_on_cpu = pytest.mark.skipif(ON_GPU, reason="composed on the CPU only")


def ints(*rows):
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


@composed_on_cpu
@given(problem=problems("composed", extra=True))
@settings(max_examples=150)
def test_composed_is_within_budget(problem):
    check("composed", *problem)


@composed_on_cpu
@given(problem=problems("composed", extra=True))
def test_many_chunks_are_within_budget(problem):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", 4)
        check("composed", *problem)


@given(problem=problems("triton", extra=True))
@settings(max_examples=8)
def test_triton_is_within_budget(problem):
    check("triton", *problem)


def written_out(T, size, causal, order, window, start, end):
    """The mask, pair by pair."""
    mask = torch.zeros(2 * T, 2 * T, dtype=torch.bool)
    clean, noisy = (0, T) if order == "clean_noisy" else (T, 0)
    for i, j in itertools.product(range(start, end), repeat=2):
        near = window is None or i - j < window
        block_i, block_j = (i - start) // size, (j - start) // size
        sees = j <= i if causal == "token" else block_j <= block_i
        mask[clean + i, clean + j] = near and sees
        mask[noisy + i, clean + j] = near and block_j < block_i
        mask[noisy + i, noisy + j] = near and block_j == block_i
    return mask


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", ["block", "token"])
def test_the_mask_is_that_of_the_definition(order, causal):
    T, ranges = 7, [[0, 7], [2, 5], [3, 3], [0, 4], [6, 7]]
    for size, window in itertools.product((1, 2, 3, 9), (None, 1, 2, 4, 9)):
        given = {"block_size": size, "clean_causal": causal, "order": order, "window": window}
        masks = reference.doubled_mask(T, **given, valid=torch.tensor(ranges, dtype=torch.int32))
        for mask, (start, end) in zip(masks, ranges, strict=True):
            assert torch.equal(mask, written_out(T, size, causal, order, window, start, end))
        assert torch.equal(reference.doubled_mask(T, **given), masks[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_are_bounded_then_biased_then_masked(impl):
    T, cap = 33, 2.0
    q, k, v = tensors(N=2, T=T, dtype=composed_dtype())
    slopes = torch.tensor([[0.5, 0.1], [0.0, 2.0]], device=DEVICE)
    got = doubled_attention(q, k, v, softcap=cap, alibi_slopes=slopes, scale=0.7, impl=impl)
    for n, h, i in itertools.product(range(2), range(2), range(2 * T)):
        keys = [*range(i + 1)] if i < T else [*range(i - T), i]
        scores = cap * torch.tanh(k[n, h, keys].double() @ q[n, h, i].double() * 0.7 / cap)
        distance = torch.tensor([i % T - j % T for j in keys], device=DEVICE)
        p = (scores - slopes[n, h].double() * distance).softmax(0)
        expected = p @ v[n, h, keys].double()
        torch.testing.assert_close(got[n, h, i].double(), expected, rtol=2e-3, atol=1e-5)


def halves_swapped(x):
    return x.roll(x.shape[2] // 2, 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 3])
def test_the_order_moves_rows_and_nothing_else(impl, size):
    inputs = tensors(N=2, H=4, T=35, dtype=composed_dtype())
    upstream = torch.randn_like(inputs[0])
    expected = run(impl, inputs, upstream, {"block_size": size})
    swapped = [halves_swapped(x) for x in (*inputs, upstream)]
    got = run(impl, swapped[:3], swapped[3], {"block_size": size, "order": "noisy_clean"})
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(halves_swapped(a), b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 2.0}, {"block_size": 4}])
@pytest.mark.skipif(ON_GPU, reason="padding is composed on the CPU only")
def test_padding_is_as_if_it_were_cut_off(impl, order, options):
    T, ranges = 33, [[0, 33], [4, 29], [0, 29], [0, 29], [7, 7], [32, 33]]
    N = len(ranges)
    inputs = tensors(N=N, H=4, T=T)
    upstream = torch.randn_like(inputs[0])
    given = {"order": order, **options}
    got = run(impl, inputs, upstream, given | {"valid": ints(*ranges)})
    for n, (start, end) in enumerate(ranges):
        rows = torch.cat([torch.arange(start, end), torch.arange(T + start, T + end)])
        cut = [x[n : n + 1, :, rows] for x in (*inputs, upstream)]
        for a, b in zip(got, run(impl, cut[:3], cut[3], given), strict=True):
            torch.testing.assert_close(a[n : n + 1, :, rows], b)
            assert a[n].count_nonzero() == a[n, :, rows].count_nonzero()  # 0 elsewhere


@pytest.mark.parametrize("impl", IMPLS)
def test_noisy_rows_alone_are_half_of_the_result(impl):
    T = 34
    q, k, v = tensors(N=2, H=4, T=T, dtype=composed_dtype())
    for order, size in itertools.product(ORDERS, (1, 3)):
        given = {"block_size": size, "order": order, "window": 9, "impl": impl}
        rows = slice(T, None) if order == "clean_noisy" else slice(T)
        both = doubled_attention(q, k, v, **given)
        noisy = doubled_attention(q[:, :, rows], k, v, **given, query="noisy")
        torch.testing.assert_close(noisy, both[:, :, rows])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_window_of_the_whole_sequence_is_none(impl):
    q, k, v = tensors(T=35, dtype=composed_dtype())
    wide, none = (doubled_attention(q, k, v, window=w, impl=impl) for w in (35, None))
    torch.testing.assert_close(wide, none)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 3])
def test_negative_scales_mirror_the_queries(impl, size):
    q, k, v = tensors(T=40, dtype=composed_dtype())
    upstream = torch.randn_like(q)
    got = run(impl, (q, k, v), upstream, {"scale": -0.5, "block_size": size})
    expected = run(impl, (-q, k, v), upstream, {"scale": 0.5, "block_size": size})
    expected[1] = -expected[1]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    mean = doubled_attention(q, k, v, scale=0, impl=impl)[:, :, 39]
    torch.testing.assert_close(mean, v[:, :, :40].float().mean(2).to(v.dtype))


OPTIONS = {
    "valid": {"valid": torch.tensor([[0, 6], [2, 5]], dtype=torch.int32)},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 1.0]), "order": "noisy_clean"},
    "window": {"window": 2, "softcap": 3.0, "scale": -0.5},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPTIONS)
def test_compiles_to_one_graph(impl, name):
    if impl == "composed" and ON_GPU:
        pytest.skip("composed on the CPU only")
    torch._dynamo.reset()
    given = {
        n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in OPTIONS[name].items()
    }
    call = lambda q, k, v: doubled_attention(q, k, v, **given, impl=impl)
    leaves = [x.requires_grad_() for x in tensors(N=2, dtype=composed_dtype())]
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    expected = call(*leaves)
    torch.testing.assert_close(got, expected)
    grads = (torch.autograd.grad(o.square().sum(), leaves) for o in (got, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@composed_on_cpu
@pytest.mark.parametrize("name", OPTIONS)
def test_opcheck(name):
    q, k, _ = tensors(N=2)
    v = torch.randn(2, 2, 12, 24)
    given = OPTIONS[name]
    get = given.get
    options = (
        2, True, 0.25, None, False, get("order") == "noisy_clean", get("valid"), get("window"),
        get("softcap"), get("alibi_slopes"), "sdpa",
    )  # fmt: skip
    forward, backward = (op(f"doubled_attention_{d}", "composed") for d in ("fwd", "bwd"))
    torch.library.opcheck(forward, (q, k, v, *options))
    o, lse = forward(q, k, v, *options)
    needs = [True, True]  # of q, and of k and v
    torch.library.opcheck(backward, (torch.ones_like(o), q, k, v, o, lse, *options, needs))
    _, expected = reference.doubled_attention(
        q, k, v, **given | {"block_size": 2, "clean_causal": "token", "scale": 0.25}
    )
    torch.testing.assert_close(lse, expected)


@composed_on_cpu
def test_a_far_key_that_is_left_out_changes_nothing():
    """Beside a bias of -1,000 nothing of a key is left in float32, but for infinite values."""
    T = 80
    q, k, v = tensors(T=T, H=1, heads=1)
    options = {"alibi_slopes": torch.tensor([50.0]), "window": T - 1}
    upstream = torch.randn_like(q)
    got = run("composed", (q, k, v), upstream, options)
    expected = run("reference", (q, k, v), upstream, options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
