"""What is special to the C++ ops: threads, alignment, special values, instruction sets, absence."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from dblocks.functional import (
    adaln,
    edm_denoise,
    edm_loss,
    euler_step,
    gated_residual,
    noise_inject,
    residual_adaln,
)
from dblocks.ops import _extension
from dblocks.testing import assert_within_budget
from tools import ROOT, needs_cpp

pytestmark = needs_cpp

# Rows enough for several tasks and, per sample, several chunks of a group; odd widths have a tail.
SHAPES = ((2, 300, 133), (3, 130, 96), (1, 5, 20_001))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(shape, dtype=torch.float32, segments=None):
    N, _, D = shape
    x, branch = (torch.randn(shape).to(dtype) for _ in range(2))
    gate, shift, scale = torch.randn(N, *((segments,) if segments else ()), 3 * D).chunk(3, -1)
    weight, bias = torch.randn(2, D).unbind()
    return x, branch, gate, shift, scale, weight, bias


def everything(impl, x, branch, gate, shift, scale, weight, bias):
    """Outputs and gradients of every op, each a list of its own under its name."""
    leaves = [t.detach().requires_grad_() for t in (x, branch, gate, shift, scale, weight, bias)]
    x, branch, gate, shift, scale, weight, bias = leaves
    sigma = torch.linspace(0.1, 2, len(x))
    found = {}

    def keep(name, *outputs):
        g = torch.Generator().manual_seed(1)
        upstream = [torch.randn(o.shape, generator=g).to(o.dtype) for o in outputs]
        grads = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
        found[name] = [*(o.detach() for o in outputs), *(g for g in grads if g is not None)]

    for norm in ("layer", "rms"):
        y = adaln(x, shift, scale, weight=weight, bias=bias, norm=norm, impl=impl)
        keep(f"adaln {norm}", y)
    keep("adaln without parameters", adaln(x, None, None, impl=impl))
    keep("residual_adaln", *residual_adaln(x, branch, gate, shift, scale, impl=impl))
    keep("gated_residual", gated_residual(x, branch, gate, impl=impl))
    keep("noise_inject", *noise_inject(x, sigma, 3, offset=5, impl=impl))
    keep("edm_denoise", edm_denoise(x, branch, sigma, impl=impl))
    keep("edm_loss", edm_loss(x, branch, sigma, 3, impl=impl))
    keep("euler_step", euler_step(x, branch, sigma, 0.5 * sigma, impl=impl))
    return found


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("segments", [None, 1, 10, 300])
def test_the_number_of_threads_changes_no_bit(threads, segments):
    inputs = problem((2, 300, 133), segments=segments)
    threads(1)
    alone = everything("cpp", *inputs)
    for count in (2, 3, 7):
        threads(count)
        together = everything("cpp", *inputs)
        for name, values in alone.items():
            assert all(torch.equal(a, b) for a, b in zip(values, together[name], strict=True)), name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_problems_are_within_budget(shape, dtype):
    inputs = problem(shape, dtype)
    got, eager = everything("cpp", *inputs), everything("reference", *inputs)
    ref64 = everything("reference", *(t.double() for t in inputs))
    for name in got:
        for g, r, e in zip(got[name], ref64[name], eager[name], strict=True):
            assert_within_budget(g, r, e, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_at_any_address(dtype):
    aligned = problem((2, 40, 37), dtype)

    def moved(t, by):
        storage = torch.zeros(t.numel() + by, dtype=t.dtype)
        return storage[by:].view(t.shape).copy_(t)

    expected = everything("cpp", *aligned)
    for by in (1, 3, 7):
        shifted = everything("cpp", *(moved(t, by) for t in aligned))
        for name, values in expected.items():
            assert all(torch.equal(a, b) for a, b in zip(values, shifted[name], strict=True)), name


def same_where_not_finite(got, eager):
    return torch.equal(got.isnan(), eager.isnan()) and torch.equal(
        torch.where(got.isinf(), got, 0), torch.where(eager.isinf(), eager, 0)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["x", "branch", "gate", "shift", "scale", "weight", "bias"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_spread_as_in_eager(dtype, place, value):
    inputs = list(problem((2, 6, 21), dtype))
    index = ("x", "branch", "gate", "shift", "scale", "weight", "bias").index(place)
    inputs[index][(*(-1,) * (inputs[index].ndim - 1), 13)] = value
    got, eager = everything("cpp", *inputs), everything("reference", *inputs)
    for name in got:
        # Gradients may differ in which of the two not finite values they are.
        assert same_where_not_finite(got[name][0], eager[name][0]), name
        for g, e in zip(got[name], eager[name], strict=True):
            assert torch.equal(g.isfinite(), e.isfinite()), name


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e15])
def test_denormal_and_huge_values(scale):
    x = torch.randn(2, 6, 21) * scale
    for norm in ("layer", "rms"):
        y = adaln(x, None, None, norm=norm, eps=0.0 if scale > 1e-20 else 1e-6, impl="cpp")
        eps = 0.0 if scale > 1e-20 else 1e-6
        eager = adaln(x, None, None, norm=norm, eps=eps, impl="reference")
        ref64 = adaln(x.double(), None, None, norm=norm, eps=eps)
        assert_within_budget(y, ref64, eager, norm)
    x_new = gated_residual(x, x, None, impl="cpp")
    assert torch.equal(x_new, x + x)
    half = x.half()
    assert torch.equal(gated_residual(half, torch.zeros_like(half), None, impl="cpp"), half)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_passes_through(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every.view(1, 256, 256)
    passed = gated_residual(x, torch.zeros_like(x), None, impl="cpp")
    # x + 0 is x, but for -0 + 0 = 0.
    assert torch.equal(passed.isnan(), x.isnan())
    assert torch.equal(passed.nan_to_num(), x.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits_is_pytorch_s(dtype):
    bits = torch.randint(-(2**31), 2**31, (1, 64, 4096), dtype=torch.int64).to(torch.int32)
    ties = (bits & -(2**13)) | 2**12 if dtype == torch.float16 else (bits & -(2**16)) | 2**15
    for pattern in (bits, ties):
        z = pattern.view(torch.float32)
        got = noise_inject(torch.zeros_like(z), torch.ones(1), 1, dtype=dtype, impl="cpp").z_in
        reference = noise_inject(torch.zeros_like(z), torch.ones(1), 1, impl="cpp").z_in
        assert torch.equal(got, reference.to(dtype))
        narrow = residual_adaln(
            z, torch.zeros_like(z), None, None, None, eps=1.0, out_dtype=dtype, impl="cpp"
        ).x_new
        assert torch.equal(narrow.isnan(), z.isnan())
        double = gated_residual(z.to(dtype), z, None, impl="cpp")
        expected = (z.to(dtype).float() + z).to(dtype)
        assert torch.equal(double.isnan(), expected.isnan())
        assert torch.equal(double.nan_to_num(), expected.nan_to_num())


CODE = """
import json, sys, torch
sys.path.insert(0, {folder!r})
from ops.shared.test_cpp import everything, problem
torch.manual_seed(0)
values = everything("cpp", *problem((2, 40, 133), torch.{dtype}))
flat = {{name: [t.double().flatten().tolist() for t in ts] for name, ts in values.items()}}
print(json.dumps([torch.ops.dblocks.cpu_set(), flat]))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_instruction_sets_agree(dtype):
    code = CODE.format(folder=str(ROOT / "tests"), dtype=dtype)
    environment = os.environ | {"DBLOCKS_CPU": "base", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    used, base = json.loads(done.stdout.splitlines()[-1])
    assert used == "base"
    torch.manual_seed(0)
    inputs = problem((2, 40, 133), getattr(torch, dtype))
    here = everything("cpp", *inputs)
    eager = everything("reference", *inputs)
    ref64 = everything("reference", *(t.double() for t in inputs))
    for name, values in base.items():
        for b, h, e, r in zip(values, here[name], eager[name], ref64[name], strict=True):
            other = torch.tensor(b, dtype=torch.float64).view(h.shape)
            assert_within_budget(other.to(h.dtype), r, e, f"{name}, base")


def cpu_set(wish):
    """The instruction set that a process with this wish uses, or its error."""
    code = "import torch, dblocks.functional; print(torch.ops.dblocks.cpu_set())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"DBLOCKS_CPU": wish}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout.strip() or done.stderr


def test_a_wish_for_an_instruction_set_may_be_in_any_case():
    assert cpu_set("BASE") == "base"
    assert cpu_set("Avx512") == cpu_set("")
    assert "DBLOCKS_CPU must be base, avx2 or avx512, got 'sse4'" in cpu_set("sse4")


def test_info_says_which_instruction_sets_there_are():
    done = subprocess.run(
        [sys.executable, "-m", "dblocks", "info"],
        env=os.environ | {"DBLOCKS_CPU": "sse4"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "built, but cannot run: DBLOCKS_CPU must be base, avx2 or avx512" in done.stdout


def test_auto_is_the_cpp_op_and_float64_the_reference():
    x = torch.randn(2, 40, 33)
    assert torch.equal(adaln(x, None, None), adaln(x, None, None, impl="cpp"))
    assert adaln(x.double(), None, None).dtype == torch.float64


@pytest.mark.filterwarnings("default")  # of torch.func itself
def test_transforms_use_the_reference():
    x, tangent = torch.randn(2, 2, 3, 8).unbind()
    f = lambda x: adaln(x, None, None)
    _, jvp = torch.func.jvp(f, (x,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = f(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, jvp)
    per_sample = torch.vmap(lambda x: f(x[None])[0])(x)
    torch.testing.assert_close(per_sample, f(x))


def test_without_the_extension_it_says_so(monkeypatch):
    x = torch.randn(1, 2, 8)
    expected = adaln(x, None, None, impl="reference")
    monkeypatch.setattr(_extension, "MISSING", _extension.NOT_BUILT)
    with pytest.raises(RuntimeError, match=r"impl='cpp' needs the C\+\+ ops, which are not built"):
        adaln(x, None, None, impl="cpp")
    assert torch.equal(adaln(x, None, None), expected)


def test_what_it_does_not_take():
    x = torch.randn(1, 2, 8)
    with pytest.raises(TypeError, match=r"impl='cpp' takes float32, .* got float64"):
        adaln(x.double(), None, None, impl="cpp")
    with pytest.raises(RuntimeError, match=r"impl='cpp' needs tensors on the CPU, got device meta"):
        adaln(x.to("meta"), None, None, impl="cpp")


def test_any_number_of_dimensions():
    y = torch.randn([1] * 40)
    sigma = torch.ones(1)
    got, expected = (noise_inject(y, sigma, 3, impl=impl) for impl in ("cpp", "reference"))
    torch.testing.assert_close(got.z, expected.z)
    assert got.z.shape == y.shape
