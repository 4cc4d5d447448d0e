"""Transforms of torch.func and forward-mode differentiation, of every op, in graphs as well."""

import pytest
import torch
from op_tools import CASES, OPS, arguments, total
from torch.autograd import forward_ad

from tools import normal

pytestmark = pytest.mark.filterwarnings("default")  # PyTorch's own, of torch.jit


def problem(op, dtype=torch.float32):
    """The op as a function of all its tensors, the tensors, and a tangent of each."""
    tensors = {name: t.detach() for name, t in arguments(op, dtype).items()}

    def f(*values, impl="auto"):
        return total(OPS[op][0](**dict(zip(tensors, values, strict=True)), impl=impl)).sin()

    tangents = [normal(*t.shape, seed=9).to(dtype) for t in tensors.values()]
    return f, list(tensors.values()), tangents


def along(f, values, tangents, step=1e-4):
    """The derivative along the tangents, by differences of the fourth order."""

    def at(k):
        return f(*(v + k * step * t for v, t in zip(values, tangents, strict=True)))

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


@pytest.mark.parametrize("op", OPS)
def test_every_argument_has_its_tangent(op):
    f, values, tangents = problem(op, torch.float64)
    nothing = [torch.zeros_like(t) for t in tangents]
    for i, tangent in enumerate(tangents):
        alone = [*nothing[:i], tangent, *nothing[i + 1 :]]
        _, derivative = torch.func.jvp(f, tuple(values), tuple(alone))
        torch.testing.assert_close(derivative, along(f, values, alone), rtol=1e-7, atol=1e-9)
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, values, tangents)
        derivative = forward_ad.unpack_dual(f(*duals)).tangent
    torch.testing.assert_close(derivative, along(f, values, tangents), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_a_tangent(op):
    f, values, tangents = problem(op, torch.float64)
    given = arguments(op).values()
    leaves = [v.requires_grad_() for v, t in zip(values, given, strict=True) if t.requires_grad]

    def grads(derivative):
        return torch.autograd.grad(derivative.square(), leaves)

    got = grads(torch.func.jvp(f, tuple(values), tuple(tangents))[1])
    torch.testing.assert_close(got, grads(along(f, values, tangents)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_the_tangent_of_float32(op):
    f, values, tangents = problem(op)
    _, derivative = torch.func.jvp(f, tuple(values), tuple(tangents))
    wide = [[t.double() for t in ts] for ts in (values, tangents)]
    # The sine's argument is a sum of many terms, whose rounding its slope sees.
    torch.testing.assert_close(derivative.double(), along(f, *wide), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_transforms_within_a_graph(op):
    torch.compiler.reset()
    f, values, tangents = problem(op)

    def derivatives(values, tangents):
        everything = tuple(range(len(values)))
        return torch.func.jvp(f, values, tangents), torch.func.grad(f, everything)(*values)

    got = torch.compile(derivatives, fullgraph=True, backend="aot_eager")(
        tuple(values), tuple(tangents)
    )
    torch.testing.assert_close(got, derivatives(tuple(values), tuple(tangents)))
    assert all(g.abs().sum() > 0 for g in got[1])


@pytest.mark.parametrize(("op", "impl"), CASES)
@pytest.mark.parametrize("graph", [False, True])
def test_a_named_implementation_says_that_it_has_no_part_in_them(op, impl, graph):
    f, values, tangents = problem(op)

    def derivative(*values):
        return torch.func.jvp(lambda *v: f(*v, impl=impl), values, tuple(tangents))

    if graph:
        torch.compiler.reset()
        derivative = torch.compile(derivative, fullgraph=True, backend="eager")
    name = op.split(",")[0]
    with pytest.raises(Exception, match=rf"{name}: impl='{impl}' has no part in torch.func"):
        derivative(*values)
    if not graph:
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no part in"):
            f(*map(forward_ad.make_dual, values, tangents), impl=impl)


@pytest.mark.parametrize(("op", "impl"), CASES)
def test_a_tensor_that_a_transform_has_left_behind(op, impl):
    f, values, _ = problem(op)
    leaf = values[0].requires_grad_()
    left = []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(leaf)
    (got,) = torch.autograd.grad(f(left[0], *values[1:], impl=impl), leaf)
    (expected,) = torch.autograd.grad(f(leaf, *values[1:], impl=impl), leaf)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_what_a_transform_leaves_behind_keeps_its_gradients(op):
    """A tensor of a finished transform says that it needs no gradient, and has one."""
    given = arguments(op)
    leaves = {name: t for name, t in given.items() if t.requires_grad}
    kept = {}

    def leave(factor):
        kept.update({name: leaf * factor for name, leaf in leaves.items()})
        return factor

    torch.func.jvp(leave, (torch.ones(()),), (torch.ones(()),))
    assert not any(t.requires_grad for t in kept.values())
    results = []
    for tensors in (given, {**given, **kept}):
        loss = total(OPS[op][0](**tensors, impl="auto"))
        results.append(torch.autograd.grad(loss, list(leaves.values()), retain_graph=True))
    torch.testing.assert_close(results[1], results[0])
    for name in leaves:  # each alone, so that no other asks for gradients
        others = {key: t.detach() for key, t in given.items()}
        loss = total(OPS[op][0](**{**others, name: kept[name]}, impl="auto"))
        (got,) = torch.autograd.grad(loss, [leaves[name]], retain_graph=True)
        torch.testing.assert_close(got, results[0][list(leaves).index(name)])
