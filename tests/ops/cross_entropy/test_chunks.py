"""What is in memory: the size of a chunk, and what is not computed where it is not needed."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dblocks.ops import _chunked_cross_entropy as chunked
from dblocks.ops import linear_cross_entropy as op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = ("chunked", "triton")
IGNORE = -100


def problem(R=10, V=7, D=6, dtype=torch.float32):
    """h, weight, target and bias."""
    h, weight = torch.randn(R, D).to(DEVICE, dtype), torch.randn(V, D).to(DEVICE, dtype)
    return h, weight, torch.randint(0, V, (R,), device=DEVICE), torch.randn(V, device=DEVICE)


@pytest.mark.parametrize("R", [1, 127, 128, 300, 2048, 100_000])
@pytest.mark.parametrize("V", [1, 103, 50_304, 10**6, 2**31])
@pytest.mark.parametrize("kind", ["cpu", "cuda", "xpu"])
def test_chunks_hold_a_part_of_the_logits(R, V, kind):
    rows = chunked.chunk_rows(R, V, kind)
    limit = chunked.MAX_LOGITS.get(kind, chunked.MAX_LOGITS["cuda"])
    assert 1 <= rows <= R
    assert rows <= max(-(-R // 4), 128, 2**20 // V)
    assert rows * V <= max(limit, 128 * V)
    # The chunks are about equal.
    assert R % rows == 0 or rows - R % rows <= -(-R // rows)


class Largest(TorchDispatchMode):
    """The most elements that a floating tensor had which an op made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_tensor_is_as_large_as_the_logits(monkeypatch, impl, dtype):
    monkeypatch.setattr(chunked, "MIN_ROWS", 1)
    monkeypatch.setattr(chunked, "MIN_LOGITS", 1)
    R, V = 64, 96
    h, weight, target, bias = problem(R, V, 8, dtype)
    # The ops in another op are seen only where that is called itself.
    forward = {"chunked": chunked.plain, "triton": chunked.triton}[impl]
    with Largest() as largest:
        forward(h, weight, target, bias, None, IGNORE, [True] * 3)
    assert largest.elements == R * V // 4
    with Largest() as whole:
        op.linear_cross_entropy(h, weight, target, bias=bias, impl="reference")
    assert whole.elements == R * V


@pytest.mark.parametrize("impl", FUSED)
def test_what_needs_no_gradient_costs_none(impl):
    h, weight, target, bias = problem()
    for needs in itertools.product([False, True], repeat=3):
        _, _, *sums, _ = op._OPS[impl](h, weight, target, bias, None, IGNORE, needs)
        for total, like, needed in zip(sums, (h, weight, bias), needs, strict=True):
            assert total.shape == (like.shape if needed else (0,))
    leaf = h.requires_grad_()
    with torch.no_grad():
        assert not op.linear_cross_entropy(leaf, weight, target, impl=impl).requires_grad
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        op.linear_cross_entropy(leaf, weight, target, bias=bias, impl=impl)
    assert [t.numel() for t in saved] == [1, h.numel(), 0, 0]


def test_products_are_widened_where_float16_is_summed_in_float16():
    assert chunked.sums_wide(torch.float16)
    settings = torch.backends.cuda.matmul
    settings.allow_fp16_accumulation = True
    try:
        assert not chunked.sums_wide(torch.float16)
        assert chunked.sums_wide(torch.bfloat16)
    finally:
        settings.allow_fp16_accumulation = False


@pytest.mark.parametrize(("library", "wide"), [("Cublas", True), ("Ck", False)])
def test_products_are_widened_with_a_library_that_has_none(monkeypatch, library, wide):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(
        torch.backends.cuda, "preferred_blas_library", lambda: f"_BlasBackend.{library}"
    )
    assert chunked.sums_wide(torch.bfloat16) == wide
