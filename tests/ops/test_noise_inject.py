import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dblocks.kernels import reference
from dblocks.ops.noise_inject import noise_inject
from dblocks.testing import DTYPES, LAYOUTS, check_against_reference, make, segment_counts
from tools import FUSED, IMPLS, op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SEEDS = st.sampled_from([0, 1, -1, 2**40 + 3, -(2**63), 2**63 - 1])
OFFSETS = st.sampled_from([0, 1, 3, 4, 2**32 - 2, 2**33 + 5])


@st.composite
def problems(draw):
    """Inputs y, sigma; upstream gradients for z and z_in; the other arguments."""
    N, D = draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([1, 3, 4, 7, 8, 16, 40]))
    T = draw(st.sampled_from([1, 2, 6, 12]))
    image = draw(st.booleans())
    shape = (N, 2, 3, D) if image else (N, T, D)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    S = 0 if image else draw(st.one_of(st.just(0), segment_counts(T)))
    sigma = torch.rand((N, S) if S else (N,), generator=generator).to(DEVICE) * 4 + 0.002

    def tensor():
        layout, dtype = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(DTYPES))
        return make(shape, layout, dtype, generator, device=DEVICE)

    upstream = [tensor(), tensor()]
    if draw(st.booleans()):
        upstream[draw(st.integers(0, 1))] = None
    seed = draw(SEEDS)
    options = {
        "seed": torch.tensor(seed, device=DEVICE) if draw(st.booleans()) else seed,
        "offset": draw(OFFSETS),
        "sigma_data": draw(st.sampled_from([0.5, 1.0])),
    }
    return {"y": tensor(), "sigma": sigma}, upstream, options


@pytest.mark.parametrize("impl", IMPLS)
@given(problem=problems())
def test_forward_and_gradient_are_within_budget(impl, problem):
    inputs, upstream, options = problem
    call = lambda impl, y, sigma: noise_inject(y, sigma, **options, impl=impl)
    check_against_reference(call, inputs, upstream, impl=impl, needs_grad=["y"])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sigma", [0.002, 80.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_of_the_noise_range(impl, sigma, dtype):
    y = torch.randn(3, 5, 8).to(DEVICE, dtype)
    call = lambda impl, y, sigma: noise_inject(y, sigma, 1, impl=impl)
    inputs = {"y": y, "sigma": torch.full((3,), sigma, device=DEVICE)}
    check_against_reference(call, inputs, [y, y], impl=impl, needs_grad=["y"])


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8192), (1, 2, 1000)])
def test_long_samples_of_every_dtype(impl, dtype, shape):
    y = torch.randn(shape, device=DEVICE).to(dtype)
    sigma = torch.linspace(0.1, 5, shape[0], device=DEVICE)
    call = lambda impl, y, sigma: noise_inject(y, sigma, 3, offset=4, impl=impl)
    inputs = {"y": y, "sigma": sigma}
    check_against_reference(call, inputs, [y, y], impl=impl, needs_grad=["y"])


@pytest.mark.parametrize("impl", IMPLS)
def test_options(impl):
    y, sigma = torch.randn(2, 6, 8, device=DEVICE), torch.tensor(0.7, device=DEVICE)
    full = noise_inject(y, sigma, 5, impl=impl)
    short = noise_inject(y, sigma, 5, need_z=False, dtype=torch.bfloat16, impl=impl)
    assert short.z is None
    assert torch.equal(short.z_in, full.z_in.bfloat16())
    wide = noise_inject(y.bfloat16(), sigma, 5, impl=impl)
    assert wide.z.dtype == torch.float32
    assert wide.z_in.dtype == torch.bfloat16


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_noise_does_not_depend_on_layout_or_dtype(impl, layout):
    sigma = torch.tensor(1.0, device=DEVICE)
    y = make((3, 5, 7), layout, torch.float32, torch.Generator().manual_seed(0), device=DEVICE)
    eps = reference.normals(y.numel(), -9, 6, DEVICE).view(y.shape)
    zero = noise_inject(y * 0, sigma, -9, offset=6, impl=impl).z
    torch.testing.assert_close(zero, eps, rtol=1e-6, atol=1e-6)
    assert torch.equal(
        noise_inject(y, sigma, -9, offset=6, impl=impl).z,
        noise_inject(y.contiguous(), sigma, -9, offset=6, impl=impl).z,
    )
    half = noise_inject((y * 0).half(), sigma, -9, offset=6, impl=impl).z
    assert torch.equal(half, zero)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=10)
@given(offset=OFFSETS, start=st.integers(0, 3), D=st.sampled_from([5, 8]))
def test_a_part_with_its_offset_is_a_slice_of_the_whole(impl, offset, start, D):
    y, sigma = torch.randn(4, 3, D, device=DEVICE), torch.tensor(0.5, device=DEVICE)
    whole = noise_inject(y, sigma, 3, offset=offset, impl=impl).z
    part = noise_inject(y[start:], sigma, 3, offset=offset + start * 3 * D, impl=impl).z
    torch.testing.assert_close(part, whole[start:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_runs_repeat_and_saves_sigma_only(impl):
    y = torch.randn(3, 5, 9, device=DEVICE, requires_grad=True)
    sigma = torch.rand(3, device=DEVICE, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        first = noise_inject(y, sigma, 2, impl=impl)
    again = noise_inject(y, sigma, torch.tensor(2, device=DEVICE), impl=impl)
    assert torch.equal(first.z, again.z)
    assert torch.equal(first.z_in, again.z_in)
    if impl != "reference":
        assert [t.shape for t in saved] == [(3,)]
    first.z_in.sum().backward()
    assert sigma.grad is None
    assert y.grad is not None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0,)])
def test_empty(impl, shape):
    y = torch.zeros(shape, device=DEVICE, requires_grad=True)
    z, z_in = noise_inject(y, torch.ones(shape[0], device=DEVICE), 1, impl=impl)
    assert z.shape == z_in.shape == shape
    (z.sum() + z_in.sum()).backward()
    assert y.grad.shape == shape


@pytest.mark.parametrize("impl", IMPLS)
def test_the_last_offset(impl):
    y, sigma = torch.zeros(2, 3, device=DEVICE), torch.ones(2, device=DEVICE)
    z = noise_inject(y, sigma, 1, offset=2**63 - 6, impl=impl).z
    expected = reference.normals(6, 1, 2**63 - 6, DEVICE).view(2, 3)
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"must be <= 2\*\*63, got 9223372036854775803 \+ 6"):
        noise_inject(y, sigma, 1, offset=2**63 - 5, impl=impl)


@pytest.mark.parametrize("impl", FUSED)
def test_a_graph_may_change_its_levels(impl):
    torch._dynamo.reset()

    def step(y, sigma):
        z_in = noise_inject(y, sigma, 1, impl=impl).z_in
        sigma.add_(1)
        return z_in.sum()

    y = torch.randn(2, 4, 6, device=DEVICE, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(y, torch.ones(2, device=DEVICE)), y)
    torch.testing.assert_close(got, torch.full_like(y, 1.25**-0.5))


class _Inject(torch.nn.Module):
    def __init__(self, impl):
        super().__init__()
        self.impl = impl

    def forward(self, y, sigma, seed, offset):
        return noise_inject(y, sigma, seed, offset=offset, impl=self.impl).z


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("default")  # of torch.export itself
def test_exports_with_a_symbolic_seed_and_offset(impl, strict):
    y, sigma = torch.randn(2, 3, device=DEVICE), torch.ones(2, device=DEVICE)
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        _Inject(impl),
        (y, sigma, 5, 8),
        dynamic_shapes=(None, None, dynamic, dynamic),
        strict=strict,
    )
    got = program.module()(y, sigma, 77, 13)
    torch.testing.assert_close(got, noise_inject(y, sigma, 77, offset=13, impl=impl).z)


def test_tracing_and_transforms_do_not_look_at_levels():
    y, sigma = torch.randn(3, 2, 4), torch.rand(3, 2) + 0.1
    call = lambda y, sigma: noise_inject(y, sigma, 1, impl="reference").z
    expected = torch.stack([call(*pair) for pair in zip(y, sigma, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(y, sigma), expected)
    traced = make_fx(call, tracing_mode="real")(y[0], sigma[0])
    torch.testing.assert_close(traced(y[1], sigma[1]), expected[1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert call(y[0], sigma[0]).shape == (2, 4)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_has_no_effect(impl):
    y, sigma = torch.randn(2, 4, 8, device=DEVICE), torch.ones(2, device=DEVICE)
    plain = noise_inject(y, sigma, 1, impl=impl)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        cast = noise_inject(y, sigma, 1, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_gradcheck_of_the_reference():
    y = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    sigma = torch.rand(2, 2, dtype=torch.float64) + 0.1
    assert torch.autograd.gradcheck(lambda y: noise_inject(y, sigma, 1), y)


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("seed_tensor", [None, torch.tensor(-4, device=DEVICE)])
def test_opcheck(impl, seed_tensor):
    y, sigma = torch.randn(2, 4, 6, device=DEVICE).bfloat16(), torch.rand(2, 2, device=DEVICE)
    forward = op("noise_inject_fwd", impl)
    for need_z in (True, False):
        args = (y, sigma, seed_tensor, -5, 2**33, 0.5, torch.float16, need_z)
        torch.library.opcheck(forward, args)
    backward = op("noise_inject_bwd", impl)
    for dz in (y.float(), None):
        torch.library.opcheck(backward, (dz, y, sigma, 0.5, torch.bfloat16))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_to_one_graph_and_seeds_do_not_recompile(impl):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = lambda y, sigma, seed, offset: noise_inject(y, sigma, seed, offset=offset, impl=impl)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    sigma = torch.rand(2, device=DEVICE) + 0.1
    for seed, offset in ((5, 0), (2**40, 8), (-7, 2**34), (99, 12), (-(2**63), 3)):
        y = torch.randn(2, 4, 6, device=DEVICE, requires_grad=True)
        got, expected = compiled(y, sigma, seed, offset), call(y, sigma, seed, offset)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)
        (got.z_in + got.z).sum().backward()
        assert y.grad.isfinite().all()
    assert counter.frame_count <= 3


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_compiles_with_inductor(impl):
    torch._dynamo.reset()
    call = lambda y, sigma, seed: noise_inject(y, sigma, seed, impl=impl)
    y, sigma = torch.randn(2, 4, 6, device=DEVICE), torch.rand(2, device=DEVICE) + 0.1
    for seed in (3, -(2**40)):
        got = torch.compile(call, fullgraph=True)(y, sigma, seed)
        assert torch.equal(got.z, call(y, sigma, seed).z)


ERRORS = [
    ({"y": torch.tensor(1.0)}, ValueError, r"y must have shape \[N, \.\.\.\]"),
    ({"y": torch.ones(2, 4, 6).int()}, TypeError, "y must be float64, float32"),
    ({"sigma": 1.0}, TypeError, "sigma must be a floating tensor, got float"),
    ({"sigma": torch.ones(2).int()}, TypeError, "sigma must be float64, float32"),
    ({"sigma": torch.ones(3)}, ValueError, r"sigma must be 0-d or have shape \[N\] = \[2\]"),
    ({"sigma": torch.ones(2, 3)}, ValueError, "S that divides T = 4, got S = 3"),
    (
        {"y": torch.ones(2, 4), "sigma": torch.ones(2, 2)},
        ValueError,
        r"y must have shape \[N, T, D\] where sigma is \[N, S\]",
    ),
    ({"sigma_data": 0.0}, ValueError, "sigma_data must be a number from 1e-18 to 1e\\+18, got 0.0"),
    ({"seed": 2**63}, ValueError, "seed must fit in 64 bits"),
    ({"seed": 1.5}, TypeError, "seed must be an int or a 0-d int64 tensor, got 1.5 of type float"),
    ({"seed": torch.tensor([1])}, ValueError, r"seed must be 0-d, got shape \[1\]"),
    ({"seed": torch.tensor(1.0)}, TypeError, "seed must be an int64 tensor"),
    ({"offset": -1}, ValueError, "offset must be >= 0, got -1"),
    ({"offset": 1.0}, TypeError, "offset must be an int, got float"),
    ({"y": [1.0]}, TypeError, "y must be a tensor, got list"),
    ({"sigma": torch.ones(2).to_sparse()}, TypeError, "sigma must be a dense tensor, got layout"),
    ({"sigma_data": 1j}, TypeError, "sigma_data must be a real number, got complex"),
    ({"dtype": torch.int32}, TypeError, "dtype must be float64"),
    ({"impl": "fast"}, ValueError, "impl must be one of"),
    ({"y": torch.ones(2, 4, 6).double(), "impl": "triton"}, TypeError, "got float64"),
    ({"sigma": torch.ones(2, device="meta")}, RuntimeError, "sigma must be on"),
    ({"seed": torch.tensor(1, device="meta")}, RuntimeError, "seed must be on"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors(change, error, message):
    arguments = {"y": torch.ones(2, 4, 6), "sigma": torch.ones(2), "seed": 1} | change
    arguments = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) and not v.is_meta else v
        for k, v in arguments.items()
    }
    with pytest.raises(error, match=message):
        noise_inject(**arguments)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_levels_on_the_cpu_are_checked(value):
    with pytest.raises(ValueError, match="sigma must be > 0 everywhere"):
        noise_inject(torch.ones(2, 4, 6), torch.tensor([1.0, value]), 1)
    with pytest.raises(ValueError, match="sigma must be > 0 everywhere"):
        noise_inject(torch.ones(2, 4, 6), torch.nn.Parameter(torch.tensor([1.0, value])), 1)


def test_infinite_levels_on_the_cpu_are_found():
    with pytest.raises(ValueError, match=r"sigma must be at most 1e\+18 everywhere, .* got inf"):
        noise_inject(torch.ones(2, 4, 6), torch.tensor([1.0, float("inf")]), 1)
