"""Options that are numbers may be those of numpy, fractions or ints, in every implementation."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from dblocks.functional import adaln, doubled_attention, residual_adaln
from tools import needs_cpp, seeded

NUMBERS = [np.float32(0.25), np.float64(0.25), np.int64(1), 1, True, Fraction(1, 4)]


def rows(shape=(2, 4, 8)):
    return torch.randn(shape, generator=seeded()).requires_grad_()


def results(outputs, inputs):
    return [*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), inputs)]


CALLS = {
    "adaln": lambda x, number, impl: [adaln(x, None, None, eps=number, impl=impl)],
    "residual_adaln": lambda x, number, impl: residual_adaln(
        x, x.detach(), None, None, None, eps=number, impl=impl
    ),
    "scale": lambda x, number, impl: [doubled_attention(x, x, x, scale=number, impl=impl)],
    "softcap": lambda x, number, impl: [doubled_attention(x, x, x, softcap=number, impl=impl)],
}


IMPLS = {
    name: ("reference", "triton", "composed" if name in ("scale", "softcap") else "cpp")
    for name in CALLS
}


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: type(n).__name__)
@pytest.mark.parametrize(
    ("option", "impl"),
    [
        pytest.param(option, impl, marks=needs_cpp if impl == "cpp" else ())
        for option, impls in IMPLS.items()
        for impl in impls
    ],
)
def test_a_number_is_its_float(option, impl, number):
    x = rows((1, 2, 4, 16) if option in ("scale", "softcap") else (2, 4, 8))
    found = results(CALLS[option](x, number, impl), (x,))
    expected = results(CALLS[option](x, float(number), impl), (x,))
    for got, right in zip(found, expected, strict=True):
        assert torch.equal(got, right)
