import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dblocks.kernels import reference
from dblocks.ops.edm_loss import edm_loss
from dblocks.testing import DTYPES, LAYOUTS, check_against_reference, make, segment_counts
from tools import FUSED, IMPLS, op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEEDS = st.sampled_from([0, 1, -1, 2**40 + 3, -(2**63), 2**63 - 1])
OFFSETS = st.sampled_from([0, 1, 3, 4, 2**32 - 2, 2**33 + 5])


@st.composite
def problems(draw):
    """Inputs f, y, sigma and perhaps row_weight; the upstream gradient; the other arguments."""
    N, D = draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([1, 3, 4, 7, 8, 16, 40]))
    T = draw(st.sampled_from([1, 2, 6, 12]))
    image = draw(st.booleans())
    shape = (N, 2, 3, D) if image else (N, T, D)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    S = 0 if image else draw(st.one_of(st.just(0), segment_counts(T)))
    sigma = torch.exp(2 * torch.randn((N, S) if S else (N,), generator=generator)).to(DEVICE)

    def tensor():
        layout, dtype = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(DTYPES))
        return make(shape, layout, dtype, generator, device=DEVICE)

    inputs = {"f": tensor(), "y": tensor(), "sigma": sigma}
    weight = draw(st.sampled_from([None, (N,), None if image else (N, T)]))
    if weight is not None:
        inputs["row_weight"] = torch.rand(weight, generator=generator).to(DEVICE)
    upstream = [torch.randn(N, generator=generator).to(DEVICE)]
    seed = draw(SEEDS)
    options = {
        "seed": torch.tensor(seed, device=DEVICE) if draw(st.booleans()) else seed,
        "offset": draw(OFFSETS),
        "sigma_data": draw(st.sampled_from([0.5, 1.0])),
    }
    return inputs, upstream, options


def perfect_network(y, sigma, seed):
    """The output whose loss is 0, in float64."""
    eps = reference.normals(y.numel(), seed, 0, y.device).view(y.shape).double()
    s = sigma.double().view(-1, *(1,) * (y.ndim - 1))
    return (s / 0.5 * y.double() - 0.5 * eps) * torch.rsqrt(s**2 + 0.25)


@pytest.mark.parametrize("impl", IMPLS)
@given(problem=problems())
def test_forward_and_gradient_are_within_budget(impl, problem):
    inputs, upstream, options = problem
    call = lambda impl, f, y, sigma, row_weight=None: [
        edm_loss(f, y, sigma, **options, row_weight=row_weight, impl=impl)
    ]
    check_against_reference(call, inputs, upstream, impl=impl, needs_grad=["f"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sigma", [0.002, 0.02, 80.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_perfect_network_has_no_loss(impl, sigma, dtype):
    y = torch.randn(3, 5, 8, device=DEVICE)
    level = torch.full((3,), sigma, device=DEVICE)
    f = perfect_network(y, level, 4).to(dtype).requires_grad_()
    loss = edm_loss(f, y, level, 4, impl=impl)
    # What is left is the rounding of f: half an eps of values up to 6.
    assert (loss.sqrt() <= 3 * torch.finfo(dtype).eps + 2e-6).all()
    (grad,) = torch.autograd.grad(loss.sum(), f)
    assert grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_is_the_weighted_error_of_denoised(impl):
    y, f = torch.randn(2, 3, 5, 8, device=DEVICE, dtype=torch.float64).unbind()
    sigma = torch.tensor([0.1, 1.0, 20.0], device=DEVICE)
    s = sigma.double()[:, None, None]
    eps = reference.normals(y.numel(), 6, 0, DEVICE).view(y.shape)
    denoised = reference.edm_denoise(f, y + s * eps, sigma)
    weight = (s**2 + 0.25) / (s * 0.5) ** 2
    expected = (weight * (denoised - y) ** 2).mean((1, 2))
    got = edm_loss(f.float(), y.float(), sigma, 6, impl=impl)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("length", [4096, 5001])
def test_long_samples_repeat_bit_for_bit(impl, length):
    f, y = torch.randn(2, 2, length, device=DEVICE).unbind()
    sigma = torch.tensor([0.3, 3.0], device=DEVICE)
    inputs = {"f": f, "y": y, "sigma": sigma}
    call = lambda impl, f, y, sigma: [edm_loss(f, y, sigma, 2, impl=impl)]
    check_against_reference(call, inputs, [torch.ones(2, device=DEVICE)], impl=impl)
    assert torch.equal(call(impl, **inputs)[0], call(impl, **inputs)[0])
    alone = edm_loss(f[:1], y[:1], sigma[:1], 2, impl=impl)
    assert torch.equal(alone, call(impl, **inputs)[0][:1])


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8192), (2, 4097)])
def test_long_samples_of_every_dtype(impl, dtype, shape):
    f, y = torch.randn(2, *shape, device=DEVICE).to(dtype).unbind()
    sigma = torch.linspace(0.1, 5, shape[0], device=DEVICE)
    call = lambda impl, f, y, sigma: [edm_loss(f, y, sigma, 2, impl=impl)]
    upstream = [torch.linspace(0.3, 1.7, shape[0], device=DEVICE)]
    inputs = {"f": f, "y": y, "sigma": sigma}
    check_against_reference(call, inputs, upstream, impl=impl, needs_grad=["f"])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_difference_beyond_the_range_of_float16(impl):
    f = torch.full((1, 4), 60000.0, dtype=torch.float16, device=DEVICE, requires_grad=True)
    y, sigma = torch.full((1, 4), -60000.0, device=DEVICE), torch.ones(1, device=DEVICE)
    loss = edm_loss(f, y, sigma, 1, impl=impl)
    (grad,) = torch.autograd.grad(loss, f, torch.full((1,), 1e-4, device=DEVICE))
    target = 2 * -60000 / 1.25**0.5
    torch.testing.assert_close(grad, torch.full_like(f, 1e-4 * 2 / 4 * (60000 - target)))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_scale_exactly_and_repeat(impl, dtype):
    f = torch.randn(2, 4, 8, device=DEVICE).to(dtype).requires_grad_()
    y, sigma = torch.randn(2, 4, 8, device=DEVICE), torch.ones(2, device=DEVICE)
    loss = edm_loss(f, y, sigma, 1, impl=impl)
    once, again, double = (
        torch.autograd.grad(loss, f, torch.full((2,), g, device=DEVICE), retain_graph=True)[0]
        for g in (1.0, 1.0, 2.0)
    )
    assert torch.equal(once, again)
    assert torch.equal(2 * once, double)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_f_gets_a_gradient(impl):
    f, y = (torch.randn(2, 4, 6, device=DEVICE, requires_grad=True) for _ in range(2))
    sigma, weight = (torch.rand(2, device=DEVICE, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = edm_loss(f, y, sigma, 1, row_weight=weight, impl=impl)
    loss.sum().backward()  # an expanded upstream gradient
    assert f.grad is not None
    assert y.grad is sigma.grad is weight.grad is None
    if impl != "reference":
        assert [t.shape for t in saved] == [f.shape, (2,)]
    f.grad = None
    assert not edm_loss(f.detach(), y, sigma, 1, impl=impl).requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_weight_removes_a_row_even_of_huge_values(impl):
    f, y = torch.randn(2, 2, 4, 8, device=DEVICE).unbind()
    weight = torch.ones(2, 4, device=DEVICE)
    weight[:, 3] = 0
    sigma = torch.ones(2, device=DEVICE)
    first = edm_loss(f, y, sigma, 1, row_weight=weight, impl=impl)
    f[:, 3] = 1e10
    assert torch.equal(first, edm_loss(f, y, sigma, 1, row_weight=weight, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty(impl, shape):
    f = torch.zeros(shape, device=DEVICE, requires_grad=True)
    loss = edm_loss(f, f.detach(), torch.ones(shape[0], device=DEVICE), 1, impl=impl)
    assert torch.equal(loss, torch.zeros(shape[0], device=DEVICE))
    loss.sum().backward()
    assert f.grad.shape == shape


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("N", [0, 3])
def test_samples_of_one_number(impl, N):
    f, y = torch.randn(2, N, device=DEVICE).unbind()
    sigma = torch.ones(N, device=DEVICE)
    expected = edm_loss(f[:, None], y[:, None], sigma, 1, impl=impl)
    assert torch.equal(edm_loss(f, y, sigma, 1, impl=impl), expected)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("changed", ["sigma", "seed", "row_weight"])
@pytest.mark.filterwarnings("default")  # Inductor's own deprecations
def test_a_graph_may_change_what_it_gave(impl, backend, changed):
    torch._dynamo.reset()
    f = torch.randn(2, 4, 6, device=DEVICE, requires_grad=True)
    y = torch.randn(2, 4, 6, device=DEVICE)

    def arguments():
        sigma, weight = torch.ones(2, device=DEVICE), torch.ones(2, device=DEVICE)
        return {"sigma": sigma, "seed": torch.tensor(5, device=DEVICE), "row_weight": weight}

    def step(f, y, sigma, seed, row_weight):
        loss = edm_loss(f, y, sigma, seed, row_weight=row_weight, impl=impl).sum()
        {"sigma": sigma, "seed": seed, "row_weight": row_weight}[changed].add_(1)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    (got,) = torch.autograd.grad(compiled(f, y, **arguments()), f)
    (expected,) = torch.autograd.grad(edm_loss(f, y, **arguments(), impl=impl).sum(), f)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_seed_may_be_stepped_before_backward(impl):
    f = torch.randn(2, 4, 6, device=DEVICE, requires_grad=True)
    seed, sigma = torch.tensor(5, device=DEVICE), torch.ones(2, device=DEVICE)
    loss = edm_loss(f, f.detach(), sigma, seed, impl=impl).sum()
    seed.add_(1)
    (expected,) = torch.autograd.grad(edm_loss(f, f.detach(), sigma, 5, impl=impl).sum(), f)
    assert torch.equal(torch.autograd.grad(loss, f)[0], expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_has_no_effect(impl):
    f, y = torch.randn(2, 2, 4, 8, device=DEVICE).unbind()
    plain = edm_loss(f, y, torch.ones(2, device=DEVICE), 1, impl=impl)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = edm_loss(f, y, torch.ones(2, device=DEVICE), 1, impl=impl)
    assert torch.equal(plain, cast)


def test_gradcheck_of_the_reference():
    f, y = torch.randn(2, 2, 4, 3, dtype=torch.float64).unbind()
    f.requires_grad_()
    sigma, weight = torch.rand(2, 2, dtype=torch.float64) + 0.1, torch.rand(2, 4)
    assert torch.autograd.gradcheck(lambda f: edm_loss(f, y, sigma, 1, row_weight=weight), f)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("seed_tensor", [None, torch.tensor(-4, device=DEVICE)])
@pytest.mark.parametrize("weight", [None, torch.ones(2, 4, device=DEVICE)])
def test_opcheck(impl, seed_tensor, weight):
    f, y = torch.randn(2, 2, 4, 6, device=DEVICE).unbind()
    args = (f.bfloat16(), y, torch.rand(2, 2, device=DEVICE), seed_tensor, -5, 2**33, 0.5, weight)
    for need_rest in (True, False):
        torch.library.opcheck(op("edm_loss_fwd", impl), (*args, need_rest))
    grad = torch.ones(2, device=DEVICE)
    torch.library.opcheck(op("edm_loss_bwd", impl), (grad, args[0], weight, torch.float16))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tensor_seed", [False, True])
def test_compiles_to_one_graph(impl, tensor_seed):
    torch._dynamo.reset()
    f = torch.randn(2, 4, 6, device=DEVICE, requires_grad=True)
    y, sigma = torch.randn(2, 4, 6, device=DEVICE), torch.rand(2, device=DEVICE) + 0.1
    call = lambda f, y, sigma, seed: edm_loss(f, y, sigma, seed, impl=impl)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for number in (3, -(2**40), 2**62):
        seed = torch.tensor(number, device=DEVICE) if tensor_seed else number
        got, expected = compiled(f, y, sigma, seed), call(f, y, sigma, seed)
        torch.testing.assert_close(got, expected)
        grads = (torch.autograd.grad(loss.sum(), f)[0] for loss in (got, expected))
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"f": torch.ones(2, 4, 5)}, ValueError, "y must have the shape of f"),
        ({"y": torch.ones(2, 4, 6).int()}, TypeError, "y must be float64, float32"),
        ({"y": torch.ones(2, 4, 6, device="meta")}, RuntimeError, "y must be on"),
        ({"sigma": torch.ones(2, 3)}, ValueError, "S that divides T = 4, got S = 3"),
        ({"sigma_data": -1.0}, ValueError, "sigma_data must be a number from"),
        ({"seed": -(2**63) - 1}, ValueError, "seed must fit in 64 bits"),
        ({"offset": -1}, ValueError, "offset must be >= 0, got -1"),
        ({"offset": 2**63 - 47}, ValueError, r"elements must be <= 2\*\*63"),
        ({"y": None}, TypeError, "y must be a tensor, got NoneType"),
        ({"row_weight": [1.0, 1.0]}, TypeError, "row_weight must be a tensor, got list"),
        (
            {"row_weight": torch.ones(2, 3)},
            ValueError,
            r"row_weight must have shape \[N\] = \[2\] or \[N, T\] = \[2, 4\], got \[2, 3\]",
        ),
        ({"row_weight": torch.ones(2).int()}, TypeError, "row_weight must be float64"),
        ({"y": torch.ones(2, 4, 6).double(), "impl": "triton"}, TypeError, "got float64"),
    ],
)
def test_errors(change, error, message):
    ones = torch.ones(2, 4, 6)
    arguments = {"f": ones, "y": ones, "sigma": torch.ones(2), "seed": 1} | change
    arguments = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) and not v.is_meta else v
        for k, v in arguments.items()
    }
    with pytest.raises(error, match=message):
        edm_loss(**arguments)
