"""Intervals, tests and verdicts against independent computation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs
from scipy import stats

from healing_utils.analysis import claims, effects
from healing_utils.base.errors import HealingError

# --- intervals ---


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


def test_t_interval_covers_at_three_values_where_the_bootstrap_does_not():
    rng = np.random.default_rng(0)
    studies = rng.normal(0.0, 1.0, (2000, 3))
    t_covers = np.mean([i.low <= 0 <= i.high for i in map(effects.t_interval, studies)])
    # All 27 resamples of three values are few enough to list: the percentile bootstrap, exactly.
    resamples = np.array(list(itertools.product(range(3), repeat=3)))
    low, high = np.percentile(studies[:, resamples].mean(axis=2), [2.5, 97.5], axis=1)
    # 2,000 studies: the standard error of a coverage of 0.95 is 0.005
    assert t_covers == pytest.approx(0.95, abs=0.02)
    assert np.mean((low <= 0) & (0 <= high)) < 0.85


# --- sign flips ---


def all_flips(x):
    x = np.asarray(x)
    sums = np.array([(x * s).sum() for s in itertools.product([1, -1], repeat=len(x))])
    return np.mean(sums >= x.sum() - 1e-9 * np.abs(x).sum())


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 11])
def test_sign_flip_is_exact(n):
    rng = np.random.default_rng(n)
    for shift in (-0.5, 0.0, 1.0):
        x = rng.normal(shift, 1, n)
        assert effects.sign_flip(x).p == pytest.approx(all_flips(x))
        tied = np.round(x, 0)  # zeros and equal magnitudes
        assert effects.sign_flip(tied).p == pytest.approx(all_flips(tied))


def test_sign_flip_of_thirty_units_is_exact():
    # The sum of 30 equal values under random signs is binomial: an answer known in closed form.
    found = effects.sign_flip([1.0] * 25 + [-1.0] * 5)
    assert found == pytest.approx((stats.binom.sf(24, 30, 0.5), 0.5**30, True))


def test_smallest_reachable_p():
    assert effects.sign_flip([0.1, 0.2, 0.3])[:2] == (1 / 8, 1 / 8)
    assert effects.sign_flip([0.1, 0.2, 0.3, 0.1, 0.2, 0.3])[:2] == (1 / 64, 1 / 64)
    assert math.isnan(effects.sign_flip([]).p)


def test_sign_flip_refuses_more_units_than_it_can_list():
    with pytest.raises(HealingError, match="at most 44 units, got 45"):
        effects.sign_flip(np.ones(45))


def test_exact_tests_keep_their_level():
    rng = np.random.default_rng(5)
    rejected = np.mean([effects.sign_flip(rng.normal(0, 1, 6)).p <= 3 / 64 for _ in range(2000)])
    assert rejected == pytest.approx(3 / 64, abs=0.015)  # exact, so equal up to simulation noise
    p = [effects.task_permutation(rng.normal(0, 1, (3, 4))).p for _ in range(1500)]
    # 1,500 studies: the standard error of a rate of 0.05 is 0.006
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.02)


# --- permutation of the tasks ---


def all_orders(drops):
    """p over all (T!)^S orders, by variances of means as the definition says."""
    columns = [list(itertools.permutations(column)) for column in np.asarray(drops).T]
    orders = np.array(list(itertools.product(*columns)))  # (orders, seeds, tasks)
    observed = np.mean(drops, axis=1).var()
    return np.mean(orders.mean(axis=1).var(axis=1) >= observed - 1e-12)


@pytest.mark.parametrize(("tasks", "seeds"), [(2, 1), (2, 2), (2, 5), (3, 2), (3, 4), (4, 3)])
def test_the_permutation_test_is_exact(tasks, seeds):
    rng = np.random.default_rng(tasks * 10 + seeds)
    for spread in (0.0, 0.5, 2.0):
        x = rng.normal(0, 1, (tasks, seeds)) + spread * np.arange(tasks)[:, None]
        for drops in (x, np.round(x)):  # rounded: ties
            found = effects.task_permutation(drops)
            assert found.listed and found.p == pytest.approx(all_orders(drops))
            assert found.p >= found.smallest_p == 1 / math.factorial(tasks) ** (seeds - 1)


def test_the_smallest_p_is_reached_by_tasks_that_keep_their_order():
    clear = np.array([[0.1, 0.11, 0.1], [0.2, 0.22, 0.21], [0.4, 0.41, 0.43]])
    found = effects.task_permutation(clear)
    assert found.p == found.smallest_p == 1 / 36
    assert effects.task_permutation(clear[:, :1]) == (1.0, 1.0, True)
    assert effects.task_permutation(clear[:1]) == (1.0, 1.0, True)


def test_too_many_permutations_are_drawn_again_alike_and_agree_with_the_exact_p(monkeypatch):
    rng = np.random.default_rng(5)
    drops = rng.normal(0, 1, (4, 4)) + 0.4 * np.arange(4)[:, None]
    exact = effects.task_permutation(drops)
    monkeypatch.setattr(effects, "MAX_PERMUTATIONS", 100)
    drawn = effects.task_permutation(drops)
    assert not drawn.listed and drawn.smallest_p == 1e-5
    assert drawn == effects.task_permutation(drops) != effects.task_permutation(drops, seed=1)
    error = math.sqrt(exact.p * (1 - exact.p) / 99_999)
    assert 0.01 < exact.p < 0.5 and abs(drawn.p - exact.p) < 4 * error


@settings(max_examples=40, deadline=None)
@given(
    drops=hs.lists(hs.lists(hs.floats(-1, 1), min_size=3, max_size=3), min_size=2, max_size=4),
    order=hs.randoms(use_true_random=False),
    shift=hs.floats(-2, 2),
)
def test_the_permutation_test_does_not_hang_on_order_or_on_a_seeds_level(drops, order, shift):
    x = np.round(drops, 3)
    again = x[order.sample(range(len(x)), len(x))] + np.array([0, shift, 0])
    assert effects.task_permutation(again) == effects.task_permutation(x)


# --- corrections and sizes ---


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
    assert effects.units_needed(0.5) == effects.units_needed(-0.5) == 27
    assert effects.units_needed(1.0) == 8
    assert math.isnan(effects.units_needed(0.0))


# --- verdicts ---


@pytest.mark.parametrize(
    "low, high, p, problems, expected",
    [
        (0.02, 0.05, 0.01, (), "holds"),
        (0.02, 0.05, 0.05, (), "undecided"),  # p must be below, not at
        (0.01, 0.05, 0.01, (), "undecided"),  # the interval must be beyond the margin
        (0.005, 0.05, 0.01, (), "undecided"),
        (-0.02, 0.05, 0.3, (), "undecided"),
        (0.001, 0.009, 0.01, (), "fails"),  # real, but too small to matter
        (-0.01, 0.01, 0.9, (), "fails"),
        (-0.05, -0.02, 1.0, (), "fails"),
        (-0.05, -0.001, 1.0, (), "fails"),
        (-0.05, 0.005, 0.9, (), "undecided"),
        (0.02, 0.05, 0.01, ("1 value missing: x",), "undecided"),
        (-0.05, -0.02, 1.0, ("1 value missing: x",), "undecided"),
        (math.nan, math.nan, math.nan, (), "undecided"),
    ],
)
def test_verdict_table(low, high, p, problems, expected):
    name, reason = claims.verdict(low, high, p, problems=problems)
    assert name == expected and reason
