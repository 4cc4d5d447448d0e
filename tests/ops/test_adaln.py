import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dblocks.functional import adaln
from dblocks.kernels._common import launches
from dblocks.ops import _dispatch
from dblocks.testing import (
    LAYOUTS,
    assert_within_budget,
    check_against_reference,
    grads_of,
    make,
    token_problems,
)
from tools import FUSED, IMPLS, op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


NORMS = st.sampled_from(["layer", "rms"])


# Where the norm leaves no direction free, dx is rounding error alone, and no budget fits it.
DEGENERATE_WIDTH = {"layer": 2, "rms": 1}


def problems(max_rows=64):
    return token_problems(
        ("x",), ("shift", "scale"), ("weight", "bias"),
        required=("x",), outputs=1, max_rows=max_rows, device=DEVICE,
    )  # fmt: skip


def call(*, impl, x, shift=None, scale=None, **options):
    return [adaln(x, shift, scale, impl=impl, **options)]


@pytest.mark.parametrize("impl", IMPLS)
@given(problem=problems(), norm=NORMS, data=st.data())
def test_forward_and_gradients_are_within_budget(impl, problem, norm, data):
    inputs, upstream = problem
    assume(inputs["x"].shape[-1] != DEGENERATE_WIDTH[norm])
    needed = data.draw(st.lists(st.sampled_from(list(inputs)), unique=True))
    check_against_reference(
        lambda **k: call(norm=norm, **k), inputs, upstream, impl=impl, needs_grad=needed
    )


@pytest.mark.parametrize("impl", FUSED)
@given(problem=problems(), norm=NORMS)
def test_every_gradient_at_once(impl, problem, norm):
    inputs, upstream = problem
    assume(inputs["x"].shape[-1] != DEGENERATE_WIDTH[norm])
    check_against_reference(lambda **k: call(norm=norm, **k), inputs, upstream, impl=impl)


@given(problem=problems(max_rows=24), norm=NORMS)
def test_second_form_for_wide_rows(problem, norm):
    inputs, upstream = problem
    assume(inputs["x"].shape[-1] != DEGENERATE_WIDTH[norm])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "MAX_ONE_PASS_WIDTH", 0)
        patch.setattr(_dispatch, "_plans", {})
        check_against_reference(lambda **k: call(norm=norm, **k), inputs, upstream, impl="triton")


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("D", [257, 8193])
def test_widths_above_one_tile(impl, D):
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": make((2, 3, D), "contiguous", torch.float32, generator, device=DEVICE),
        "scale": make((2, D), "chunk", torch.float32, generator, device=DEVICE),
        "weight": make((D,), "contiguous", torch.float32, generator, device=DEVICE),
    }
    upstream = make((2, 3, D), "contiguous", torch.float32, generator, device=DEVICE)
    check_against_reference(call, inputs, [upstream], impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ratio", [10, 100, 1000])
def test_variance_survives_a_large_mean(impl, ratio):
    x = (torch.randn(2, 4, 48, generator=torch.Generator().manual_seed(0)) + ratio).to(DEVICE)
    y = adaln(x, None, None, impl=impl)
    expected = torch.nn.functional.layer_norm(x.double(), (48,), eps=1e-6)
    # x itself is exact, so only the mean's rounding, ratio * 2^-24, may show.
    assert (y - expected).abs().max() < 4 * ratio * 2**-23


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("D", [7, 96, 768, 1000])
def test_equal_elements_have_zero_std(impl, D):
    values = torch.arange(1, 17, device=DEVICE).view(2, 8, 1) * torch.tensor(77.7, device=DEVICE)
    for x in (values.expand(2, 8, D), values.repeat(1, 1, D), values.repeat(1, 1, D).bfloat16()):
        y = adaln(x, None, None, impl=impl)
        assert torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("impl", FUSED)
def test_width_one_has_no_gradient_to_x(impl):
    x = torch.randn(3, 5, 1, device=DEVICE, requires_grad=True)
    scale = torch.randn(3, 1, device=DEVICE)
    adaln(x, None, scale, weight=torch.full((1,), 0.3, device=DEVICE), impl=impl).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", DEGENERATE_WIDTH)
def test_degenerate_widths_err_by_rounding_only(impl, norm):
    x = torch.randn(3, 8, DEGENERATE_WIDTH[norm], device=DEVICE)
    dy = torch.randn_like(x)
    (dx,) = grads_of(call(impl=impl, x=x.requires_grad_(), norm=norm), [x], [dy])
    x64 = x.detach().double().requires_grad_()
    (ref64,) = grads_of(call(impl="reference", x=x64, norm=norm), [x64], [dy])
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    rstd = centred.square().mean(-1, keepdim=True).rsqrt()
    # Terms of size dy * rstd cancel; xhat itself carries the rounding of the mean, eps * x * rstd.
    cancelling = (
        dy.abs().amax(-1, keepdim=True) * rstd * (1 + x.abs().amax(-1, keepdim=True) * rstd)
    )
    assert ((dx - ref64).abs() <= 8 * 2**-23 * cancelling).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("S", [1, 2, 6])
def test_each_modulation_reaches_its_own_rows_only(impl, S):
    N, T, D = 3, 6, 5
    x = torch.randn(N, T, D, device=DEVICE)
    scale = torch.randn(N, S, D, device=DEVICE)
    changed = scale.clone()
    changed[1, S - 1] += 1
    differs = (adaln(x, None, scale, impl=impl) != adaln(x, None, changed, impl=impl)).any(-1)
    expected = torch.zeros(N, T, dtype=torch.bool)
    expected[1, T - T // S :] = True
    assert torch.equal(differs.cpu(), expected)


@pytest.mark.parametrize("impl", FUSED)
@given(problem=problems(), norm=NORMS)
def test_two_runs_agree_bit_for_bit(impl, problem, norm):
    inputs, upstream = problem

    def run():
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        y = call(impl=impl, norm=norm, **leaves)[0]
        return [y, *torch.autograd.grad(y, list(leaves.values()), upstream[0].to(y.dtype))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gradcheck_of_the_reference(norm):
    shapes = ((2, 4, 5), (2, 2, 5), (2, 2, 5), (5,), (5,))
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def f(x, shift, scale, weight, bias):
        return adaln(x, shift, scale, weight=weight, bias=bias, norm=norm)

    assert torch.autograd.gradcheck(f, tensors)


@pytest.mark.parametrize("impl", FUSED)
def test_opcheck(impl):
    x, shift, scale = (torch.randn(s, device=DEVICE) for s in ((2, 4, 8), (2, 8), (2, 8)))
    forward = (x, None, None, shift, scale, None, None, True, False, 1e-6, torch.bfloat16)
    torch.library.opcheck(op("adaln_fwd", impl), forward)
    _, y, mean, rstd = op("adaln_fwd", impl)(*forward)
    needs = [True, False, False, True, True, False, False]
    backward = (y, None, x, None, None, shift, scale, None, None, mean, rstd, False, needs)
    torch.library.opcheck(op("adaln_bwd", impl), backward)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("default")  # Inductor's own deprecations
def test_compiles_to_one_graph(impl, backend):
    x, scale = torch.randn(2, 4, 8, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    leaves = [a.requires_grad_() for a in (x, scale)]
    f = lambda x, scale: adaln(x.sin(), None, scale, impl=impl).square().sum()
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend=backend)
    expected = torch.autograd.grad(f(*leaves), leaves)
    got = torch.autograd.grad(compiled(*leaves), leaves)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_empty(impl, shape):
    N, _, D = shape
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    scale = torch.randn(N, D, device=DEVICE, requires_grad=True)
    weight = torch.randn(D, device=DEVICE, requires_grad=True)
    y = adaln(x, None, scale, weight=weight, impl=impl)
    y.sum().backward()
    assert y.shape == shape
    assert x.grad.shape == shape
    assert torch.equal(scale.grad, torch.zeros(N, D, device=DEVICE))
    assert torch.equal(weight.grad, torch.zeros(D, device=DEVICE))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens_have_a_modulation_each(impl):
    x, scale = (torch.randn(2, 0, 4, device=DEVICE, requires_grad=True) for _ in range(2))
    y = adaln(x, None, scale, impl=impl)
    y.sum().backward()
    assert y.shape == x.grad.shape == scale.grad.shape == (2, 0, 4)


@pytest.mark.parametrize("impl", IMPLS)
def test_out_dtype_and_autocast(impl):
    x, scale = torch.randn(2, 4, 8, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    plain = adaln(x, None, scale, impl=impl)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(adaln(x, None, scale, impl=impl), plain)
    narrow = adaln(x, None, scale, out_dtype=torch.bfloat16, impl=impl)
    assert_within_budget(narrow, plain.double(), plain.bfloat16())


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_upstream_gradient(impl):
    x = torch.randn(2, 4, 8, device=DEVICE, requires_grad=True)
    y = adaln(x, None, None, impl=impl)
    (expanded,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (full,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(expanded, full)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_a_last_stride_other_than_one_is_copied(layout):
    x = make((3, 4, 8), layout, torch.float32, torch.Generator())
    assert (launches.unit_last(x) is x) == (layout != "transposed")


@pytest.mark.parametrize("impl", FUSED)
def test_offsets_beyond_int32(impl):
    step = 2**31 + 8
    # Zeroed lazily by the system: only the pages of the two samples are ever touched.
    storage = torch.from_numpy(np.zeros(step + 64, dtype=np.int16)).view(torch.bfloat16)
    x = storage.as_strided((2, 2, 8), (step, 8, 1))
    x.copy_(torch.randn(2, 2, 8))
    y = adaln(x.to(DEVICE) if DEVICE.type == "cuda" else x, None, None, impl=impl)
    assert torch.equal(y.cpu(), adaln(x.contiguous().to(DEVICE), None, None, impl=impl).cpu())


X = torch.randn(2, 6, 4)
M = torch.randn(2, 4)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"x must have shape \[N, T, D\], got \[2, 4\]", {"x": M}),
        (ValueError, r"scale must have shape \[N, D\] = \[2, 4\] or", {"scale": M[:, :3]}),
        (ValueError, r"shift must have shape .* got \[1, 4\]", {"shift": M[:1]}),
        (ValueError, r"divides T = 6, got S = 4", {"scale": torch.randn(2, 4, 4)}),
        (
            ValueError,
            r"scale must have as many segments as shift, 1, got 2",
            {"shift": M, "scale": torch.randn(2, 2, 4)},
        ),
        (ValueError, r"weight must have shape \[D\] = \[4\], got \[3\]", {"weight": M[0, :3]}),
        (ValueError, r"bias must have shape \[D\] = \[4\], got \[2, 4\]", {"bias": M}),
        (ValueError, r"norm must be 'layer' or 'rms', got 'batch'", {"norm": "batch"}),
        (ValueError, r"eps must be a number >= 0, got nan", {"eps": float("nan")}),
        (TypeError, r"eps must be a real number, got str", {"eps": "1e-6"}),
        (TypeError, r"eps must be a real number, got torch.Tensor", {"eps": torch.tensor(1e-6)}),
        (TypeError, r"x must be a tensor, got numpy.ndarray; use", {"x": X.numpy()}),
        (TypeError, r"x must be a tensor, got NoneType", {"x": None}),
        (TypeError, r"x must be a dense tensor, got layout torch.sparse_coo", {"x": X.to_sparse()}),
        (
            TypeError,
            r"x must be a dense tensor, got a nested tensor",
            {"x": torch.nested.as_nested_tensor([M, M[:1]], layout=torch.jagged)},
        ),
        (TypeError, r"scale must be a tensor, got list", {"scale": [1.0]}),
        (ValueError, r"impl must be one of auto, .* got 'cuda'", {"impl": "cuda"}),
        (TypeError, r"x must be float64, .* got torch.int64", {"x": X.long()}),
        (TypeError, r"shift must be .* got torch.int32", {"shift": M.int()}),
        (TypeError, r"out_dtype must be .* got torch.int8", {"out_dtype": torch.int8}),
        (TypeError, r"takes float32, .* got float64", {"x": X.double(), "impl": "triton"}),
        (RuntimeError, r"scale must be on cpu .* got meta", {"scale": M.to("meta")}),
        (
            ValueError,
            r"takes D <= 16384, got D = 16385",
            {"x": torch.zeros(1, 1, 16385), "impl": "triton"},
        ),
        (
            ValueError,
            r"adaln: impl='triton' takes N \* T < 2143289344, got N \* T = 2143289344",
            {"x": torch.empty(511, 2**22, 1, device="meta"), "impl": "triton"},
        ),
    ],
)
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the same checks, with tensors on the CPU")
def test_bad_arguments(error, message, arguments):
    given = {"x": X, "shift": None, "scale": None} | arguments
    with pytest.raises(error, match=message):
        adaln(given.pop("x"), given.pop("shift"), given.pop("scale"), **given)
