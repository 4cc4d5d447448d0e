import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dblocks.functional import gated_residual
from dblocks.kernels._common import launches
from dblocks.ops import _dispatch
from dblocks.testing import check_against_reference, token_problems
from tools import FUSED, IMPLS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def problems(max_rows=64):
    return token_problems(
        ("x", "branch"), ("gate",), (),
        required=("x", "branch"), outputs=1, max_rows=max_rows, device=DEVICE,
    )  # fmt: skip


def call(*, impl, x, branch, gate=None):
    return [gated_residual(x, branch, gate, impl=impl)]


@pytest.mark.parametrize("impl", IMPLS)
@given(problem=problems(), data=st.data())
def test_forward_and_gradients_are_within_budget(impl, problem, data):
    inputs, upstream = problem
    needed = data.draw(st.lists(st.sampled_from(list(inputs)), unique=True))
    check_against_reference(call, inputs, upstream, impl=impl, needs_grad=needed)


@given(problem=problems(max_rows=24))
def test_second_form_for_wide_rows(problem):
    inputs, upstream = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launches, "MAX_ONE_PASS_WIDTH", 0)
        patch.setattr(_dispatch, "_plans", {})
        check_against_reference(call, inputs, upstream, impl="triton")


def test_gradcheck_of_the_reference():
    shapes = ((2, 4, 5), (2, 4, 5), (2, 2, 5))
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(gated_residual, tensors)


@pytest.mark.parametrize("impl", FUSED)
def test_saves_the_branch_only_for_the_gate(impl):
    x, branch = (torch.randn(2, 6, 10, device=DEVICE, requires_grad=True) for _ in range(2))
    gate = torch.randn(2, 10, device=DEVICE)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda s: s):
        gated_residual(x, branch, gate, impl=impl)
        assert not any(t.shape == x.shape for t in saved)
        gated_residual(x, branch, gate.requires_grad_(), impl=impl)
        assert sum(t.shape == x.shape for t in saved) == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_to_one_graph(impl):
    leaves = [
        torch.randn(s, device=DEVICE, requires_grad=True) for s in ((2, 4, 8), (2, 4, 8), (2, 8))
    ]
    f = lambda x, branch, gate: gated_residual(x, branch, gate, impl=impl).square().sum()
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(f(*leaves), leaves)
    for g, e in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl):
    x, branch = (torch.randn(2, 0, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    gate = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    x_new = gated_residual(x, branch, gate, impl=impl)
    x_new.sum().backward()
    assert x_new.shape == (2, 0, 8)
    assert torch.equal(gate.grad, torch.zeros_like(gate))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"x must have shape \[N, T, D\]", {"x": torch.randn(4)}),
        (ValueError, r"branch must have the shape of x", {"branch": torch.randn(2, 4)}),
        (ValueError, r"gate must have shape", {"gate": torch.randn(3, 4)}),
        (TypeError, r"gate must be float64", {"gate": torch.ones(2, 4, dtype=torch.bool)}),
        (RuntimeError, r"gate must be on", {"gate": torch.ones(2, 4, device="meta")}),
        (ValueError, r"impl must be one of", {"impl": "fast"}),
        (TypeError, r"branch must be a tensor, got NoneType", {"branch": None}),
        (TypeError, r"gate must be a tensor, got float", {"gate": 1.0}),
    ],
)
def test_bad_arguments(error, message, arguments):
    x = torch.randn(2, 6, 4)
    given = {"x": x, "branch": x, "gate": torch.randn(2, 4)} | arguments
    with pytest.raises(error, match=message):
        gated_residual(given.pop("x"), given.pop("branch"), given.pop("gate"), **given)
