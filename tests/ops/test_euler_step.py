import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st

from dblocks.kernels import reference
from dblocks.ops.euler_step import euler_step
from dblocks.testing import DTYPES, LAYOUTS, check_against_reference, make, segment_counts
from tools import FUSED, IMPLS, op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@st.composite
def problems(draw):
    """Inputs z, denoised and levels that are tensors; upstream; levels that are numbers."""
    N, D = draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([1, 3, 8, 16, 40]))
    T = draw(st.sampled_from([1, 2, 6, 12]))
    image = draw(st.booleans())
    shape = (N, 2, 3, D) if image else (N, T, D)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    S = 1 if image else draw(segment_counts(T))

    def tensor():
        layout, dtype = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(DTYPES))
        return make(shape, layout, dtype, generator, device=DEVICE)

    inputs, numbers = {"z": tensor(), "denoised": tensor()}, {}
    for name, low in (("sigma", 0.5), ("sigma_next", 0.0)):
        sizes = draw(st.sampled_from([None, (), (N,), (N,) if image else (N, S)]))
        if sizes is None:
            numbers[name] = low + 0.25
        else:
            inputs[name] = (torch.rand(sizes, generator=generator) + low).to(DEVICE)
    return inputs, [tensor()], numbers


@pytest.mark.parametrize("impl", IMPLS)
@given(problem=problems(), needed=st.sampled_from([["z", "denoised"], ["z"], ["denoised"]]))
def test_forward_and_gradients_are_within_budget(impl, problem, needed):
    inputs, upstream, numbers = problem
    call = lambda impl, **tensors: [euler_step(**tensors, **numbers, impl=impl)]
    check_against_reference(call, inputs, upstream, impl=impl, needs_grad=needed)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("levels", [(80.0, 40.0), (0.5, 0.4999), (0.1, 0.002), (3.0, 0.0)])
def test_a_perfect_denoiser_lands_on_the_trajectory(impl, as_tensor, levels):
    y = torch.randn(2, 5, 8, device=DEVICE)
    eps = reference.normals(y.numel(), 1, 0, DEVICE).view(y.shape)
    sigma, sigma_next = (torch.tensor(s, device=DEVICE) if as_tensor else s for s in levels)
    got = euler_step(y + levels[0] * eps, y, sigma, sigma_next, impl=impl)
    tolerance = 1e-6 * max(levels[1], 1)
    torch.testing.assert_close(got, y + levels[1] * eps, rtol=1e-6, atol=3 * tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0), torch.zeros(3), torch.zeros(3, 5)])
def test_a_step_to_zero_gives_denoised_exactly(impl, zero):
    z, denoised = torch.randn(2, 3, 5, 9, device=DEVICE).unbind()
    sigma = torch.rand(3, device=DEVICE) + 0.1
    zero = zero.to(DEVICE) if isinstance(zero, torch.Tensor) else zero
    assert torch.equal(euler_step(z, denoised, sigma, zero, impl=impl), denoised)
    assert torch.equal(euler_step(z, denoised, 0.3, zero, impl=impl), denoised)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("levels", [(None, 0.3), (1e5, None), (None, 0.0)])
def test_a_number_is_not_rounded_to_the_dtype_of_the_other_level(impl, dtype, levels):
    z, denoised = torch.randn(2, 2, 5, 9, device=DEVICE).unbind()
    level = torch.tensor([0.75, 2.0], device=DEVICE, dtype=dtype)  # exact in each dtype
    sigma, sigma_next = (level if s is None else s for s in levels)
    inputs = {"z": z, "denoised": denoised}
    call = lambda impl, z, denoised: [euler_step(z, denoised, sigma, sigma_next, impl=impl)]
    check_against_reference(call, inputs, [z], impl=impl)
    if sigma_next is not level and sigma_next == 0:
        assert torch.equal(call(impl, **inputs)[0], denoised)


@pytest.mark.parametrize("impl", IMPLS)
def test_runs_repeat_and_levels_get_no_gradient(impl):
    z, denoised = torch.randn(2, 3, 5, 9, device=DEVICE).unbind()
    sigma = (torch.rand(3, device=DEVICE) + 0.5).requires_grad_()
    first = euler_step(z, denoised, sigma, 0.3, impl=impl)
    assert torch.equal(first, euler_step(z, denoised, sigma, 0.3, impl=impl))
    assert not first.requires_grad
    assert euler_step(z, denoised.double(), sigma, 0.3).dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty(impl, shape):
    z, denoised = (torch.zeros(shape, device=DEVICE, requires_grad=True) for _ in range(2))
    out = euler_step(z, denoised, torch.ones(shape[0], device=DEVICE), 0.5, impl=impl)
    assert out.shape == shape
    out.sum().backward()
    assert z.grad.shape == denoised.grad.shape == shape


@pytest.mark.parametrize("impl", IMPLS)
def test_channels_last_images_give_contiguous_results(impl):
    image = torch.randn(2, 3, 4, 5, device=DEVICE).to(memory_format=torch.channels_last)
    sigma = torch.ones(2, device=DEVICE)
    out = euler_step(image, image, sigma, 0.5, impl=impl)
    assert out.is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_has_no_effect(impl):
    z, denoised = torch.randn(2, 2, 4, 8, device=DEVICE).unbind()
    plain = euler_step(z, denoised, 2.0, 1.0, impl=impl)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(plain, euler_step(z, denoised, 2.0, 1.0, impl=impl))


def test_gradcheck_of_the_reference():
    z, denoised = (torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sigma = torch.rand(2, 2, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda z, d: euler_step(z, d, sigma, 0.2), (z, denoised))


@pytest.mark.parametrize("impl", FUSED)
def test_opcheck(impl):
    z, denoised = torch.randn(2, 2, 4, 6, device=DEVICE).unbind()
    sigma = torch.rand(2, 2, device=DEVICE) + 0.1
    for levels in ((sigma, sigma[:, 0], 1.0, 1.0), (None, sigma, 2.0, 1.0), (None, None, 2.0, 1.0)):
        forward = op("euler_step_fwd", impl)
        torch.library.opcheck(forward, (z, denoised, *levels))
        backward = op("euler_step_bwd", impl)
        torch.library.opcheck(backward, (z, *levels, torch.bfloat16, None))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_compiles_to_one_graph(impl, as_tensor):
    torch._dynamo.reset()
    leaves = [torch.randn(2, 4, 6, device=DEVICE, requires_grad=True) for _ in range(2)]
    call = lambda z, d, s, n: euler_step(z, d, s, n, impl=impl)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for levels in ((80.0, 20.0), (20.0, 3.0), (3.0, 0.0)):
        levels = [torch.tensor(s, device=DEVICE) for s in levels] if as_tensor else levels
        got, expected = compiled(*leaves, *levels), call(*leaves, *levels)
        torch.testing.assert_close(got, expected)
        grads = (torch.autograd.grad(out.sum(), leaves) for out in (got, expected))
        for g, e in zip(*grads, strict=True):
            torch.testing.assert_close(g, e)


@pytest.mark.parametrize("impl", IMPLS)
def test_numbers_do_not_recompile(impl):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    z, denoised = torch.randn(2, 2, 4, 6, device=DEVICE).unbind()
    call = lambda z, d, s, n: euler_step(z, d, s, n, impl=impl)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for i in range(12):
        levels = 12.5 - i, 11.5 - i
        torch.testing.assert_close(compiled(z, denoised, *levels), call(z, denoised, *levels))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("impl", FUSED)
def test_a_graph_may_change_its_levels(impl):
    torch._dynamo.reset()

    def step(z, denoised, sigma, sigma_next):
        out = euler_step(z, denoised, sigma, sigma_next, impl=impl)
        sigma.add_(1)
        sigma_next.add_(1)
        return out.sum()

    z, denoised = (torch.randn(2, 4, 6, device=DEVICE, requires_grad=True) for _ in range(2))
    levels = torch.full((2,), 2.0, device=DEVICE), torch.ones(2, device=DEVICE)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(z, denoised, *levels), z)
    torch.testing.assert_close(got, torch.full_like(z, 0.5))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": torch.ones(2, 4, 5)}, ValueError, "denoised must have the shape of z"),
        ({"z": torch.ones(2, 4, 6).int()}, TypeError, "z must be float64, float32"),
        ({"denoised": torch.ones(2, 4, 6, device="meta")}, RuntimeError, "denoised must be on"),
        ({"sigma": 0.0}, ValueError, "sigma must be > 0 everywhere, got 0.0"),
        ({"sigma": float("nan")}, ValueError, "sigma must be > 0 everywhere, got nan"),
        ({"sigma": float("inf")}, ValueError, r"sigma must be at most 1e\+18 .* got inf"),
        ({"sigma": [1.0, 2.0]}, TypeError, "sigma must be a real number, got list"),
        ({"sigma_next": None}, TypeError, "sigma_next must be a real number, got NoneType"),
        ({"z": [1.0]}, TypeError, "z must be a tensor, got list"),
        ({"sigma_next": -1.0}, ValueError, "sigma_next must be >= 0 everywhere, got -1.0"),
        ({"sigma": torch.ones(3)}, ValueError, r"sigma must be 0-d or have shape \[N\] = \[2\]"),
        (
            {"sigma": torch.ones(2, 4), "sigma_next": torch.ones(2, 2)},
            ValueError,
            "sigma_next must have as many segments as sigma, 4, got 2",
        ),
        ({"z": torch.ones(2, 4, 6).double(), "impl": "triton"}, TypeError, "got float64"),
    ],
)
def test_errors(change, error, message):
    ones = torch.ones(2, 4, 6)
    arguments = {"z": ones, "denoised": ones, "sigma": 2.0, "sigma_next": 1.0} | change
    arguments = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) and not v.is_meta else v
        for k, v in arguments.items()
    }
    with pytest.raises(error, match=message):
        euler_step(**arguments)


def test_levels_on_the_cpu_are_checked():
    ones = torch.ones(2, 4, 6)
    with pytest.raises(ValueError, match="sigma must be > 0 everywhere, got a minimum of 0"):
        euler_step(ones, ones, torch.tensor([1.0, 0.0]), 1.0)
