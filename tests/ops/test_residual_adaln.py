import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from dblocks.functional import adaln, gated_residual, residual_adaln
from dblocks.kernels._common import launches
from dblocks.ops import _dispatch
from dblocks.testing import check_against_reference, token_problems
from tools import FUSED, IMPLS, op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NORMS = st.sampled_from(["layer", "rms"])


# Where the norm leaves no direction free, dx is rounding error alone, and no budget fits it.
DEGENERATE_WIDTH = {"layer": 2, "rms": 1}


def problems(max_rows=64):
    return token_problems(
        ("x", "branch"), ("gate", "shift", "scale"), ("weight", "bias"),
        required=("x", "branch"), outputs=2, max_rows=max_rows, device=DEVICE,
    )  # fmt: skip


def call(*, impl, x, branch, gate=None, shift=None, scale=None, **options):
    return residual_adaln(x, branch, gate, shift, scale, impl=impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
@given(problem=problems(), norm=NORMS, data=st.data())
def test_forward_and_gradients_are_within_budget(impl, problem, norm, data):
    inputs, upstream = problem
    assume(inputs["x"].shape[-1] != DEGENERATE_WIDTH[norm])
    needed = data.draw(st.lists(st.sampled_from(list(inputs)), unique=True))
    if upstream[0] is None and set(needed) <= {"x", "branch", "gate"}:
        upstream = [upstream[1], upstream[1]]
    if upstream[1] is None:
        needed = [n for n in needed if n in ("x", "branch", "gate")]
    check_against_reference(
        lambda **k: call(norm=norm, **k), inputs, upstream, impl=impl, needs_grad=needed
    )


@pytest.mark.parametrize("impl", FUSED)
@given(problem=problems(), norm=NORMS)
def test_every_gradient_at_once(impl, problem, norm):
    inputs, upstream = problem
    assume(inputs["x"].shape[-1] != DEGENERATE_WIDTH[norm])
    check_against_reference(lambda **k: call(norm=norm, **k), inputs, upstream, impl=impl)


@given(problem=problems(max_rows=24), norm=NORMS, data=st.data())
def test_second_form_for_wide_rows(problem, norm, data):
    inputs, upstream = problem
    assume(inputs["x"].shape[-1] != DEGENERATE_WIDTH[norm])
    needed = [name for name in inputs if data.draw(st.booleans()) or name == "branch"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "MAX_ONE_PASS_WIDTH", 0)
        patch.setattr(_dispatch, "_plans", {})
        check_against_reference(
            lambda **k: call(norm=norm, **k), inputs, upstream, impl="triton", needs_grad=needed
        )


@pytest.mark.parametrize("impl", FUSED)
@given(problem=problems(), norm=NORMS)
def test_two_runs_agree_bit_for_bit(impl, problem, norm):
    inputs, _ = problem

    def run():
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        out = call(impl=impl, norm=norm, **leaves)
        return [*out, *torch.autograd.grad([o.float().sum() for o in out], list(leaves.values()))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_gradients_are_exact_beside_a_16_bit_stream(impl, norm, dtype):
    x, d1 = (torch.randn(3, 4, 24, device=DEVICE).to(dtype) for _ in range(2))
    leaves = [
        torch.randn(s, device=DEVICE).requires_grad_() for s in [(3, 4, 24)] + 3 * [(3, 2, 24)]
    ]
    d2 = torch.randn(3, 4, 24, device=DEVICE)
    out = residual_adaln(x, *leaves, norm=norm, out_dtype=torch.float32, impl=impl)
    got = torch.autograd.grad(out, leaves, [d1, d2])
    # The same in float64, of a stream that is rounded to the same values.
    leaves64 = [a.detach().double().requires_grad_() for a in leaves]
    stream = gated_residual(x.double(), *leaves64[:2], impl="reference")
    rounded = stream + (out.x_new.double() - stream).detach()
    y = adaln(rounded, *leaves64[2:], norm=norm, impl="reference")
    expected = torch.autograd.grad([stream, y], leaves64, [d1.double(), d2.double()])
    for g, e in zip(got, expected, strict=True):
        assert (g - e).abs().max() <= 2e-6 * e.abs().max()


def test_a_stream_that_is_not_finite_is_rounded_as_any_other():
    x = torch.tensor([[[1.0, torch.inf, 3.0, -2.0]]], dtype=torch.bfloat16)
    branch = torch.full((1, 1, 4), 1 / 3)
    y = residual_adaln(x, branch, None, None, None, norm="rms", impl="reference").y
    assert y[..., 1].isnan().all()
    assert torch.equal(y[..., [0, 2, 3]].abs(), torch.zeros(1, 1, 3, dtype=x.dtype))


@pytest.mark.filterwarnings("default")  # PyTorch's own deprecations
def test_the_rounded_stream_of_the_reference_keeps_its_tangent():
    x = torch.randn(2, 3, 8, device=DEVICE, dtype=torch.bfloat16)
    branch, tangent = (torch.randn(2, 3, 8, device=DEVICE) for _ in range(2))

    def y(branch):
        options = {"out_dtype": torch.float32, "impl": "reference"}
        return residual_adaln(x, branch, None, None, None, **options).y

    def of_stream(x_new):
        return adaln(x_new, None, None, impl="reference")

    stream = gated_residual(x, branch, None, impl="reference").float()
    expected = torch.func.jvp(of_stream, (stream,), (tangent,))
    for got, e in zip(torch.func.jvp(y, (branch,), (tangent,)), expected, strict=True):
        torch.testing.assert_close(got, e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_gated_residual_and_its_adaln(impl, dtype):
    x, branch = (torch.randn(2, 6, 10, device=DEVICE).to(dtype) for _ in range(2))
    gate, shift, scale = torch.randn(2, 30, device=DEVICE).chunk(3, dim=-1)
    x_new, y = residual_adaln(x, branch, gate, shift, scale, impl=impl)
    assert torch.equal(x_new, gated_residual(x, branch, gate, impl=impl))
    assert torch.equal(y, adaln(x_new, shift, scale, impl=impl))


@pytest.mark.parametrize("impl", FUSED)
def test_saves_no_more_than_x_new_and_two_numbers_a_row(impl):
    x, branch = (torch.randn(2, 6, 10, device=DEVICE, requires_grad=True) for _ in range(2))
    modulation = torch.randn(2, 30, device=DEVICE, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda s: s):
        out = residual_adaln(x, branch, *modulation.detach().chunk(3, dim=-1), impl=impl)
    assert sum(t.numel() for t in saved if t.shape == x.shape) == x.numel()
    assert any(t.data_ptr() == out.x_new.data_ptr() for t in saved)
    assert sum(t.numel() for t in saved if t.shape == x.shape[:2]) == 2 * 2 * 6


@pytest.mark.parametrize("impl", IMPLS)
def test_x_new_needs_no_gradient_of_what_only_y_depends_on(impl):
    x, branch = (torch.randn(2, 6, 10, device=DEVICE) for _ in range(2))
    weight = torch.ones(10, device=DEVICE, requires_grad=True)
    out = residual_adaln(x, branch, None, None, None, weight=weight, impl=impl)
    assert not out.x_new.requires_grad
    assert out.y.requires_grad
    out.y.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_gradcheck_of_the_reference(norm):
    shapes = ((2, 4, 5), (2, 4, 5), (2, 2, 5), (2, 2, 5), (2, 2, 5), (5,), (5,))
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def f(x, branch, gate, shift, scale, weight, bias):
        return tuple(
            residual_adaln(x, branch, gate, shift, scale, weight=weight, bias=bias, norm=norm)
        )

    assert torch.autograd.gradcheck(f, tensors)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("needs", [[True] * 7, [False, True, False, True, False, False, True]])
def test_opcheck(impl, needs):
    x, branch = (torch.randn(2, 4, 8, device=DEVICE) for _ in range(2))
    gate, shift, scale, weight, bias = (
        *torch.randn(2, 24, device=DEVICE).chunk(3, dim=-1),
        *torch.randn(2, 8, device=DEVICE).unbind(0),
    )
    inputs = (branch, gate, shift, scale, weight, bias)
    forward = (x, *inputs, True, True, 1e-6, torch.float32)
    torch.library.opcheck(op("adaln_fwd", impl), forward)
    x_new, y, mean, rstd = op("adaln_fwd", impl)(*forward)
    backward = (y, x_new.clone(), x_new, *inputs, mean, rstd, True, needs)
    torch.library.opcheck(op("adaln_bwd", impl), backward)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("used", [0, 1])
def test_compiles_to_one_graph(impl, used):
    leaves = [
        torch.randn(s, device=DEVICE, requires_grad=True) for s in ((2, 4, 8), (2, 4, 8), (2, 24))
    ]

    def f(x, branch, modulation):
        return residual_adaln(x, branch, *modulation.chunk(3, -1), impl=impl)[used].square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(f(*leaves), leaves)
    for g, e in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_empty(impl, shape):
    x, branch = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2))
    gate = torch.randn(shape[0], shape[2], device=DEVICE, requires_grad=True)
    x_new, y = residual_adaln(x, branch, gate, None, None, impl=impl)
    (x_new.sum() + y.sum()).backward()
    assert x_new.shape == y.shape == branch.grad.shape == shape
    assert torch.equal(gate.grad, torch.zeros_like(gate))


X = torch.randn(2, 6, 4)
M = torch.randn(2, 4)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"x must have shape \[N, T, D\], got \[6, 4\]", {"x": X[0]}),
        (ValueError, r"branch must have the shape of x, \[2, 6, 4\], got", {"branch": X[:, :3]}),
        (ValueError, r"gate must have shape \[N, D\] = \[2, 4\]", {"gate": M[0]}),
        (ValueError, r"scale must have as many segments as gate", {"scale": X}),
        (ValueError, r"norm must be", {"norm": None}),
        (TypeError, r"branch must be a tensor, got float", {"branch": 1.0}),
        (TypeError, r"gate must be a tensor, got int", {"gate": 1}),
        (TypeError, r"branch must be .* got torch.int64", {"branch": X.long()}),
        (TypeError, r"out_dtype must be", {"out_dtype": torch.int32}),
        (RuntimeError, r"branch must be on cpu .* got meta", {"branch": X.to("meta")}),
    ],
)
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the same checks, with tensors on the CPU")
def test_bad_arguments(error, message, arguments):
    given = {"x": X, "branch": X, "gate": M, "shift": None, "scale": None} | arguments
    positional = [given.pop(name) for name in ("x", "branch", "gate", "shift", "scale")]
    with pytest.raises(error, match=message):
        residual_adaln(*positional, **given)
