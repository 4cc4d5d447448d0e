import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dblocks.recipes.metrics.paired import paired_difference, student_quantile

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
    ours = {seed: a for seed, (a, _) in enumerate(pairs)}
    theirs = {seed: b for seed, (_, b) in enumerate(pairs)}
    found = paired_difference(ours, theirs)
    back = paired_difference(theirs, ours)
    assert (back.mean, back.low, back.high) == (-found.mean, -found.high, -found.low)
    assert found.pairs == len(pairs)
    if found.std > 1e-6:
        test = stats.ttest_rel(list(ours.values()), list(theirs.values()))
        interval = test.confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-7)
        assert bool(found.sign) == (test.pvalue < 0.05) or test.pvalue == pytest.approx(0.05)


def test_seeds_are_paired():
    ours = {0: 1.0, 1: 12.0, 2: 103.0, 7: 0.0}
    theirs = {2: 100.0, 0: 0.0, 1: 10.0, 8: 50.0}
    found = paired_difference(ours, theirs)  # 1, 2, 3: although rows differ by more among seeds
    half = 4.302653 / math.sqrt(3)
    expected = (2, 1, 2 - half, 2 + half)
    assert found[:4] == pytest.approx(expected, abs=1e-5)
    assert (found.pairs, found.sign) == (3, 0)
    assert paired_difference({0: 1.0, 1: 1.0}, {0: 0.0, 1: 0.0}).sign == 1


def test_one_pair_has_no_interval():
    found = paired_difference({3: 2.0}, {3: 1.0, 4: 0.0})
    assert (found.mean, found.pairs, found.sign) == (1, 1, 0)
    assert all(map(math.isnan, (found.std, found.low, found.high)))


def test_values_are_checked():
    with pytest.raises(ValueError, match=r"a seed in common, got \[0\] and \[1\]"):
        paired_difference({0: 1.0}, {1: 1.0})
    with pytest.raises(ValueError, match="values must be finite"):
        paired_difference({0: math.nan}, {0: 1.0})
