import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dblocks.recipes.metrics.differences import paired_difference, student_quantile

values = st.floats(-100, 100)


@given(st.integers(1, 200), st.floats(0.01, 0.999))
def test_quantiles_are_those_of_scipy(freedom, level):
    expected = stats.t.ppf((1 + level) / 2, freedom)
    assert student_quantile(level, freedom) == pytest.approx(expected, rel=1e-9)


def test_known_quantiles():
    assert student_quantile(0.95, 1) == pytest.approx(12.706, abs=1e-3)
    assert student_quantile(0.95, 2) == pytest.approx(4.303, abs=1e-3)
    assert student_quantile(0.95, 4) == pytest.approx(2.776, abs=1e-3)
    assert student_quantile(0.5, 1) == pytest.approx(1)
    for level, freedom in ((0, 1), (1, 1), (0.95, 0)):
        with pytest.raises(ValueError, match="must"):
            student_quantile(level, freedom)


@given(st.lists(st.tuples(values, values), min_size=2, max_size=9))
def test_the_interval_is_that_of_a_paired_t_test(pairs):
    ours, theirs = ([pair[i] for pair in pairs] for i in range(2))
    found = paired_difference(ours, theirs)
    back = paired_difference(theirs, ours)
    assert (back.mean, back.low, back.high) == (-found.mean, -found.high, -found.low)
    assert found.count == len(pairs)
    if found.std > 1e-6:
        interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-7)


def test_values_are_paired():
    # 1, 2, 3: although the values differ by more among seeds.
    found = paired_difference([1.0, 12.0, 103.0], [0.0, 10.0, 100.0])
    half = 4.302653 / math.sqrt(3)
    assert found == pytest.approx((2, 1, 2 - half, 2 + half, 3), abs=1e-5)
    assert paired_difference([1.0, 1.0], [0.0, 0.0]) == (1, 0, 1, 1, 2)


def test_one_pair_has_no_interval():
    assert paired_difference([2.0], [1.0]) == (1, None, None, None, 1)


def test_pairs_are_checked():
    for ours, theirs in (([1.0], []), ([], []), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match=f"got {len(ours)} and {len(theirs)} values"):
            paired_difference(ours, theirs)
    with pytest.raises(ValueError, match="values must be finite"):
        paired_difference([math.nan], [1.0])
