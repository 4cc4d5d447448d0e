"""The tools that the tests rely on: a budget that a wrong result overruns, and honest layouts."""

import pytest
import torch

from dblocks.kernels import _launch
from dblocks.testing import (
    LAYOUTS,
    assert_within_budget,
    check_against_reference,
    error_budget,
    make,
)

REF64 = torch.linspace(-2, 2, 9, dtype=torch.float64)
EAGER = REF64.float()


def test_budget_is_twice_the_eager_error_and_four_roundings():
    eager = EAGER.clone()
    eager[3] += 1e-3
    own = (eager.double() - REF64).abs().max().item()
    expected = 2 * own + 4 * 2**-23 * 2
    assert error_budget(REF64, eager, torch.float32) == pytest.approx(expected)
    assert error_budget(REF64[:0], EAGER[:0], torch.float32) == 0


def test_a_result_inside_passes_and_one_outside_does_not():
    assert_within_budget(EAGER + 5e-7, REF64, EAGER)
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget(EAGER + 5e-6, REF64, EAGER)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (EAGER[:3], "shape"),
        (EAGER.bfloat16(), "dtype"),
        (torch.full_like(EAGER, float("nan")), "over the budget"),
        (torch.full_like(EAGER, float("inf")), "over the budget"),
    ],
)
def test_what_can_never_pass(got, message):
    with pytest.raises(AssertionError, match=message):
        assert_within_budget(got, REF64, EAGER)


def test_a_wrong_gradient_is_found():
    def call(*, impl, x):
        return [x.sin() if impl == "reference" else x.sin().detach() + 0 * x]

    with pytest.raises(AssertionError, match="gradient of x"):
        check_against_reference(call, {"x": EAGER}, [torch.ones(9)], impl="triton")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_what_they_are_called(layout):
    x = make((4, 3, 8), layout, torch.float32, torch.Generator())
    assert x.shape == (4, 3, 8)
    assert x.is_contiguous() == (layout == "contiguous")
    assert (x.stride(0) == 0) == (layout == "expanded")
    assert (_launch.unit_last(x) is x) == (layout != "transposed")
