import math

import pytest
import torch

from dblocks.sampling.choice import Choice

LOGITS = torch.tensor([[0.0, 2.0, 1.0]])
HALF = torch.tensor([0.5], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1e-310, 1e-30, 5e-324])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}])
def test_the_smallest_temperatures_take_the_most_likely_token(temperature, options):
    assert Choice(temperature, **options).token(LOGITS, HALF).tolist() == [1]
    tied = Choice(temperature, **options).probabilities(torch.tensor([[3.0, 3.0, 1.0]]))
    assert tied.tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_raise(temperature, bad):
    logits = torch.tensor([[0.0, bad, 1.0]])
    with pytest.raises(FloatingPointError, match="logits must be finite"):
        Choice(temperature).token(logits, HALF)


def test_tokens_that_are_ruled_out_may_have_no_probability():
    assert Choice().token(torch.tensor([[-math.inf, 0.0]]), HALF).tolist() == [1]
    with pytest.raises(FloatingPointError, match="logits must be finite"):
        Choice().token(torch.full((1, 2), -math.inf), HALF)


@pytest.mark.parametrize("options", [{"temperature": "1"}, {"temperature": None}, {"top_p": "x"}])
def test_numbers_are_numbers(options):
    with pytest.raises(ValueError, match=r"must be"):
        Choice(**options)
