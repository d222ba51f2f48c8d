"""Intervals, tests and verdicts against independent computation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from healing_utils.analysis import effects
from healing_utils.base.errors import HealingError


def test_t_interval_agrees_with_scipy():
    x = np.random.default_rng(1).normal(0.03, 0.02, 7)
    ours = effects.t_interval(x)
    theirs = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert ours == pytest.approx((x.mean(), theirs.low, theirs.high, 7))


def test_t_interval_of_too_few_and_of_equal_values():
    assert effects.t_interval([0.4]).mean == 0.4 and math.isnan(effects.t_interval([0.4]).low)
    assert effects.t_interval([]).n == 0 and math.isnan(effects.t_interval([]).mean)
    assert effects.t_interval([0.5, 0.5, 0.5])[:3] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("function", [effects.t_interval, effects.sign_flip])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_missing_value_is_refused_rather_than_dropped(function, bad):
    with pytest.raises(HealingError, match="1 of 3 values"):
        function([0.1, bad, 0.2])


def all_flips(x):
    sums = np.array([(x * s).sum() for s in itertools.product([1, -1], repeat=len(x))])
    return np.mean(sums >= x.sum() - 1e-9 * np.abs(x).sum())


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_sign_flip_is_exact(n):
    for shift in (-0.5, 0.0, 1.0):
        x = np.random.default_rng(n).normal(shift, 1, n)
        for values in (x, np.round(x)):  # with zeros and equal magnitudes
            assert effects.sign_flip(values) == pytest.approx(all_flips(values))


def test_the_smallest_p_and_too_many_units():
    assert effects.sign_flip([0.1, 0.2, 0.3]) == 1 / 8
    # The sum of equal values under random signs is binomial: an answer known in closed form.
    found = effects.sign_flip([1.0] * 15 + [-1.0] * 5)
    assert found == pytest.approx(stats.binom.sf(14, 20, 0.5))
    assert math.isnan(effects.sign_flip([]))
    many = np.random.default_rng(0).normal(0.4, 1, 30)  # Student's t test
    assert effects.sign_flip(many) == pytest.approx(
        stats.t.sf(many.mean() / (many.std(ddof=1) / 30**0.5), 29)
    )


def test_holm_worked_by_hand():
    # sorted 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.2 x 1, made monotone
    assert effects.holm([0.02, 0.2, 0.01, 0.03]) == pytest.approx([0.06, 0.2, 0.04, 0.06])
    assert effects.holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert len(effects.holm([])) == 0
    # A test that could not be made counts as a member of the family.
    found = effects.holm([0.01, math.nan, 0.04])
    assert found == pytest.approx([0.03, math.nan, 0.08], nan_ok=True)


def test_binomial_error():
    assert effects.binomial_error(0.82, 872) == pytest.approx(0.013, abs=0.0001)
    assert math.isnan(effects.binomial_error(-0.1, 100))  # of a correlation


def test_units_needed_is_that_of_tables_of_power():
    # Cohen (1988), table 2.4.1 and its like for one sample: d = 0.5, one-sided 0.05, power 0.8.
    assert effects.units_needed(0.5) == 27
    assert effects.units_needed(1.0) == 8
    assert math.isnan(effects.units_needed(0.0))
