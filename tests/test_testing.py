"""The tools that the tests rely on: a budget that a wrong result overruns, and honest layouts."""

import pytest
import torch

from dblocks.kernels._common import launches
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


def test_an_overflow_of_the_plain_result_allows_nothing():
    ref64 = REF64.clone()
    ref64[0] = 1e6
    eager = ref64.half()
    assert error_budget(ref64, eager, torch.float16) == error_budget(
        REF64[1:], eager[1:], eager.dtype
    )
    assert_within_budget(eager, ref64, eager)
    wrong = eager.clone()
    wrong[3] += 0.5
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget(wrong, ref64, eager)
    wrong = eager.clone()
    wrong[0] = 1.0
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget(wrong, ref64, eager)
    assert error_budget(ref64[:1], eager[:1], torch.float16) == 0


def test_an_output_that_is_not_contiguous_is_found():
    x = torch.randn(2, 3).T
    with pytest.raises(AssertionError, match="output 0: not contiguous"):
        check_against_reference(
            lambda impl, x: [x + 1], {"x": x}, [None], impl="triton", needs_grad=[]
        )


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
    assert (launches.unit_last(x) is x) == (layout != "transposed")


def test_one_tensor_is_one_output_and_not_its_rows():
    inputs = {"x": torch.randn(2, 3)}
    upstream = [torch.ones(2, 3)]
    check_against_reference(lambda impl, x: x.exp(), inputs, upstream, impl="triton")
    with pytest.raises(AssertionError, match="output 0: error"):
        check_against_reference(
            lambda impl, x: x.exp() * (1.0 if impl == "reference" else 1.01),
            inputs, upstream, impl="triton",
        )  # fmt: skip


@pytest.mark.parametrize("upstream", [[], [None, None, None]])
def test_gradients_for_another_number_of_outputs_are_refused(upstream):
    with pytest.raises(ValueError, match=f"each of the 2 outputs of call, got {len(upstream)}"):
        check_against_reference(
            lambda impl, x: (x, x.exp()), {"x": torch.randn(2, 3)}, upstream, impl="triton"
        )


def test_an_unknown_layout_is_refused():
    with pytest.raises(
        ValueError, match=r"layout must be one of contiguous, chunk, .* got 'chunky'"
    ):
        make((2, 3), "chunky", torch.float32, torch.Generator())
