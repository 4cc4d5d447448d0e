"""The composition's backends, for which plain functions with their signatures stand in."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dblocks.functional import doubled_attention
from dblocks.kernels import reference
from dblocks.ops import _dispatch
from dblocks.ops import doubled_attention as op
from dblocks.ops._attention import backends, composed
from tools import seeded

aten = torch.ops.aten
SDPA = backends.BACKENDS["sdpa"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def causal(q, k, v, scale):
    """o and log-sum-exp of causal attention over [N, heads, T, Dh], dense."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    scores = scores.masked_fill(scores.new_ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def causal_backward(grad, q, k, v, o, lse, scale):
    """The share of these keys in the gradients, in a softmax whose o and lse are given."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    p = (q @ keys.mT * scale - lse.unsqueeze(-1)).exp().tril()
    ds = p * (grad @ values.mT - (grad * o).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (ds.mT @ q, p.mT @ grad))
    return ds @ keys, dk, dv


def rows_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def flash_attn():
    """flash_attn.flash_attn_interface: [N, T, heads, Dh], natural log-sum-exp [N, heads, T]."""

    def forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, return_softmax,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0, 0, None, False)
        assert causal
        assert window_size_left == window_size_right == -1
        o, lse = causal_of(*rows_first(q, k, v), softmax_scale)
        return o.transpose(1, 2), lse, None, None

    causal_of = globals()["causal"]

    def backward(
        upstream, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes) == (0, 0, None)
        assert causal
        assert deterministic
        assert window_size_left == window_size_right == -1
        assert softmax_lse.is_contiguous()
        upstream, q, k, v, out = rows_first(upstream, q, k, v, out)
        grads = causal_backward(upstream, q, k, v, out, softmax_lse, softmax_scale)
        for to, part in zip((dq, dk, dv), rows_first(*grads), strict=True):
            to.copy_(part)

    interface = ModuleType("flash_attn.flash_attn_interface")
    interface._wrapped_flash_attn_forward = forward
    interface._wrapped_flash_attn_backward = backward
    package = ModuleType("flash_attn")
    package.flash_attn_interface = interface
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def flash_attn_3():
    """flash_attn_interface, of FlashAttention 3: as flash_attn, by keywords."""
    causal_of = globals()["causal"]

    def forward(q, k, v, *, softmax_scale=None, causal=False, window_size_left=-1):
        assert causal
        o, lse = causal_of(*rows_first(q, k, v), softmax_scale)
        return o.transpose(1, 2), lse, torch.tensor([]), torch.tensor([])

    def backward(
        upstream, q, k, v, out, softmax_lse, *, dq=None, dk=None, dv=None, softmax_scale=None,
        is_causal=False, deterministic=False,
    ):  # fmt: skip
        assert is_causal
        assert deterministic
        assert softmax_lse.is_contiguous()
        upstream, q, k, v, out = rows_first(upstream, q, k, v, out)
        grads = causal_backward(upstream, q, k, v, out, softmax_lse, softmax_scale)
        for to, part in zip((dq, dk, dv), rows_first(*grads), strict=True):
            to.copy_(part)

    interface = ModuleType("flash_attn_interface")
    interface._flash_attn_forward, interface._flash_attn_backward = forward, backward
    return {"flash_attn_interface": interface}


def xformers():
    """xformers.ops.fmha: [N, T, heads, Dh], as many heads everywhere, log-sum-exp rows padded."""

    class LowerTriangularMask:
        pass

    def forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert isinstance(attn_bias, LowerTriangularMask)
        assert query.shape == key.shape
        o, lse = causal(*rows_first(query, key, value), scale)
        return o.transpose(1, 2), torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32))

    def backward(
        grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        assert isinstance(attn_bias, LowerTriangularMask)
        assert query.shape == key.shape == output.shape
        grad, q, k, v, o = rows_first(grad, query, key, value, output)
        return tuple(rows_first(*causal_backward(grad, q, k, v, o, lse, scale)))

    package, ops, fmha = (ModuleType(n) for n in ("xformers", "xformers.ops", "xformers.ops.fmha"))
    package.ops, ops.fmha = ops, fmha
    fmha.LowerTriangularMask = LowerTriangularMask
    fmha.memory_efficient_attention_forward_requires_grad = forward
    fmha.memory_efficient_attention_backward = backward
    return {"xformers": package, "xformers.ops": ops, "xformers.ops.fmha": fmha}


def cudnn():
    """PyTorch's operators for cuDNN, whose log-sum-exp is [N, heads, T, 1]."""

    def forward(q, k, v, bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
        assert (bias, compute_log_sumexp, dropout_p, is_causal) == (None, True, 0, True)
        o, lse = causal(q, k, v, scale)
        return o, lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], None, None, None

    def backward(
        grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias,
        cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale=None,
    ):  # fmt: skip
        assert attn_bias is cum_seq_q is cum_seq_k is None
        assert (max_q, max_k, dropout_p, is_causal) == (query.shape[2], key.shape[2], 0, True)
        assert logsumexp.is_contiguous()
        return causal_backward(grad_out, query, key, value, out, logsumexp.squeeze(-1), scale)

    return SimpleNamespace(
        _scaled_dot_product_cudnn_attention=SimpleNamespace(default=forward),
        _scaled_dot_product_cudnn_attention_backward=SimpleNamespace(default=backward),
    )


@pytest.fixture(params=backends.BACKENDS)
def backend(request, monkeypatch):
    """The name of a backend that can be called on the CPU."""
    packages = {"flash_attn": flash_attn, "flash_attn_3": flash_attn_3, "xformers": xformers}
    if request.param in packages:
        for name, module in packages[request.param]().items():
            monkeypatch.setitem(sys.modules, name, module)
    if request.param == "cudnn":
        monkeypatch.setattr(backends, "aten", cudnn())
    return request.param


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_a_backend_is_causal_attention(backend, heads):
    q, grad = normal(2, 4, 5, 8), normal(2, 4, 5, 8, seed=1)
    k, v = normal(2, 2, heads, 5, 8, seed=2)
    o, lse = backends.BACKENDS[backend].forward(q, k, v, 0.3)
    expected = causal(q, k, v, 0.3)
    tolerance = {"rtol": 1e-6, "atol": 1e-6}  # xformers has its log-sum-exp in float32
    torch.testing.assert_close(o, expected[0], **tolerance)
    torch.testing.assert_close(lse.double(), expected[1], **tolerance)
    # o and lse of a softmax over more keys
    o, lse = normal(2, 4, 5, 8, seed=3), expected[1] + 1
    grads = backends.BACKENDS[backend].backward(grad, q, k, v, o, lse, 0.3)
    for got, plain in zip(grads, causal_backward(grad, q, k, v, o, lse, 0.3), strict=True):
        torch.testing.assert_close(got.double(), plain, **tolerance)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("query", ["both", "noisy"])
@pytest.mark.parametrize("v_width", [8, 16, 4])
def test_the_composition_of_each_backend(backend, monkeypatch, size, query, v_width):
    monkeypatch.setattr(backends, "choose", lambda name, q, v, **options: name)
    # As on a GPU, where blocks are not computed in chunks.
    monkeypatch.setattr(composed, "_in_chunks", lambda *_: False)
    q = normal(2, 4, 7 if query == "noisy" else 14, 8)
    k, v = normal(2, 2, 14, 8, seed=1), normal(2, 2, 14, v_width, seed=2)
    options = {"block_size": size, "query": query, "order": "noisy_clean", "scale": -0.3}
    results = []
    for impl, name in (("composed", backend), ("reference", None)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        o = doubled_attention(*leaves, **options, impl=impl, backend=name)
        results.append([o, *torch.autograd.grad(o.square().sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_operators_have_the_arguments_that_are_passed():
    """Those of GPUs cannot run here: their schemas must take the call."""
    names = {
        "_scaled_dot_product_flash_attention": 6,
        "_scaled_dot_product_flash_attention_backward": 14,
        "_scaled_dot_product_cudnn_attention": 8,
        "_scaled_dot_product_cudnn_attention_backward": 15,
    }
    for name, positional in names.items():
        arguments = getattr(aten, name).default._schema.arguments
        assert sum(not a.kwarg_only for a in arguments) == positional, name
        assert arguments[-1].name == "scale"


Q = torch.zeros(1, 2, 4, 16)


@pytest.mark.parametrize(
    ("name", "q", "error", "message"),
    [
        ("flash_attn", Q, ImportError, "needs the package flash-attn, .* `pip install flash-attn`"),
        ("xformers", Q, ImportError, "needs the package xformers, which is not installed"),
        ("cudnn", Q, RuntimeError, "backend='cudnn' needs tensors on a GPU, got device cpu"),
        ("sdpa", Q.to("meta"), RuntimeError, "needs tensors on a GPU or CPU, got device meta"),
        (None, Q.to("meta"), RuntimeError, "needs tensors on a GPU or CPU, got device meta"),
    ],
)
def test_a_backend_that_cannot_run(name, q, error, message):
    with pytest.raises(error, match=message):
        doubled_attention(q, q, q, impl="composed", backend=name)


def on_gpu(dtype=torch.float16, width=64, rows=8):
    """What of a tensor on a GPU the checks look at."""
    shape = (1, 2, rows, width)
    device = SimpleNamespace(type="cuda")
    return SimpleNamespace(is_cpu=False, device=device, dtype=dtype, shape=shape)


@pytest.fixture
def gpu(monkeypatch):
    """The compute capability that every GPU has."""
    found = SimpleNamespace(capability=(9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found.capability)
    return found


def choose(name, q, v=None, **options):
    return backends.choose(name, q, q if v is None else v, **options)


@pytest.fixture
def installed(gpu, monkeypatch):
    """The packages that there are: those of this environment, and what is added."""
    names, find = set(), importlib.util.find_spec
    there = lambda name, *a: object() if name in names else find(name, *a)
    monkeypatch.setattr(importlib.util, "find_spec", there)
    return names


def test_what_a_backend_takes_on_a_gpu(gpu):
    gpu.capability = (8, 9)
    assert choose(None, on_gpu()) == "sdpa"
    assert choose("cudnn", on_gpu(width=128)) == "cudnn"
    for q, error, message in (
        (on_gpu(torch.float32), TypeError, "takes float16, bfloat16 on a GPU, got torch.float32"),
        (on_gpu(width=136), ValueError, "takes Dk a multiple of 8 up to 128 on a GPU, got 136"),
        (on_gpu(width=12), ValueError, "takes Dk a multiple of 8 up to 128 on a GPU, got 12"),
    ):
        with pytest.raises(error, match=message):
            choose("cudnn", q)
    with pytest.raises(ValueError, match="takes Dv a multiple of 8 up to 128 on a GPU, got 160"):
        choose("cudnn", on_gpu(), on_gpu(width=160))
    for name in ("cu_seqlens", "valid", "window", "softcap", "alibi_slopes"):
        with pytest.raises(RuntimeError, match=f"{name} on a CPU only; use impl='triton'"):
            choose("sdpa", on_gpu(), **{name: 4})
    gpu.capability = (7, 5)
    with pytest.raises(RuntimeError, match=r"capability \(8, 0\) or more"):
        choose("sdpa", on_gpu())


def test_a_package_is_looked_for_when_it_is_asked_for(gpu, installed):
    with pytest.raises(ImportError, match="needs the package flash-attn-3, which is not installed"):
        choose("flash_attn_3", on_gpu())
    installed |= {"flash_attn", "flash_attn_interface", "xformers"}
    assert choose("flash_attn", on_gpu()) == "flash_attn"
    assert choose("flash_attn_3", on_gpu()) == "flash_attn_3"
    assert choose(None, on_gpu(torch.float32)) == "xformers"
    gpu.capability = (8, 9)
    with pytest.raises(RuntimeError, match=r"'flash_attn_3' needs .* capability \(9, 0\) or more"):
        choose("flash_attn_3", on_gpu())


@pytest.fixture
def any_order():
    """Without the determinism that other tests of the ops ask for."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("any_order")
def test_fast_backends_come_first(gpu, installed, monkeypatch):
    assert choose(None, on_gpu()) == "cudnn"
    assert choose(None, on_gpu(width=192)) == "sdpa"  # too wide for cuDNN
    torch.use_deterministic_algorithms(True)
    assert choose(None, on_gpu()) == "sdpa"
    installed.add("flash_attn_interface")
    assert choose(None, on_gpu()) == choose(None, on_gpu(width=192)) == "flash_attn_3"
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA4")
    assert choose(None, on_gpu()) == "sdpa"
    gpu.capability = (8, 0)
    assert not any(backends.is_fast(name, on_gpu()) for name in backends.BACKENDS)


def pick(q, v=None, **options):
    return op.explained(q, q, q if v is None else v, **options)[0]


def test_what_auto_picks(gpu, monkeypatch):
    rows = torch.zeros(1, 2, 64, 16)
    assert pick(rows) == pick(rows.bfloat16()) == pick(rows, window=3, softcap=1.0) == "composed"
    assert pick(rows[:, :, :62]) == pick(rows.double()) == pick(rows.to("meta")) == "reference"
    monkeypatch.setattr(_dispatch, "HAS_TRITON", True)
    assert pick(on_gpu()) == pick(on_gpu(torch.float32)) == pick(on_gpu(), window=3) == "triton"
    assert pick(on_gpu(), block_size=200) == pick(on_gpu(width=8)) == "composed"
    assert pick(on_gpu(), on_gpu(width=8)) == "composed"
    for option in ("cu_seqlens", "valid", "window", "softcap", "alibi_slopes"):
        assert pick(on_gpu(), block_size=200, **{option: 1}) == "reference"
    assert pick(on_gpu(torch.float32, width=20)) == "reference"
    monkeypatch.setattr(_dispatch, "HAS_TRITON", False)
    assert pick(on_gpu()) == "composed"


@pytest.mark.usefixtures("any_order")
@pytest.mark.parametrize(("width", "T"), [(64, 4096), (80, 2048), (128, 2048)])
def test_auto_has_a_crossover_where_attention_is_fast(gpu, monkeypatch, width, T):
    monkeypatch.setattr(_dispatch, "HAS_TRITON", True)
    below, above = (on_gpu(width=width, rows=rows) for rows in (2 * T - 2, 2 * T))
    assert pick(below) == "triton"
    assert pick(above) == "composed"
    assert pick(above, block_size=2) == pick(above, valid=1) == pick(above, window=9) == "triton"
    assert pick(on_gpu(torch.float32, width, 2 * T)) == "triton"
    gpu.capability = (8, 9)
    assert pick(above) == "triton"


def test_a_backend_means_composed():
    options = {"block_size": 1}
    resolve = lambda impl, backend: op.resolve(impl, backend, Q, Q, Q, options)
    assert resolve("auto", "sdpa") == resolve("composed", "sdpa") == "composed"
    expected = reference.doubled_attention(Q + 1, Q + 1, Q + 1)[0]
    torch.testing.assert_close(doubled_attention(Q + 1, Q + 1, Q + 1, backend="sdpa"), expected)
    with pytest.raises(ValueError, match="backend must be None with impl='triton', got 'sdpa'"):
        resolve("triton", "sdpa")
