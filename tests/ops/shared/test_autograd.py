"""What every op owes to autograd: equal arguments in a graph, no second derivative in silence."""

from itertools import combinations

import pytest
import torch
from op_tools import CASES, IMPLS, OPS, SHAPES, D, N, T, arguments, total
from torch.utils.checkpoint import checkpoint

from dblocks.functional import adaln, edm_denoise, residual_adaln
from tools import needs_cpp, normal


def loss_and_grads(f, tensors, **options):
    loss = f(**tensors)
    leaves = [t for t in tensors.values() if t.requires_grad]
    return loss, torch.autograd.grad(loss, leaves, allow_unused=True, **options)


def pairs(op):
    """Pairs of an op's tensors that may be one tensor, and all of them."""
    names = OPS[op][1]
    kinds = {}
    for name in names:
        kinds.setdefault(SHAPES[name], []).append(name)
    groups = [group for group in kinds.values() if len(group) > 1]
    found = [pair for group in groups for pair in combinations(group, 2)]
    return found + [tuple(group) for group in groups if len(group) > 2]


@needs_cpp
@pytest.mark.parametrize(
    ("op", "same"), [(op, same) for op in OPS if op != "noise_inject" for same in pairs(op)]
)
def test_one_tensor_may_be_several_arguments_of_a_graph(op, same):
    torch.compiler.reset()
    call, _ = OPS[op]
    impl = IMPLS.get(op, ("", "cpp"))[-1]
    tensors = {name: t for name, t in arguments(op).items() if name not in same[1:]}

    def f(**tensors):
        return total(call(**tensors, **dict.fromkeys(same[1:], tensors[same[0]]), impl=impl))

    loss, grads = loss_and_grads(torch.compile(f, fullgraph=True, backend="aot_eager"), tensors)
    expected_loss, expected = loss_and_grads(f, tensors)
    torch.testing.assert_close(loss, expected_loss)
    for got, grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, grad)


@needs_cpp
@pytest.mark.parametrize("changed", [False, True])
def test_views_of_one_tensor_in_a_graph(changed):
    def f(x, s):
        x = x * 1
        branch, gate = x[:], s.unsqueeze(1).expand(-1, T, -1)
        if changed:
            x.mul_(2)  # branch too
        y = residual_adaln(x, branch, gate, gate, s[:, None].expand(-1, T, -1), impl="cpp")
        noised = edm_denoise(x, x.detach(), s[:, 0].exp(), impl="cpp")
        return total((*y, noised, adaln(s[:, None], s, s[:], impl="cpp")))

    torch.compiler.reset()
    tensors = {"x": normal(N, T, D), "s": normal(N, D, seed=1)}
    for t in tensors.values():
        t.requires_grad_()
    got = loss_and_grads(torch.compile(f, fullgraph=True, backend="aot_eager"), tensors)
    expected = loss_and_grads(f, tensors)
    torch.testing.assert_close(got, expected)


def penalty(f, tensors):
    """The norm of the gradients, whose own gradient is a second derivative."""
    _, grads = loss_and_grads(f, tensors, create_graph=True)
    return sum(g.square().sum() for g in grads if g is not None)


@pytest.mark.parametrize(("op", "impl"), CASES)
def test_a_second_derivative_is_refused_by_name(op, impl):
    call, _ = OPS[op]
    tensors = arguments(op)

    def f(**tensors):
        return total(call(**tensors, impl=impl)).sin()

    with pytest.raises(RuntimeError, match=rf'{op.split(",")[0]} has .* impl="reference"'):
        penalty(f, tensors)
    # What PyTorch's own decorator cannot see: an upstream gradient that needs none.
    with pytest.raises(RuntimeError, match=rf'{op.split(",")[0]} has .* impl="reference"'):
        penalty(lambda **tensors: total(call(**tensors, impl=impl)), tensors)
    with pytest.raises(RuntimeError, match=rf'{op.split(",")[0]} has .* impl="reference"'):
        penalty(lambda **tensors: checkpoint(f, **tensors, use_reentrant=False), tensors)


@pytest.mark.parametrize(("op", "impl"), CASES)
def test_first_derivatives_are_as_before(op, impl):
    call, _ = OPS[op]
    tensors = arguments(op)
    leaves = [t for t in tensors.values() if t.requires_grad]

    def f(*values):
        return total(call(**dict(zip(tensors, values, strict=True)), impl=impl))

    loss = f(*tensors.values())
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), first, rtol=0, atol=0)
    for reentrant in (False, True):
        for leaf in leaves:
            leaf.grad = None
        checkpoint(f, *tensors.values(), use_reentrant=reentrant).backward()
        torch.testing.assert_close(tuple(t.grad for t in leaves), first, rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_the_reference_has_second_derivatives(op):
    call, _ = OPS[op]
    tensors = arguments(op, torch.float64)
    leaves = [t for t in tensors.values() if t.requires_grad]

    def f(**tensors):
        return total(call(**tensors, impl="reference")).sin()

    value = penalty(f, tensors)
    got = torch.autograd.grad(value, leaves)
    # Along a direction, by differences.
    directions = [normal(*t.shape, seed=9).double() for t in leaves]
    ends = []
    for step in (1e-5, -1e-5):
        moved = iter([(t + step * d).detach() for t, d in zip(leaves, directions, strict=True)])
        at = {n: next(moved).requires_grad_() if t.requires_grad else t for n, t in tensors.items()}
        ends.append(penalty(f, at).detach())
    expected = (ends[0] - ends[1]) / 2e-5
    along = sum((g * d).sum() for g, d in zip(got, directions, strict=True))
    torch.testing.assert_close(along, expected, rtol=1e-5, atol=1e-6)
