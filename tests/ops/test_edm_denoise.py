import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dblocks.kernels import reference
from dblocks.ops.edm_denoise import edm_denoise
from dblocks.testing import DTYPES, LAYOUTS, check_against_reference, make, segment_counts
from tools import FUSED, IMPLS, op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@st.composite
def problems(draw):
    N, D = draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([1, 3, 8, 16, 40]))
    T = draw(st.sampled_from([1, 2, 6, 12]))
    image = draw(st.booleans())
    shape = (N, 2, 3, D) if image else (N, T, D)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    S = 0 if image else draw(st.one_of(st.just(0), segment_counts(T)))
    sigma = torch.exp(3 * torch.randn((N, S) if S else (N,), generator=generator)).to(DEVICE)

    def tensor():
        layout, dtype = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(DTYPES))
        return make(shape, layout, dtype, generator, device=DEVICE)

    return {"f": tensor(), "z": tensor(), "sigma": sigma}, [tensor()]


@pytest.mark.parametrize("impl", IMPLS)
@given(problem=problems(), needed=st.sampled_from([["f", "z"], ["f"], ["z"]]))
def test_forward_and_gradients_are_within_budget(impl, problem, needed):
    inputs, upstream = problem
    call = lambda impl, f, z, sigma: [edm_denoise(f, z, sigma, impl=impl)]
    check_against_reference(call, inputs, upstream, impl=impl, needs_grad=needed)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sigma", [0.002, 80.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_ends_of_the_noise_range(impl, sigma, sigma_data):
    f, z = torch.randn(2, 3, 4, 8, device=DEVICE).unbind()
    level = torch.full((3,), sigma, device=DEVICE)
    call = lambda impl, f, z, sigma: [edm_denoise(f, z, sigma, sigma_data=sigma_data, impl=impl)]
    inputs = {"f": f, "z": z * sigma, "sigma": level}
    check_against_reference(call, inputs, [f], impl=impl, needs_grad=["f", "z"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_a_perfect_network_gives_the_target(impl, sigma):
    y, level = torch.randn(2, 4, 8, device=DEVICE), torch.tensor(sigma, device=DEVICE)
    eps = reference.normals(y.numel(), 1, 0, DEVICE).view(y.shape)
    f = (level / 0.5 * y - 0.5 * eps) * torch.rsqrt(level**2 + 0.25)
    got = edm_denoise(f, y + level * eps, level, impl=impl)
    torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_runs_repeat_and_float64_is_kept(impl):
    f, z = torch.randn(2, 3, 5, 9, device=DEVICE).unbind()
    sigma = torch.rand(3, device=DEVICE, requires_grad=True)
    first = edm_denoise(f, z, sigma, impl=impl)
    assert torch.equal(first, edm_denoise(f, z, sigma, impl=impl))
    assert not first.requires_grad
    assert edm_denoise(f, z.double(), sigma).dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_upstream(impl):
    leaves = [torch.randn(3, 5, 8, device=DEVICE, requires_grad=True) for _ in range(2)]
    sigma = torch.rand(3, device=DEVICE) + 0.1
    edm_denoise(*leaves, sigma, impl=impl).sum().backward()
    total = sigma.square() + 0.25
    c_skip, c_out = 0.25 / total, 0.5 * sigma * total.rsqrt()
    for leaf, factor in zip(leaves, (c_out, c_skip), strict=True):
        torch.testing.assert_close(leaf.grad, factor[:, None, None].expand(3, 5, 8))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty(impl, shape):
    f, z = (torch.zeros(shape, device=DEVICE, requires_grad=True) for _ in range(2))
    out = edm_denoise(f, z, torch.ones(shape[0], device=DEVICE), impl=impl)
    assert out.shape == shape
    out.sum().backward()
    assert f.grad.shape == z.grad.shape == shape


@pytest.mark.parametrize("impl", IMPLS)
def test_channels_last_images_give_contiguous_results(impl):
    image = torch.randn(2, 3, 4, 5, device=DEVICE).to(memory_format=torch.channels_last)
    sigma = torch.ones(2, device=DEVICE)
    out = edm_denoise(image, image, sigma, impl=impl)
    assert out.is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_has_no_effect(impl):
    f, z = torch.randn(2, 2, 4, 8, device=DEVICE).unbind()
    plain = edm_denoise(f, z, torch.ones(2, device=DEVICE), impl=impl)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = edm_denoise(f, z, torch.ones(2, device=DEVICE), impl=impl)
    assert torch.equal(plain, cast)


def test_gradcheck_of_the_reference():
    f, z = (torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    sigma = torch.rand(2, 2, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(lambda f, z: edm_denoise(f, z, sigma), (f, z))


@pytest.mark.parametrize("impl", FUSED)
def test_opcheck(impl):
    f, z = torch.randn(2, 2, 4, 6, device=DEVICE).unbind()
    sigma = torch.rand(2, 2, device=DEVICE)
    torch.library.opcheck(op("edm_denoise_fwd", impl), (f, z, sigma, 0.5))
    for dtypes in ((torch.float16, torch.float32), (None, torch.float32), (torch.float32, None)):
        args = (f, sigma, 0.5, *dtypes)
        torch.library.opcheck(op("edm_denoise_bwd", impl), args)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_to_one_graph(impl):
    leaves = [torch.randn(2, 4, 6, device=DEVICE, requires_grad=True) for _ in range(2)]
    call = lambda f, z, s: edm_denoise(f, z, s, impl=impl)
    sigma = torch.rand(2, device=DEVICE)
    expected = call(*leaves, sigma)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves, sigma)
    torch.testing.assert_close(got, expected)
    for g, e in zip(
        torch.autograd.grad(got.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("impl", FUSED)
def test_a_graph_may_change_its_levels(impl):
    torch._dynamo.reset()

    def step(f, z, sigma):
        denoised = edm_denoise(f, z, sigma, impl=impl)
        sigma.add_(1)
        return denoised.sum()

    f, z = (torch.randn(2, 4, 6, device=DEVICE, requires_grad=True) for _ in range(2))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(f, z, torch.ones(2, device=DEVICE)), z)
    torch.testing.assert_close(got, torch.full_like(z, 0.25 / 1.25))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"f": torch.tensor(1.0)}, ValueError, r"f must have shape \[N, \.\.\.\]"),
        ({"z": torch.ones(2, 4, 5)}, ValueError, "z must have the shape of f"),
        ({"z": torch.ones(2, 4, 6).int()}, TypeError, "z must be float64, float32"),
        ({"z": torch.ones(2, 4, 6, device="meta")}, RuntimeError, "z must be on"),
        ({"sigma": torch.ones(2, 3)}, ValueError, "S that divides T = 4, got S = 3"),
        ({"sigma_data": -1.0}, ValueError, "sigma_data must be a number from"),
        ({"sigma_data": None}, TypeError, "sigma_data must be a real number, got NoneType"),
        ({"z": 1.0}, TypeError, "z must be a tensor, got float"),
        ({"z": torch.ones(2, 4, 6).double(), "impl": "triton"}, TypeError, "got float64"),
    ],
)
def test_errors(change, error, message):
    ones = torch.ones(2, 4, 6)
    arguments = {"f": ones, "z": ones, "sigma": torch.ones(2)} | change
    arguments = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) and not v.is_meta else v
        for k, v in arguments.items()
    }
    with pytest.raises(error, match=message):
        edm_denoise(**arguments)
