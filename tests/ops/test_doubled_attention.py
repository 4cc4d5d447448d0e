import itertools

import pytest
import torch
from attention_tools import DTYPES, IMPLS, ON_GPU, check, composed_dtype, problems, run, tensors
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dblocks.functional import doubled_attention
from dblocks.kernels import reference
from dblocks.ops._attention import chunks, composed
from tools import DEVICE, op


@given(problem=problems("composed"))
@settings(max_examples=150)
def test_composed_is_within_budget(problem):
    check("composed", *problem)


@given(problem=problems("triton"))
@settings(max_examples=8)
def test_triton_is_within_budget(problem):
    check("triton", *problem)


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
    options = (3, False, 0.25, ends, False, False, None, None, None, None, "sdpa")
    forward, backward = (op(f"doubled_attention_{d}", "composed") for d in ("fwd", "bwd"))
    torch.library.opcheck(forward, (q, k, v, *options))
    o, lse = forward(q, k, v, *options)
    for needs in ([True, True], [False, True]):
        args = (torch.ones_like(q), q, k, v, o, lse, *options, needs)
        torch.library.opcheck(backward, args)
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


@pytest.mark.parametrize("impl", ["auto", "reference", "composed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", ["q", "kv", "v", "qk"])
def test_several_dtypes_under_autocast_are_cast_to_its_own(impl, dtype, narrow):
    """As PyTorch's attention casts them; gradients have the dtypes of what was given."""
    inputs = dict(zip("qkv", tensors(T=8), strict=True))
    given = [x.to(dtype) if name in narrow else x for name, x in inputs.items()]
    given = [x.requires_grad_() for x in given]
    with pytest.raises(TypeError, match="must have the dtype of q"):
        doubled_attention(*given, impl=impl)
    with torch.autocast(DEVICE.type, dtype):
        o = doubled_attention(*given, impl=impl)
        torch.nn.functional.scaled_dot_product_attention(*given)
    o.sum().backward()
    alone = [x.detach().to(dtype).requires_grad_() for x in given]
    expected = doubled_attention(*alone, impl=impl)
    expected.sum().backward()
    assert o.dtype == dtype
    assert torch.equal(o, expected)
    for x, other in zip(given, alone, strict=True):
        assert x.grad.dtype == x.dtype
        assert torch.equal(x.grad, other.grad.to(x.dtype))


def test_several_dtypes_that_autocast_does_not_cast():
    q, k, v = tensors(T=8)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        with pytest.raises(TypeError, match="k must have the dtype of q"):
            doubled_attention(q, k.double(), v)
        with pytest.raises(TypeError, match="k must be float64, float32, bfloat16 or float16"):
            doubled_attention(q, k.long(), v)
        with pytest.raises(TypeError, match="v must be a tensor"):
            doubled_attention(q, k, None)
        with torch.autocast(DEVICE.type, enabled=False), pytest.raises(TypeError, match="dtype"):
            doubled_attention(q, k.bfloat16(), v)


def test_several_dtypes_under_autocast_in_one_graph():
    q, k, v = tensors(T=8)
    call = torch.compile(doubled_attention, fullgraph=True, backend="eager")
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = call(q, k.bfloat16(), v)
        assert torch.equal(found, doubled_attention(q, k.bfloat16(), v))


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
    options = (size, False, 0.25, None, False, False, None, None, None, None, "sdpa")
    # The operations inside of a registered one are not seen from outside of it.
    with Largest() as largest:
        o, lse = composed.forward(q, k, v, *options)
        composed.backward(q, q, k, v, o, lse, *options, [True, True])
    chunk = chunks.CHUNK
    limit = 2 * T * width if size == 1 else 2 * chunk * (T + chunk)
    assert 0 < largest.elements <= limit
