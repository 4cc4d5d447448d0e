"""The Triton kernels of doubled_attention at their limits, and as an op of PyTorch."""

import os
import subprocess
import sys

import pytest
import torch
from attention_kernel_tools import (
    PLAIN,
    documents,
    expected,
    forward,
    gradients,
    ranges,
)

from dblocks.functional import doubled_attention
from dblocks.kernels.attention import layout
from dblocks.testing import assert_within_budget
from tools import DEVICE, ROOT, normal, op

pytestmark = pytest.mark.usefixtures("poisoned_empty")


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


INTERPRETED_BFLOAT16 = """
import torch
from dblocks.functional import doubled_attention
from dblocks.kernels import reference
from dblocks.testing import assert_within_budget
torch.manual_seed(0)
for size, count in ((1, "both"), (3, "both"), (3, "noisy")):
    rows = 12 if count == "noisy" else 24
    options = dict(block_size=size, clean_causal="block", scale=0.25, cu_seqlens=None, query=count,
        order="clean_noisy", valid=None, window=None, softcap=None, alibi_slopes=None)
    tensors = [torch.randn(1, 2, n, 16).bfloat16() for n in (rows, 24, 24, rows)]
    def results(f, dtype):
        *leaves, do = (x.to(dtype).requires_grad_() for x in tensors)
        o = f(*leaves)
        return [o, *torch.autograd.grad(o, leaves, do.detach())]
    plain = lambda *x: reference.doubled_attention(*x, **options)[0]
    got = results(lambda *x: doubled_attention(*x, **options, impl="triton"), torch.bfloat16)
    ref64, eager = results(plain, torch.float64), results(plain, torch.bfloat16)
    for name, *x in zip(("o", "dq", "dk", "dv"), got, ref64, eager):
        print(name, float((x[0] - x[1]).abs().max()), float((x[2] - x[1]).abs().max()))
        torch.testing.assert_close(x[0].double(), x[1], atol=0.02, rtol=0.01)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
def test_interpreted_bfloat16_is_right_without_the_rounding_of_the_tests():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED_BFLOAT16]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


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
    valid = None if packed else ranges((0, 7), (2, 10))
    q, k, v = (normal(1 if packed else 2, h, 20, 16, seed=h) for h in (4, 2, 2))
    options = (2, True, 0.25, cu_seqlens, False, True, valid, 5, 9.0, normal(4).abs(), None)
    forward_op, backward_op = (op(f"doubled_attention_{d}", "triton") for d in ("fwd", "bwd"))
    torch.library.opcheck(forward_op, (q, k, v, *options))
    o, lse = forward_op(q, k, v, *options)
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(backward_op, (o, q, k, v, o, lse, *options, needs))


def call(q, k, v, **options):
    given = {
        "block_size": 1, "clean_causal": "block", "scale": 0.25, "cu_seqlens": None,
        "query": "both", "order": "clean_noisy", "valid": None, "window": None, "softcap": None,
        "alibi_slopes": None,
    }  # fmt: skip
    return doubled_attention(q, k, v, **given | options, impl="triton")


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
    options = {"valid": ranges((0, 7), (2, 10)), "window": 4, "softcap": 9.0}
    options["alibi_slopes"] = torch.ones(4, device=DEVICE)
    f = lambda q, k, v: call(q.sin(), k, v, block_size=3, **options).square().sum()
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
                for tile in layout.settings(width, dtype, target):
                    assert min(tile.BLOCK_M, tile.BLOCK_K) >= 16  # of matrix instructions
                    assert not any(n & (n - 1) for n in tile[:3])
