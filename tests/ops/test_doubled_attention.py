import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dblocks.functional import doubled_attention
from dblocks.kernels import reference
from dblocks.ops import _composed_attention
from dblocks.testing import error_budget
from tools import DEVICE, op

IMPLS = ("composed", "triton")
# The interpreter multiplies bfloat16 matrices wrongly, and a GPU's composition is of 16-bit ones.
ON_GPU = DEVICE.type == "cuda"
DTYPES = {
    "composed": [torch.float16, torch.bfloat16]
    + ([] if ON_GPU else [torch.float32, torch.float64]),
    "triton": [torch.float16, torch.float32] + ([torch.bfloat16] if ON_GPU else []),
}
WIDTHS = {"composed": [8, 16, 64] if ON_GPU else [1, 3, 8, 16, 40], "triton": [16, 24, 32]}
GROWTH = 4  # of a rounding in sums and exponentials


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@st.composite
def problems(draw, impl, max_rows=40):
    """The inputs q, k, v; the upstream gradient; the options."""
    dtype = draw(st.sampled_from(DTYPES[impl]))
    N, T = draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, max_rows))
    heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    width = draw(st.sampled_from(WIDTHS[impl]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    query = draw(st.sampled_from(["both", "noisy"]))
    rows = T if query == "noisy" else 2 * T
    cu_seqlens = None
    if N == 1 and not (impl == "composed" and ON_GPU) and draw(st.booleans()):
        cuts = draw(st.lists(st.integers(0, T), max_size=3))
        cu_seqlens = torch.tensor([0, *sorted(cuts), T], dtype=torch.int32, device=DEVICE)

    def tensor(heads, rows):
        layout = draw(st.sampled_from(["contiguous", "qkv", "expanded", "transposed"]))
        size = {"expanded": (1, heads, rows, width), "qkv": (N, rows, 3, heads, width)}
        size |= {"transposed": (N, heads, width, rows)}
        x = torch.randn(size.get(layout, (N, heads, rows, width)), generator=generator)
        x = x.to(DEVICE, dtype)
        views = {"expanded": lambda: x.expand(N, -1, -1, -1), "transposed": lambda: x.mT}
        views |= {"qkv": lambda: x[:, :, 1].transpose(1, 2)}
        return views.get(layout, lambda: x)()

    options = {
        "block_size": draw(st.sampled_from([1, 1, 2, 3, 4, 7, 16, 50])),
        "clean_causal": draw(st.sampled_from(["block", "token"])),
        "scale": draw(st.sampled_from([None, 0.3, 2.0])),
        "cu_seqlens": cu_seqlens,
        "query": query,
    }
    H = heads * group
    inputs = tensor(H, rows), tensor(heads, 2 * T), tensor(heads, 2 * T)
    return inputs, tensor(H, rows), options


def run(impl, inputs, upstream, options, dtype=None):
    """o and the gradients of q, k and v."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    o = doubled_attention(*leaves, impl=impl, **options)
    return [o.detach(), *torch.autograd.grad(o, leaves, upstream.to(o.dtype))]


def magnitudes(inputs, upstream, options):
    """o and the gradients with every term taken positive, and the largest score."""
    q, k, v, grad = (x.double() for x in (*inputs, upstream))
    T, group = k.shape[2] // 2, q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    names = ("block_size", "clean_causal", "cu_seqlens")
    mask = reference.doubled_mask(T, **{n: options[n] for n in names}, device=q.device)
    mask = mask[T:] if options["query"] == "noisy" else mask
    scale = options["scale"] or q.shape[-1] ** -0.5
    scores = q @ k.mT * scale
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    q, k, v, grad = (x.abs() for x in (q, k, v, grad))
    o = p @ v
    ds = p * scale * (grad @ v.mT + (grad * o).sum(-1, keepdim=True))
    summed = (x.unflatten(1, (-1, group)).sum(2) for x in (ds.mT @ q, p.mT @ grad))
    return [o, ds @ k, *summed], scores.abs().max().item()


def check(impl, inputs, upstream, options):
    """Within the budget around float64, and the rounding of what flash attention computes.

    Its backward takes exp(score - lse), with a relative error of eps |score|, and the difference of
    two sums, grad . v - grad . o, which may cancel: softmax's own backward is exactly 0 for a row
    with one key. Triton's matrix products take o and the probabilities in the dtype of q.
    """
    dtype = inputs[0].dtype
    got = run(impl, inputs, upstream, options)
    ref64 = run("reference", inputs, upstream, options, torch.float64)
    eager = run("reference", inputs, upstream, options)
    terms, score = magnitudes(inputs, upstream, options)
    eps = torch.finfo(wide(dtype) if impl == "composed" and not ON_GPU else dtype).eps
    eps += score * torch.finfo(wide(dtype)).eps
    for name, g, r, e, m in zip("oqkv", got, ref64, eager, terms, strict=True):
        assert g.shape == r.shape
        assert g.dtype == dtype
        error = (g.double() - r).abs().max().item()
        budget = error_budget(r, e, dtype) + GROWTH * eps * m.max().item()
        assert error <= budget, f"{impl}, {name}: error {error:.3e} is over {budget:.3e}"


@given(problem=problems("composed"))
@settings(max_examples=150)
def test_composed_is_within_budget(problem):
    check("composed", *problem)


@given(problem=problems("triton"))
@settings(max_examples=8)
def test_triton_is_within_budget(problem):
    check("triton", *problem)


def tensors(N=1, H=2, heads=2, T=6, width=16, rows=None, dtype=torch.float32):
    """Normal q, k, v."""
    make = lambda *shape: torch.randn(shape, device=DEVICE).to(dtype)
    return make(N, H, rows or 2 * T, width), *(make(N, heads, 2 * T, width) for _ in range(2))


def composed_dtype():
    return torch.float16 if ON_GPU else torch.float32


def test_the_mask_is_that_of_the_definition():
    for T, size, causal in itertools.product((1, 5, 8), (1, 2, 3, 8), ("block", "token")):
        mask = reference.doubled_mask(T, block_size=size, clean_causal=causal)
        for i, j in itertools.product(range(T), range(T)):
            assert mask[i, j] == (j <= i if causal == "token" else j // size <= i // size)
            assert not mask[i, T + j]
            assert mask[T + i, j] == (j // size < i // size)
            assert mask[T + i, T + j] == (j // size == i // size)
        n, r = divmod(T, size)
        earlier, own = size**2 * n * (n - 1) // 2 + r * n * size, n * size**2 + r**2
        clean = T * (T + 1) // 2 if causal == "token" else earlier + own
        assert mask.sum() == clean + earlier + own
    assert reference.doubled_mask(7).sum() == 7 * 8


def test_documents_do_not_see_each_other():
    ends = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    mask = reference.doubled_mask(8, block_size=2, cu_seqlens=ends)
    expected = torch.zeros(16, 16, dtype=torch.bool)
    for start, end in ((0, 3), (3, 8)):
        rows = torch.cat([torch.arange(start, end), torch.arange(8 + start, 8 + end)])
        expected[rows[:, None], rows] = reference.doubled_mask(end - start, block_size=2)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("causal", ["block", "token"])
@pytest.mark.parametrize("ends", [None, [0, 2, 5]])
def test_a_key_influences_the_rows_of_its_column_only(impl, size, causal, ends):
    if impl == "composed" and ON_GPU and ends:
        pytest.skip("documents are composed on the CPU only")
    T, dtype = 5, torch.float16 if impl == "triton" or ON_GPU else torch.float32
    q, k, v = tensors(T=T, dtype=dtype)
    ends = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    mask_options = {"block_size": size, "clean_causal": causal, "cu_seqlens": ends}
    mask = reference.doubled_mask(T, **mask_options, device=DEVICE)
    call = lambda k, v: doubled_attention(q, k, v, **mask_options, impl=impl)
    before = call(k, v)
    for column in range(2 * T):
        changed_k, changed_v = k.clone(), v.clone()
        changed_k[:, :, column] += 1
        changed_v[:, :, column] -= 1
        changed = (call(changed_k, changed_v) != before).any(-1)
        assert torch.equal(changed, mask[:, column].expand_as(changed)), column


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_noisy_rows_alone_are_the_second_half(impl):
    q, k, v = tensors(T=7, H=4, dtype=composed_dtype())
    for size in (1, 3):
        both = doubled_attention(q, k, v, block_size=size, impl=impl)
        noisy = doubled_attention(q[:, :, 7:], k, v, block_size=size, query="noisy", impl=impl)
        torch.testing.assert_close(noisy, both[:, :, 7:])


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_both_forms_are_one_at_block_size_1(impl):
    q, k, v = tensors(dtype=composed_dtype())
    first, second = (
        doubled_attention(q, k, v, clean_causal=c, impl=impl) for c in ("block", "token")
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_what_row_0_sees(impl):
    q, k, v = tensors(T=4, dtype=composed_dtype())
    o = doubled_attention(q, k, v, impl=impl)
    torch.testing.assert_close(o[:, :, [0, 4]], v[:, :, [0, 4]])
    alone = [x[:, :, [0, 4]] for x in (q, k, v)]
    torch.testing.assert_close(doubled_attention(*alone, impl=impl), alone[2])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 4])
def test_scores_of_ten_thousand_stay_finite(impl, dtype, size):
    if dtype not in DTYPES[impl]:
        pytest.skip("not of this implementation here")
    q, _, v = tensors(T=6, dtype=dtype)
    upstream = torch.randn_like(q)
    for factor in (1.0, -1.0):
        inputs = (50 * q, factor * 50 * q, v)
        assert (50 * 50 * q.float().square().sum(-1) * 4**-1).max() > 1e4
        for result in run(impl, inputs, upstream, {"block_size": size}):
            assert result.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 3])
def test_repeats_bit_for_bit(impl, size):
    inputs = tensors(H=4, T=20, dtype=composed_dtype())
    upstream = torch.randn_like(inputs[0])
    first, second = (run(impl, inputs, upstream, {"block_size": size}) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_gradients_that_are_needed(impl):
    inputs = tensors(dtype=composed_dtype())
    upstream = torch.ones_like(inputs[0])
    expected = run(impl, inputs, upstream, {})[1:]
    for needs in itertools.product((False, True), repeat=3):
        leaves = [x.detach().requires_grad_(n) for x, n in zip(inputs, needs, strict=True)]
        o = doubled_attention(*leaves, impl=impl)
        assert o.requires_grad == any(needs)
        if any(needs):
            o.sum().backward()  # an upstream gradient of stride 0
        for leaf, need, grad in zip(leaves, needs, expected, strict=True):
            assert (leaf.grad is not None) == need
            if need:
                torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_output_that_is_not_used(impl):
    q, k, v = (x.requires_grad_() for x in tensors(dtype=composed_dtype()))
    unused = torch.autograd.grad(
        (doubled_attention(q, k, v, impl=impl) * 0).sum() + q.sum(), (q, k, v)
    )
    assert torch.equal(unused[0], torch.ones_like(q))
    assert not any(grad.any() for grad in unused[1:])


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize(("N", "T"), [(0, 3), (2, 0)])
def test_empty(impl, N, T):
    inputs = tensors(N=N, T=T, dtype=composed_dtype())
    results = run(impl, inputs, torch.zeros_like(inputs[0]), {})
    assert [r.shape for r in results] == [x.shape for x in (inputs[0], *inputs)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 4])
def test_compiles_to_one_graph(impl, size):
    torch._dynamo.reset()
    call = lambda q, k, v: doubled_attention(q, k, v, block_size=size, impl=impl)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for T in (6, 9, 11) if impl == "composed" else (6,):
        inputs = tensors(H=4, T=T, dtype=composed_dtype())
        upstream = torch.randn_like(inputs[0])
        leaves = [x.requires_grad_() for x in inputs]
        got, expected = compiled(*leaves), call(*leaves)
        torch.testing.assert_close(got, expected)
        assert got.stride() == expected.stride()
        grads = (torch.autograd.grad(o, leaves, upstream) for o in (got, expected))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) <= 2  # the second for every T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ends", [None, torch.tensor([0, 2, 6], dtype=torch.int32)])
@pytest.mark.skipif(ON_GPU, reason="float32 and documents are composed on the CPU only")
def test_opcheck(dtype, ends):
    q, k, v = tensors(H=4, dtype=dtype)
    options = (3, True, 0.25, ends, "sdpa")
    forward, backward = (op(f"doubled_attention_{d}", "composed") for d in ("fwd", "bwd"))
    torch.library.opcheck(forward, (q, k, v, *options))
    o, lse = forward(q, k, v, *options)
    torch.library.opcheck(backward, (torch.ones_like(q), q, k, v, o, lse, *options))
    _, expected = reference.doubled_attention(q, k, v, block_size=3, scale=0.25, cu_seqlens=ends)
    torch.testing.assert_close(lse, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_o_lies_as_rows_of_heads(impl):
    q, k, v = tensors(N=2, H=4, T=3, dtype=composed_dtype())
    assert doubled_attention(q, k, v, impl=impl).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_autocast_has_no_effect(impl):
    inputs = tensors(T=8, dtype=composed_dtype())
    for size in (1, 3):
        plain = doubled_attention(*inputs, block_size=size, impl=impl)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            cast = doubled_attention(*inputs, block_size=size, impl=impl)
        assert torch.equal(plain, cast)


@pytest.mark.filterwarnings("default")  # PyTorch's own, of torch.jit in forward-mode derivatives
def test_transforms_take_the_reference():
    q, k, v = tensors(N=2, T=3)
    each = torch.func.vmap(lambda *x: doubled_attention(*(t[None] for t in x))[0])(q, k, v)
    torch.testing.assert_close(each, doubled_attention(q, k, v))
    loss = lambda q: doubled_attention(q, k, v).square().sum()
    expected = torch.autograd.functional.jacobian(
        lambda q: doubled_attention(q, k, v, impl="reference").square().sum(), q
    )
    torch.testing.assert_close(torch.func.grad(loss)(q), expected)
    _, tangent = torch.func.jvp(loss, (q,), (torch.ones_like(q),))
    torch.testing.assert_close(tangent, expected.sum())


def test_gradcheck_of_the_reference():
    inputs = [x.double().requires_grad_() for x in tensors(H=2, heads=1, T=3, width=2)]
    call = lambda q, k, v: doubled_attention(q, k, v, block_size=2, impl="reference")
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_saved_is_linear_in_T(impl):
    T, width = 64, 16
    saved = []
    leaves = [x.requires_grad_() for x in tensors(T=T, width=width, dtype=composed_dtype())]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        doubled_attention(*leaves, impl=impl)
    assert sum(x.numel() for x in saved) == 2 * (4 * 2 * T * width + 2 * T)  # q, k, v, o and lse


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("query", ["both", "noisy"])
@pytest.mark.skipif(ON_GPU, reason="of the CPU's operations")
def test_no_tensor_of_the_composition_is_quadratic_in_T(size, query):
    T, width = 512, 16
    q, k, v = tensors(H=1, heads=1, T=T, width=width, rows=T if query == "noisy" else None)
    options = (size, True, 0.25, None, "sdpa")
    # The operations inside of a registered one are not seen from outside of it.
    with Largest() as largest:
        o, lse = _composed_attention._forward(q, k, v, *options)
        _composed_attention._backward(q, q, k, v, o, lse, *options)
    assert 0 < largest.elements <= 2 * T * width


Q = torch.zeros(1, 2, 4, 16)
TRITON = {"impl": "triton"}
DOCUMENTS = torch.tensor([0, 1, 2], dtype=torch.int32)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "q must be a tensor, got NoneType", {"q": None}),
        (TypeError, "k must be float64, .* got torch.int64", {"k": Q.long()}),
        (TypeError, "v must have the dtype of q, .*32, got .*16", {"v": Q.half()}),
        (RuntimeError, "k must be on cpu .* got meta", {"k": Q.to("meta")}),
        (ValueError, r"q must have shape \[N, heads, rows, Dh\], got \[2, 4, 16\]", {"q": Q[0]}),
        (ValueError, "query must be one of .* got 'clean'", {"query": "clean"}),
        (ValueError, "clean_causal must be one of .* got 'row'", {"clean_causal": "row"}),
        (TypeError, "block_size must be an int, got float", {"block_size": 1.0}),
        (TypeError, "block_size must be an int, got bool", {"block_size": True}),
        (ValueError, "block_size must be at least 1, got 0", {"block_size": 0}),
        (TypeError, "scale must be a real number, got str", {"scale": "1"}),
        (ValueError, r"k and v must have shape .* \[1, Hkv, 2T, 16\] and", {"v": Q[:, :, :2]}),
        (ValueError, "k and v must have shape", {"k": Q[..., :8], "v": Q[..., :8]}),
        (ValueError, "got the odd number 3", {"k": Q[:, :, :3], "v": Q[:, :, :3]}),
        (ValueError, "q must have 4 rows .* query='both', got 2", {"q": Q[:, :, :2]}),
        (ValueError, "q must have 2 rows .* query='noisy', got 4", {"query": "noisy"}),
        (ValueError, "multiple of those of k, got 3 and 2", {"q": torch.zeros(1, 3, 4, 16)}),
        (ValueError, "Dk must be at least 1", dict.fromkeys("qkv", Q[..., :0])),
        (TypeError, "cu_seqlens must be a tensor, got list", {"cu_seqlens": [0, 2]}),
        (TypeError, "cu_seqlens must be int32, got torch.int64", {"cu_seqlens": DOCUMENTS.long()}),
        (RuntimeError, "cu_seqlens must be on cpu", {"cu_seqlens": DOCUMENTS.to("meta")}),
        (ValueError, r"must have shape \[documents \+ 1\]", {"cu_seqlens": DOCUMENTS[:1]}),
        (
            ValueError,
            "cu_seqlens needs N = 1, got N = 2",
            dict.fromkeys("qkv", torch.zeros(2, 2, 4, 16)) | {"cu_seqlens": DOCUMENTS},
        ),
        (ValueError, r"start with 0, .* T = 2, got \[1, 2\]", {"cu_seqlens": DOCUMENTS[1:]}),
        (ValueError, r"end with T = 2, got \[0, 1\]", {"cu_seqlens": DOCUMENTS[:2]}),
        (
            ValueError,
            r"never decrease .* got \[0, 2, 1, 2\]",
            {"cu_seqlens": torch.tensor([0, 2, 1, 2], dtype=torch.int32)},
        ),
        (ValueError, "impl must be one of auto, .* got 'cpp'", {"impl": "cpp"}),
        (ValueError, "backend must be one of sdpa, .* got 'math'", {"backend": "math"}),
        (TypeError, "impl='triton' .* got float64", dict.fromkeys("qkv", Q.double()) | TRITON),
    ],
)  # fmt: skip
@pytest.mark.skipif(ON_GPU, reason="the same checks, with tensors on the CPU")
def test_bad_arguments(error, message, arguments):
    given = {"q": Q, "k": Q, "v": Q} | arguments
    with pytest.raises(error, match=message):
        doubled_attention(**given)
