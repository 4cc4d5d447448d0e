"""`torch.compile(..., backend="dblocks")` where a graph changes tensors in place or its mode."""

import pytest
import torch
import torch.nn.functional as nnf

from dblocks.integrations.fuse.compiler import compiler
from tools import seeded

D = 16


def norm(x):
    return nnf.layer_norm(x, (D,))


def scale_in_place(x, scale, shift):
    factor = 1 + scale
    scale.mul_(3)
    return norm(x) * factor + shift


def scale_by_item(x, scale, shift):
    factor = 1 + scale
    scale[:] = 0
    return norm(x) * factor + shift


def scale_by_operator(x, scale, shift):
    factor = 1 + scale
    scale //= 2
    return norm(x) * factor + shift


def scale_by_activation(x, scale, shift):
    factor = 1 + scale
    nnf.relu(scale, True)
    return norm(x) * factor + shift


def scale_moved(x, scale, shift):
    factor = (1 + scale).repeat(1, 5, 1)
    scale.zero_()
    return norm(x) * factor + shift


def scale_chosen(x, scale, shift):
    factor = torch.where(x[..., :1] > 0, 1 + scale, 1 + shift)
    scale.zero_()
    return norm(x) * factor + shift


def rows_before_a_cast(x, scale, shift):
    rows = x.float()
    x.add_(1.5 * rows.to(x.dtype).abs())
    return norm(rows) * (1 + scale) + shift


def rows_of_a_norm_written_out(x, scale, shift):
    rows = x.float()
    x.mul_(-1)
    return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + scale) + shift


def branch_of_a_gate(x, scale, shift):
    product = scale * norm(x).cos()
    scale.zero_()
    return x + product


CHANGING = (
    scale_in_place, scale_by_item, scale_by_operator, scale_by_activation, scale_moved,
    scale_chosen, rows_before_a_cast, rows_of_a_norm_written_out, branch_of_a_gate,
)  # fmt: skip


def factor_without_gradient(x, scale, shift):
    with torch.no_grad():
        factor = 1 + scale
    return norm(x) * factor + shift


def cast_without_gradient(x, scale, shift):
    with torch.no_grad():
        rows = x.float()
    return norm(rows) * (1 + scale) + shift


def product_without_gradient(x, scale, shift):
    with torch.no_grad():
        product = scale * norm(x).cos()
    return x + product


def compiled(function):
    reports = []

    def backend(module, inputs):
        return compiler(module, inputs, options={"inner": "eager", "report": reports.append})

    torch.compiler.reset()
    return torch.compile(function, backend=backend, fullgraph=True), reports


def inputs(dtype=torch.float32):
    rows = torch.randn(3, 5, D, generator=seeded(0)).to(dtype)
    return rows, *(torch.randn(3, 1, D, generator=seeded(i)) for i in (1, 2))


@pytest.mark.parametrize("function", CHANGING)
def test_what_reads_a_tensor_before_it_changes_stays(function):
    dtype = torch.bfloat16 if function.__name__.startswith("rows") else torch.float32
    want = function(*inputs(dtype))
    fused, reports = compiled(function)
    torch.testing.assert_close(fused(*inputs(dtype)), want, rtol=1e-5, atol=1e-5)
    assert not reports[0].sites


@pytest.mark.parametrize(
    "function", [factor_without_gradient, cast_without_gradient, product_without_gradient]
)
def test_a_part_without_gradient_has_none(function):
    def gradients(called):
        tensors = [t.requires_grad_() for t in inputs(torch.bfloat16)]
        called(*tensors).square().sum().backward()
        return [t.grad for t in tensors]

    want = gradients(function)
    fused, reports = compiled(function)
    for own, found in zip(want, gradients(fused), strict=True):
        assert (own is None) == (found is None)
        assert own is None or torch.equal(own, found)
    assert not reports[0].sites


def test_changes_of_what_was_read_before_do_not_matter():
    def model(x, scale, shift):
        seen = x.clone()
        seen.mul_(2)
        y = norm(x) * (1 + scale) + shift
        seen.add_(y)
        return y, seen

    want = model(*inputs())
    fused, reports = compiled(model)
    torch.testing.assert_close(fused(*inputs()), want, rtol=1e-5, atol=1e-5)
    assert reports[0].sites == {"modulation": 1}
