import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dblocks.ops import _chunked_cross_entropy as chunked
from dblocks.ops.linear_cross_entropy import linear_cross_entropy
from dblocks.testing import DTYPES, LAYOUTS, assert_within_budget, check_against_reference, make
from tools import op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = ("chunked", "triton")
IMPLS = ("reference", *FUSED)
IGNORE = -100


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of a quarter of the rows, however few these are."""
    monkeypatch.setattr(chunked, "MIN_ROWS", 1)
    monkeypatch.setattr(chunked, "MIN_LOGITS", 1)


def problem(R=10, V=7, D=6, dtype=torch.float32):
    """h, weight and target; a few targets are ignored."""
    h = torch.randn(R, D, device=DEVICE).to(dtype)
    weight = (torch.randn(V, D, device=DEVICE) * D**-0.5).to(dtype)
    target = torch.randint(0, V, (R,), device=DEVICE)
    target[::4] = IGNORE
    return h, weight, target


def loss_and_grads(impl, h, weight, target, bias=None, upstream=1.0, **options):
    leaves = [x.detach().requires_grad_() for x in (h, weight, bias) if x is not None]
    bias = leaves[2] if bias is not None else None
    loss = linear_cross_entropy(*leaves[:2], target, bias=bias, impl=impl, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream))]


@st.composite
def problems(draw, dtypes=DTYPES):
    """Inputs, target, upstream gradient, ignore_index, and what needs a gradient."""
    N, T = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 5, 13]))
    D, V = draw(st.sampled_from([3, 4, 8, 20])), draw(st.sampled_from([1, 5, 16, 33, 103]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lead = draw(st.sampled_from([(N, T), (N * T,)]))

    def tensor(*shape, layouts=LAYOUTS, dtypes=dtypes):
        layout = draw(st.sampled_from(layouts)) if len(shape) > 1 else "contiguous"
        return make(shape, layout, draw(st.sampled_from(dtypes)), generator, device=DEVICE)

    # Equal rows of the weight leave rounding errors alone in the gradient of h.
    distinct = [layout for layout in LAYOUTS if layout != "expanded"]
    inputs = {"h": tensor(*lead, D)}
    # Arithmetic is float32 unless h is float64: a budget in float64's eps would be of another op.
    others = dtypes if inputs["h"].dtype == torch.float64 else DTYPES
    inputs["weight"] = tensor(V, D, layouts=distinct, dtypes=others)
    # The products take it so; what the reference rounds once more on the way back is not ours.
    inputs["weight"].copy_(inputs["weight"].to(inputs["h"].dtype))
    if draw(st.booleans()):
        inputs["bias"] = tensor(V, dtypes=others)
    if draw(st.booleans()):
        inputs["row_weight"] = torch.rand(lead, generator=generator).to(DEVICE) * 3
    ignore_index = draw(st.sampled_from([IGNORE, 0, V + 5]))
    target = torch.randint(0, V, lead, generator=generator)
    ignored = torch.rand(lead, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    target = target.masked_fill(ignored, ignore_index).to(DEVICE)
    names = [k for k in ("h", "weight", "bias") if k in inputs]
    needs = draw(st.lists(st.sampled_from(names), unique=True))
    upstream = torch.tensor(draw(st.sampled_from([1.0, -3.0, 0.01, 0.0])), device=DEVICE)
    options = {"ignore_index": ignore_index, "reduction": draw(st.sampled_from(["mean", "none"]))}
    if options["reduction"] == "none":
        rows = torch.randn(lead, generator=generator).to(DEVICE)
        upstream = upstream.expand(lead) if draw(st.booleans()) else upstream * rows
    return inputs, target, upstream, options, needs


def check(impl, problem):
    inputs, target, upstream, options, needs = problem
    # With a certain target the loss is a rounding error, in any implementation, so logits are
    # about normal. Powers of two round nothing.
    scale = 2.0 ** -round(math.log2(inputs["h"].shape[-1]) / 2)

    def call(impl, h, weight, **others):
        return [linear_cross_entropy(h * scale, weight, target, **others, **options, impl=impl)]

    check_against_reference(call, inputs, [upstream], impl=impl, needs_grad=needs)


@pytest.mark.parametrize("impl", FUSED)
@given(problem=problems())
def test_loss_and_gradients_are_within_budget(impl, problem):
    check(impl, problem)


@given(problem=problems(dtypes=(*DTYPES, torch.float64)))
def test_float64_is_taken_in_chunks(problem):
    check("chunked", problem)


def test_the_reference_is_pytorch_s():
    h, weight, target = problem(dtype=torch.float64)
    bias, row_weight = torch.randn(7, device=DEVICE).double(), torch.rand(10, device=DEVICE)
    ce = F.cross_entropy(F.linear(h, weight, bias), target, reduction="none", ignore_index=IGNORE)
    expected = (row_weight.double() * ce).sum() / (target != IGNORE).sum()
    options = {"bias": bias, "row_weight": row_weight, "impl": "reference"}
    torch.testing.assert_close(linear_cross_entropy(h, weight, target, **options), expected)
    leaves = [x.requires_grad_() for x in (h, weight, bias)]
    call = lambda h, weight, bias: linear_cross_entropy(
        h, weight, target, bias=bias, row_weight=row_weight, impl="reference"
    )
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [2047, 2048, 4099])
def test_several_blocks_of_classes(monkeypatch, impl, dtype, V):
    # In products of few rows the order of the sums may be worse than in those of the reference.
    monkeypatch.setattr(chunked, "MIN_ROWS", 9)
    h, weight, target = problem(9, V, 12, dtype)
    bias = torch.randn(V, device=DEVICE)
    got, eager = (loss_and_grads(i, h, weight, target, bias) for i in (impl, "reference"))
    wide = [x.double() for x in (h, weight)]
    ref64 = loss_and_grads("reference", *wide, target, bias.double())
    for name, g, r, e in zip(("loss", "dh", "dweight", "dbias"), got, ref64, eager, strict=True):
        assert_within_budget(g, r, e, name)


@pytest.mark.parametrize("impl", IMPLS)
def test_products_take_the_dtype_of_h(impl):
    h, weight, target = problem()
    narrow = weight.bfloat16()
    got = loss_and_grads(impl, h.bfloat16(), weight, target)
    expected = loss_and_grads(impl, h.bfloat16(), narrow, target)
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.float32]
    assert all(torch.equal(g, e) for g, e in zip(got[:2], expected[:2], strict=True))
    assert torch.equal(got[2].bfloat16(), expected[2])
    wide = loss_and_grads(impl, h, narrow, target)
    assert torch.equal(wide[0], loss_and_grads(impl, h, narrow.float(), target)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_row_weight_gets_no_gradient(impl):
    h, weight, target = problem()
    row_weight = torch.rand(10, device=DEVICE, requires_grad=True)
    h.requires_grad_()
    linear_cross_entropy(h, weight, target, row_weight=row_weight, impl=impl).backward()
    assert h.grad is not None
    assert row_weight.grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_losses_of_rows_sum_to_the_mean_times_the_count(impl):
    h, weight, target = problem()
    target[1] = IGNORE
    row_weight = torch.randn(len(h), device=DEVICE)
    rows, mean = (
        linear_cross_entropy(h, weight, target, row_weight=row_weight, reduction=r, impl=impl)
        for r in ("none", "mean")
    )
    assert rows.shape == target.shape
    assert rows[1] == 0
    torch.testing.assert_close(rows.sum() / (target != IGNORE).sum(), mean)


@pytest.mark.parametrize("impl", IMPLS)
def test_losses_of_rows_without_a_part_are_zero(impl):
    h, weight, target = problem()
    h[1] = float("nan")
    h.requires_grad_()
    weights = torch.ones(len(h), device=DEVICE)
    weights[1] = 0
    rows = linear_cross_entropy(h, weight, target, row_weight=weights, reduction="none", impl=impl)
    rows.sum().backward()
    assert rows[1] == 0
    assert not h.grad[1].any()
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_are_not_normalised(impl):
    h, weight, target = problem()
    loss = linear_cross_entropy(h, weight, target, impl=impl)
    twice = torch.full((10,), 2.0, device=DEVICE)
    doubled = linear_cross_entropy(h, weight, target, row_weight=twice, impl=impl)
    assert torch.equal(doubled, 2 * loss)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_without_a_part_may_hold_anything(impl, value):
    h, weight, target = problem()
    row_weight = torch.rand(10, device=DEVICE)
    row_weight[3] = 0
    expected = loss_and_grads(impl, h, weight, target, row_weight=row_weight)
    h[3] = h[4] = value  # of weight 0, ignored
    row_weight[4] = value
    got = loss_and_grads(impl, h, weight, target, row_weight=row_weight)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("R", [0, 5])
def test_no_row_counts(impl, R):
    h, weight, target = problem(R)
    target.fill_(IGNORE)
    bias = torch.randn(7, device=DEVICE)
    loss, *grads = loss_and_grads(impl, h, weight, target, bias)
    assert loss == 0
    assert [g.shape for g in grads] == [h.shape, weight.shape, bias.shape]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_single_row_and_no_width(impl):
    h, weight, _ = problem()
    one = linear_cross_entropy(h[0], weight, torch.tensor(2, device=DEVICE), impl=impl)
    rows = linear_cross_entropy(h[:1], weight, torch.tensor([2], device=DEVICE), impl=impl)
    assert torch.equal(one, rows)
    target = torch.tensor([1, 6], device=DEVICE)
    loss = linear_cross_entropy(h[:2, :0], weight[:, :0], target, impl=impl)
    torch.testing.assert_close(loss, torch.tensor(7.0, device=DEVICE).log())


@pytest.mark.parametrize("impl", IMPLS)
def test_classes_may_be_ruled_out_and_logits_be_large(impl):
    h, weight, target = problem()
    bias = torch.zeros(7, device=DEVICE)
    bias[target[1] - 1] = -torch.inf
    target = target.where(target != target[1] - 1, target[1])
    target = target.where(target != 6 + 7 * (target[1] == 0), target[1])
    for scale in (1.0, 1e4):
        got = loss_and_grads(impl, h * scale, weight, target, bias)
        ref64 = loss_and_grads(
            "reference", h.double() * scale, weight.double(), target, bias.double()
        )
        eager = loss_and_grads("reference", h * scale, weight, target, bias)
        for g, r, e in zip(got, ref64, eager, strict=True):
            assert_within_budget(g, r, e)


@pytest.mark.parametrize("impl", FUSED)
def test_float16_with_great_weights_and_a_great_upstream_gradient(impl):
    h, weight, target = problem(dtype=torch.float16)
    row_weight = torch.full((10,), 250_004.0, device=DEVICE)  # the EDM weight at sigma 0.002
    for factor in (1e-5, 0.1):
        options = {"row_weight": row_weight, "upstream": factor}
        got, eager = (loss_and_grads(i, h, weight, target, **options) for i in (impl, "reference"))
        ref64 = loss_and_grads("reference", h.double(), weight.double(), target, **options)
        for g, r, e in zip(got, ref64, eager, strict=True):
            assert_within_budget(g, r, e)
    # A scaled loss, whose gradients before the scale are too small for float16.
    small, scale = torch.full((10,), 2.0**-20, device=DEVICE), 2.0**20
    got = loss_and_grads(impl, h, weight, target, row_weight=small, upstream=scale)
    plain = loss_and_grads(impl, h, weight, target)
    for g, e in zip(got[1:], plain[1:], strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("impl", FUSED)
def test_an_expanded_weight_is_as_its_copy(impl):
    h, weight, target = problem()
    expanded = weight[:1].expand(7, 6)
    got, expected = (loss_and_grads(impl, h, w, target) for w in (expanded, expanded.clone()))
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_are_equal_bit_for_bit(impl):
    h, weight, target = problem(64, 103, 24)
    first, second = (loss_and_grads(impl, h, weight, target) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", FUSED)
def test_a_kept_graph_gives_its_gradients_again(impl):
    h, weight, target = problem()
    leaves = [h.requires_grad_(), weight.requires_grad_()]
    loss = linear_cross_entropy(*leaves, target, impl=impl)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    expected = [g.clone() for g in first]
    for g in first:
        g.zero_()  # as optimizers do
    twice = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    last = torch.autograd.grad(loss, leaves)
    for e, t, g in zip(expected, twice, last, strict=True):
        assert torch.equal(2 * e, t)
        assert torch.equal(e, g)


@pytest.mark.parametrize("impl", FUSED)
def test_batched_upstream_gradients(impl):
    h, weight, target = problem()
    h.requires_grad_()
    loss = linear_cross_entropy(h, weight, target, impl=impl)
    upstream = torch.tensor([1.0, -2.0], device=DEVICE)
    (both,) = torch.autograd.grad(loss, h, upstream, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(loss, h)
    torch.testing.assert_close(both, torch.stack([one, -2 * one]))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_has_no_effect(impl):
    h, weight, target = problem()
    h.requires_grad_()
    plain = linear_cross_entropy(h, weight, target, impl=impl)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = linear_cross_entropy(h, weight, target, impl=impl)
    assert torch.equal(plain, cast)
    assert torch.equal(*(torch.autograd.grad(loss, h)[0] for loss in (plain, cast)))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("needs", [[False] * 3, [True] * 3, [False, True, False]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(impl, needs, dtype):
    h, weight, target = problem(dtype=dtype)
    bias, row_weight = torch.randn(7, device=DEVICE), torch.rand(10, device=DEVICE)
    for name in ("linear_cross_entropy", "linear_cross_entropy_again"):
        registered = op(name, impl)
        torch.library.opcheck(registered, (h, weight, target, bias, row_weight, IGNORE, needs))
        torch.library.opcheck(registered, (h, weight, target, None, None, IGNORE, needs))


@pytest.mark.parametrize("impl", IMPLS)
def test_losses_of_rows_compile_to_one_graph(impl):
    torch._dynamo.reset()
    h, weight, target = problem()
    h.requires_grad_()

    def call(h):
        return linear_cross_entropy(h, weight, target, reduction="none", impl=impl).square().sum()

    graph = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(graph(h), h), torch.autograd.grad(call(h), h))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiles_to_one_graph(impl, dtype):
    torch._dynamo.reset()
    h, weight, target = problem(dtype=dtype)
    leaves = [h.requires_grad_(), weight.requires_grad_()]
    call = lambda h, weight, target: linear_cross_entropy(h, weight, target, impl=impl)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*leaves, target), call(*leaves, target)
    torch.testing.assert_close(got, expected)
    grads = (torch.autograd.grad(3 * loss, leaves) for loss in (got, expected))
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*leaves, target), expected.detach())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Inductor's own deprecations
def test_compiles_with_inductor():
    torch._dynamo.reset()
    h, weight, target = problem()
    leaves = [h.requires_grad_(), weight.requires_grad_()]
    loss = torch.compile(linear_cross_entropy, fullgraph=True)(*leaves, target)
    grads = torch.autograd.grad(3 * loss, leaves)
    expected = loss_and_grads("auto", h, weight, target, upstream=3.0)
    torch.testing.assert_close([loss.detach(), *grads], expected)


@pytest.mark.filterwarnings("default")  # of torch.func itself
def test_transforms_use_the_reference():
    h, weight, target = problem()
    f = lambda h, target=target: linear_cross_entropy(h, weight, target)
    tangent = torch.randn_like(h)
    loss, derivative = torch.func.jvp(f, (h,), (tangent,))
    _, grad, _ = loss_and_grads("reference", h, weight, target)
    torch.testing.assert_close(loss, f(h))
    torch.testing.assert_close(derivative, (grad * tangent).sum())
    each = torch.vmap(lambda h, t: f(h, t))(h[1:4, None], target[1:4, None])
    torch.testing.assert_close(each.mean(), f(h[1:4], target[1:4]))
